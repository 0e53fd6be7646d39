"""Test which dtype a GPU without bfloat16 of its own computes in."""

import pytest
import torch

from prefix_distill.engine.device import choose_dtype


class Large:
    parameters = 10**9


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_emulated_bfloat16_is_not_chosen(native, dtype, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert choose_dtype(torch.device("cuda"), Large())[0] == dtype

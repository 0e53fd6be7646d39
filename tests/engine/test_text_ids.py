"""Test that the checks before a run feed models plain text, and no special tokens."""

import dataclasses

import pytest
import torch
from helpers import tiny_net
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from prefix_distill.config import Adapter
from prefix_distill.engine import loading, saving
from prefix_distill.engine.causality import check_causality
from prefix_distill.engine.exactness import find_decoding
from prefix_distill.engine.models import with_checkpointing
from prefix_distill.engine.reach import find_unreached
from prefix_distill.engine.recomputation import check_recomputation
from prefix_distill.engine.sharing import check_sharing
from prefix_distill.engine.text_ids import TEXT, make_row, text_ids
from prefix_distill.engine.trunk import check_head, choose_trunk

SPECIAL = 16  # the first ids


def load(folder):
    return loading.load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a model whose first ids are special tokens."""
    special = ["<p>", "<e>", "<u>", "<a>", *(f"<{i}>" for i in range(4, SPECIAL))]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    net = tiny_net("llama", vocabulary=len(symbols))
    net.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    net.save_pretrained(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<p>", eos_token="<e>")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def model(folder):
    return load(folder)


@pytest.fixture
def seen(monkeypatch):
    """Return the set of the ids that models read from now on."""
    ids: set[int] = set()
    plain = torch.nn.Embedding.forward

    def forward(self, ids_BT):
        ids.update(ids_BT.flatten().tolist())
        return plain(self, ids_BT)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    return ids


def test_no_check_reads_a_special_token(model, seen):
    """Padding is masked, and the check of decoding ends a row with EOS."""
    choose_trunk(model)
    check_head(model)
    check_causality(model)
    assert find_unreached(model) == frozenset()
    check_recomputation(with_checkpointing(model))
    assert len(seen) > 20 and min(seen) >= SPECIAL
    assert check_sharing(model).is_exact
    find_decoding(model)
    assert {i for i in seen if i < SPECIAL} == {0, 1}


def test_no_check_of_an_adapter_reads_a_special_token(model, seen, tmp_path):
    adapted, _ = loading.add_adapter(model, Adapter(rank=2), 0)
    with torch.no_grad():
        for p in adapted.trainable.values():
            p.add_(0.1)
    saving.save_model(adapted, tmp_path / "adapter")
    load(tmp_path / "adapter")
    assert len(seen) > 4 and min(seen) >= SPECIAL


def test_text_ids_are_those_of_a_text_without_eos(model):
    text = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert text_ids(model, 40) == text[:40]
    assert text_ids(model, 3 * len(text)) == 3 * text
    assert make_row(model, 40).tolist() == [text[:40]]
    ending = dataclasses.replace(model, eos=frozenset({text[1]}))
    assert text[1] not in text_ids(ending, 40)


def test_a_vocabulary_without_the_text_gives_its_own_ids(model):
    """Special tokens are left out, as long as there are others."""
    small = dataclasses.replace(model, support=SPECIAL + 8)
    assert text_ids(small, 16) == [*range(SPECIAL, SPECIAL + 8)] * 2
    tiny = dataclasses.replace(model, support=2)
    assert text_ids(tiny, 3) == [0, 1, 0]

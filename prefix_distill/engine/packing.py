"""Linear layers in bfloat16 on a CPU that keep their weights in the layout of its matmul.

For a product with few rows, as in a decoding step, oneDNN first copies all weights into the blocks
that its kernel reads, and this copy takes longer than the product. Here they are copied once, and
again when the weights change. The operators are private ones of torch, which its compiler uses;
``find_obstacle`` tries them before they are used.
"""

import functools
import platform

import torch

FEW_ROWS = 64  # most input rows for which packed weights are used
USUAL_ROWS = 8  # for which the operator chooses the layout; it takes any number
SIZES = ((8, 384), (1, 640))  # (rows, width) of the trial
MOST = 2.0  # the error of a trial over that of torch's own linear layer


class PackedLinear(torch.nn.Linear):
    """A linear layer that uses packed weights for few input rows.

    ``packed``: the weights at ``version``, a number that torch raises with every change in place.
    """

    packed: torch.Tensor | None = None
    version = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if not 0 < rows <= FEW_ROWS or x.dtype != self.weight.dtype:
            return super().forward(x)
        if self.packed is None or self.version != self.weight._version:
            self.packed = pack(self.weight)
            self.version = self.weight._version
        return multiply(x, self.packed, self.bias)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight [out, in] in blocks, for products with few rows."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL_ROWS)
    return packed


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x·Wᵀ + bias of packed weights."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


@functools.cache
def find_obstacle(dtype: torch.dtype) -> str | None:
    """Return why this machine's CPU cannot use packed weights of a dtype; None: it can.

    The products of random inputs may differ from float64 by at most MOST times as much as those of
    torch's own layer.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"weights are packed on x86 alone, not on {platform.machine()}"
    generator = torch.Generator().manual_seed(0)
    try:
        for rows, width in SIZES:
            x = torch.randn(rows, width, generator=generator).to(dtype)
            weight = torch.randn(2 * width, width, generator=generator).to(dtype)
            bias = torch.randn(2 * width, generator=generator).to(dtype)
            exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
            expected = torch.nn.functional.linear(x, weight, bias)
            found = multiply(x, pack(weight), bias)
            allowed = MOST * (expected - exact).norm().item()
            error = (found - exact).norm().item()
            if found.shape != expected.shape or not error <= allowed:
                return f"packed weights have an error of {error:.2g}, {allowed:.2g} is allowed"
    except Exception as error:  # a build of torch without these operators raises any kind
        return f"this torch has no packed weights ({type(error).__name__})"
    return None

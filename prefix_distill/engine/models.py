"""A network with its tokenizer, and what the loss needs from both."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..maths.divergence import Head
from ..maths.extrapolation import MODULES
from ..maths.flops import Shape
from . import adapter
from .transformers_names import enable_checkpointing, name_cache_argument, read_cache

if TYPE_CHECKING:
    from peft import PeftModel

    from .transformers_names import CausalLM


FEW_ROWS = 64  # most rows for which a linear layer runs columns first
LARGE_WEIGHT = 1 << 16  # fewest weight elements for which it does


@dataclass
class Model:
    """A causal language model in two parts, trunk and head, so that the head can run on taught rows
    only.

    ``generation_config`` is the one that came with the weights and is saved with them; the
    network's own is blank, so that no sampling field of it can shape a rollout. ``eos``: ids that
    end a turn. ``shares_prompts``: several responses may be read behind one reading of their
    prompt, because that was shown to be exact (``check_sharing``). ``recomputes``: a training step
    keeps only each layer's input and runs the layer again in backward (gradient checkpointing).
    ``support``: the head speaks about so many leading ids (None: all). ``adapter``: peft's wrapper
    of ``net`` where a LoRA adapter trains in it; ``adapter_off``: this is the network without it.
    ``home``: the head's device, where the layers are spread over several places (``scratch``: a
    folder that must live as long).
    """

    name: str
    net: "CausalLM"
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    eos: frozenset[int]
    shares_prompts: bool = False
    recomputes: bool = False
    support: int | None = None
    adapter: "PeftModel | None" = None
    adapter_off: bool = False
    home: torch.device | None = None
    scratch: TemporaryDirectory[str] | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The text model's config (inside a multimodal one, too)."""
        return self.net.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        return self.home or self.net.device

    @property
    def parameters(self) -> int:
        """Distinct parameters; a tied head counts once."""
        return sum(p.numel() for p in self.net.parameters())

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What an update changes, by name."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    @property
    def vocabulary(self) -> int:
        """Return the number of ids that the head computes logits for."""
        if self.support is not None:
            return self.support
        return len(self.net.get_output_embeddings().weight)

    @property
    def positions(self) -> int | None:
        """Longest sequence (prompt + response) the model has positions for, in tokens; None when
        unlimited."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def reads_once(self) -> bool:
        """Is a prompt read once for all its samples in scoring and training? (A layer that
        writes the cache cannot run twice.)"""
        return self.shares_prompts and not self.recomputes

    def trunk(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, T, D], after the last norm. No mask: causal attention keeps what
        lies to the right of a row's end (padding) from its tokens."""
        with (
            self.form(),
            _recomputing(self.net)
            if self.recomputes and torch.is_grad_enabled()
            else contextlib.nullcontext(),
        ):
            return self.net.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state.to(
                self.device
            )

    def trunk_cached(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """(final hidden states of ``ids_BT``, the KV cache after them). ``mask_BT`` covers what is
        in the cache, too; its zeros, padding on the left, have no position."""
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        decoder = self.net.get_decoder()
        cache_argument = {name_cache_argument(decoder.forward): cache}
        with self.form():
            out = decoder(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                use_cache=True,
                **cache_argument,
            )
        return out.last_hidden_state.to(self.device), read_cache(out)

    def form(self) -> contextlib.AbstractContextManager[None]:
        """Around everything that runs ``net``: without the adapter, where this is the network
        without it."""
        return adapter.without(self.net) if self.adapter_off else contextlib.nullcontext()

    def head(self) -> Head:
        """The output head, cut to the support."""
        linear, config = self.net.get_output_embeddings(), self.config
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
        bias = getattr(linear, "bias", None)
        weight = linear.weight
        if self.support is not None and self.support < len(
            weight
        ):  # an uncut head is the parameter itself: no copy in backward
            weight, bias = weight[: self.support], None if bias is None else bias[: self.support]
        return Head(weight, bias, float(scale), getattr(config, "final_logit_softcapping", None))


def recompute(model: Model) -> Model:
    """``model`` with gradient checkpointing. UserError where the architecture has none."""
    try:
        enable_checkpointing(model.net)
    except ValueError:
        raise UserError(
            f"model {model.name}: its architecture has no gradient checkpointing; leave "
            "--gradient-checkpointing out"
        ) from None
    return replace(model, recomputes=True)


@contextlib.contextmanager
def _recomputing(net: torch.nn.Module) -> Iterator[None]:
    """Transformers recomputes a layer only while its own ``training`` flag is up; those of its
    parts (dropout) stay down."""
    layers = [
        module for module in net.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


class _ColumnsFirst(torch.nn.Linear):
    """The same linear layer, as W·xᵀ where x has few rows: for x·Wᵀ the CPU's float32 matmul
    re-packs all weights first, which tells at the few rows of a decoding step (against the
    ``naive`` arm of ``tests/benchmarks/rollout.py``)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if not 1 < len(rows) <= FEW_ROWS:
            return super().forward(x)
        out = (self.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def decoder(model: Model, dtype: torch.dtype) -> Model:
    """The network that samples: ``model`` itself, with what makes decoding faster.

    In another ``dtype``: a copy in it (decoding from float32 weights under autocast casts every
    weight at every token); ``refresh`` brings it up to date. In float32 on a CPU: the same
    parameters behind other matmuls. Else the model.
    """
    if model.home is not None or getattr(model.net, "is_quantized", False):
        return model
    if dtype != model.net.dtype:
        return replace(model, net=copy.deepcopy(model.net).to(dtype).requires_grad_(False))
    if model.device.type != "cpu" or dtype != torch.float32:
        return model
    shared = {id(t): t for t in [*model.net.parameters(), *model.net.buffers()]}
    net = copy.deepcopy(model.net, shared)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.weight.numel() >= LARGE_WEIGHT:
                linear = _ColumnsFirst(
                    child.in_features, child.out_features, child.bias is not None, device="meta"
                )
                linear.weight, linear.bias = child.weight, child.bias
                setattr(parent, name, linear)
    return replace(model, net=net)


@torch.no_grad()
def refresh(decoding: Model, student: Model) -> None:
    """Copies the student's weights where the decoding network has its own."""
    if decoding.net.dtype != student.net.dtype:
        torch._foreach_copy_(list(decoding.net.parameters()), list(student.net.parameters()))


@torch.no_grad()
def average(teacher: Model, student: Model, share: float) -> None:
    """teacher ← share·teacher + (1 − share)·student, weight by weight (an exponential moving
    average of the student)."""
    for mean, p in zip(teacher.net.parameters(), student.net.parameters(), strict=True):
        mean.lerp_(p.to(mean.device), 1 - share)


def moved(net: PreTrainedModel, modules: str) -> dict[str, Parameter]:
    """The parameters of a causal LM that are extrapolated, by their names in
    ``net.named_parameters()`` and in that order.

    ``attention-mlp`` (the authors' choice): weights and biases of the decoder's linear layers,
    fused experts among them; no embedding, output head (even where it lies inside the decoder, or
    is tied) or norm. ``all``: every parameter. Of both: what trains (of a LoRA adapter: its
    factors, one by one). UserError where the model has none of them.
    """
    from transformers.pytorch_utils import Conv1D

    if modules not in MODULES:
        raise ValueError(f"modules {modules!r}: one of {', '.join(MODULES)}")
    if modules == "all":
        found = {name: p for name, p in net.named_parameters() if p.requires_grad}
    else:
        ends = (net.get_input_embeddings(), net.get_output_embeddings())
        left = {id(p) for module in ends if module is not None for p in module.parameters()}
        linear = set()
        for name, module in net.get_decoder().named_modules():
            own = list(module.parameters(recurse=False))
            experts = name.endswith("experts") and any(p.dim() == 3 for p in own)
            if experts or isinstance(module, (torch.nn.Linear, Conv1D)):
                linear |= {id(p) for p in own}
        found = {
            name: p
            for name, p in net.named_parameters()
            if id(p) in linear - left and p.requires_grad
        }
    if not found:
        raise UserError(
            f"{type(net).__name__} has no linear layer inside its decoder, so there is nothing to "
            "extrapolate; use --extrapolate none"
        )
    return found


def shape(model: Model, support: int | None = None) -> Shape:
    """Reads a Model's Shape from its modules and its config."""
    from transformers.pytorch_utils import Conv1D

    config, net = model.config, model.net
    share = 1.0
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        share = getattr(config, "num_experts_per_tok", experts) / experts
    trunk = adapted = 0.0
    for name, module in net.get_decoder().named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            # a quantised weight is packed: its features count, not its elements
            size = (
                module.in_features * module.out_features
                if isinstance(module, torch.nn.Linear)
                else module.weight.numel()
            )
            if ".lora_" in name:
                adapted += 0 if model.adapter_off else size
            else:
                trunk += size * (share if ".experts." in f".{name}." else 1.0)
        elif name.endswith(
            "experts"
        ):  # fused experts keep their matrices as [experts, in, out] parameters
            trunk += share * sum(
                p.numel() for p in module.parameters(recurse=False) if p.dim() == 3
            )
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    window = getattr(config, "sliding_window", None)
    everywhere = (
        "sliding_attention" if window else "full_attention"
    )  # without types, a window holds in every layer
    kinds = getattr(config, "layer_types", None) or [everywhere] * config.num_hidden_layers
    attention = tuple((width, window if kind == "sliding_attention" else None) for kind in kinds)
    rows, columns = net.get_output_embeddings().weight.shape
    frozen = None if model.adapter is None or model.adapter_off else round(trunk)
    return Shape(round(trunk + adapted), min(rows, support or rows) * columns, attention, frozen)

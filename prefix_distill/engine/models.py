"""A network with its tokenizer, and what sampling and the loss need from both."""

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


FEW_ROWS = 64  # most input rows for which _ColumnsFirst computes W·xᵀ
LARGE_WEIGHT = 1 << 16  # fewest weight elements for which it replaces a linear layer


@dataclass(kw_only=True)
class Model:
    """A causal language model in two parts, so that the head can run on taught positions only.

    ``generation_config``: the settings that came with the weights and are saved with them. The
    network's own are blank, so that none of them changes sampling. ``eos``: ids that end a turn.
    ``shares_prompts``: several responses may follow one forward pass over their prompt, because
    ``scoring.check_sharing`` found that exact. ``recomputes``: gradient checkpointing is on.
    ``support``: the head computes logits for the first so many ids (None: all). ``adapter``: peft's
    wrapper of ``net`` if a LoRA adapter is trained. ``adapter_off``: this model is ``net`` without
    its adapter. ``home``: the head's device, if the layers lie on several devices. ``scratch``: the
    folder of offloaded layers, which must exist as long as the model.
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
        """Return the text model's config, also of a multimodal model."""
        return self.net.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Return the device of the inputs and of the head."""
        return self.home or self.net.device

    @property
    def parameters(self) -> int:
        """Return the number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.net.parameters())

    @property
    def trainable(self) -> dict[str, Parameter]:
        """Return the parameters that a step changes, by name."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    @property
    def vocabulary(self) -> int:
        """Return the number of ids that the head computes logits for."""
        if self.support is not None:
            return self.support
        return len(self.net.get_output_embeddings().weight)

    @property
    def positions(self) -> int | None:
        """Return the longest sequence (prompt and response) in tokens; None if unlimited."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def encodes_prompt_once(self) -> bool:
        """Return whether scoring and training run a prompt once for all its samples.

        With gradient checkpointing they do not, because a layer that fills the KV cache cannot run
        twice.
        """
        return self.shares_prompts and not self.recomputes

    def trunk(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states [B, T, D], after the last norm.

        There is no mask: padding lies on the right, where causal attention hides it.
        """
        with self.adapter_context(), self._checkpointing():
            output = self.net.get_decoder()(input_ids=ids_BT, use_cache=False)
        return output.last_hidden_state.to(self.device)

    def trunk_cached(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Return the final hidden states of ``ids_BT`` and the KV cache after them.

        ``mask_BT`` also covers the tokens in ``cache``. Its zeros are padding on the left and have
        no position.
        """
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        trunk = self.net.get_decoder()
        cache_argument = {name_cache_argument(trunk.forward): cache}
        with self.adapter_context():
            output = trunk(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                use_cache=True,
                **cache_argument,
            )
        return output.last_hidden_state.to(self.device), read_cache(output)

    def adapter_context(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which ``net`` runs: it disables the adapter if ``adapter_off``."""
        if self.adapter_off:
            return adapter.disable(self.net)
        return contextlib.nullcontext()

    def _checkpointing(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a forward pass whose layers are recomputed in backward."""
        if self.recomputes and torch.is_grad_enabled():
            return _recomputing(self.net)
        return contextlib.nullcontext()

    def head(self) -> Head:
        """Return the output head, cut to the support."""
        linear = self.net.get_output_embeddings()
        weight = linear.weight
        bias = getattr(linear, "bias", None)
        # an uncut head stays the parameter itself, so that backward makes no copy
        if self.support is not None and self.support < len(weight):
            weight = weight[: self.support]
            if bias is not None:
                bias = bias[: self.support]
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(self.config, "logits_scaling", None) or 1.0  # Granite divides
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return Head(weight_VD=weight, bias_V=bias, scale=float(scale), softcap=softcap)


def with_checkpointing(model: Model) -> Model:
    """Return ``model`` with gradient checkpointing.

    UserError: the architecture does not support it.
    """
    try:
        enable_checkpointing(model.net)
    except ValueError:
        raise UserError(
            f"model {model.name}: its architecture does not support gradient checkpointing; omit "
            "--gradient-checkpointing"
        ) from None
    return replace(model, recomputes=True)


@contextlib.contextmanager
def _recomputing(net: torch.nn.Module) -> Iterator[None]:
    """Set the ``training`` flag of each checkpointed layer.

    Transformers recomputes a layer only if that flag is set. The flags inside the layer stay off,
    so that dropout stays off.
    """
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
    """A linear layer that computes W·xᵀ for few input rows, as in a decoding step.

    For x·Wᵀ, the CPU's float32 matmul first re-packs all weights, which costs more than the product
    of a few rows. The ``naive`` arm of ``tests/benchmarks/rollout.py`` measures the difference.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if not 1 < len(rows) <= FEW_ROWS:
            return super().forward(x)
        out = (self.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
        if self.bias is None:
            return out
        return out + self.bias


def make_decoder(model: Model, dtype: torch.dtype) -> Model:
    """Return a model that samples like ``model`` and decodes faster.

    If ``dtype`` is not the model's, this is a copy in ``dtype``, which ``refresh_decoder`` updates:
    with float32 weights, autocast would cast every weight for every token. In float32 on a CPU, it
    has the same parameters in faster linear layers. Otherwise it is ``model`` itself.
    """
    if model.home is not None or getattr(model.net, "is_quantized", False):
        return model
    if dtype != model.net.dtype:
        return replace(model, net=copy.deepcopy(model.net).to(dtype).requires_grad_(False))
    if model.device.type != "cpu" or dtype != torch.float32:
        return model
    return replace(model, net=_with_faster_linears(model.net))


def _with_faster_linears(net: "CausalLM") -> "CausalLM":
    """Return a network with the same tensors, whose large linear layers are _ColumnsFirst."""
    same_tensors = {id(t): t for t in [*net.parameters(), *net.buffers()]}
    faster = copy.deepcopy(net, same_tensors)
    for parent in list(faster.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or child.weight.numel() < LARGE_WEIGHT:
                continue
            linear = _ColumnsFirst(
                child.in_features, child.out_features, child.bias is not None, device="meta"
            )
            linear.weight = child.weight
            linear.bias = child.bias
            setattr(parent, name, linear)
    return faster


@torch.no_grad()
def refresh_decoder(decoding: Model, student: Model) -> None:
    """Copy the student's weights into a decoding model that has its own."""
    if decoding.net.dtype != student.net.dtype:
        torch._foreach_copy_(list(decoding.net.parameters()), list(student.net.parameters()))


@torch.no_grad()
def average_teacher(teacher: Model, student: Model, share: float) -> None:
    """Update the teacher as the exponential moving average of the student.

    teacher ← share·teacher + (1 − share)·student, for every weight
    """
    for mean, p in zip(teacher.net.parameters(), student.net.parameters(), strict=True):
        mean.lerp_(p.to(mean.device), 1 - share)


def extrapolated_parameters(net: PreTrainedModel, modules: str) -> dict[str, Parameter]:
    """Return the parameters that are extrapolated, as named and ordered in the network.

    ``attention-mlp`` (the authors' choice): weights and biases of the decoder's linear layers and
    of fused experts. Embeddings, norms and the output head are excluded, also if the head lies in
    the decoder or is tied. ``all``: every parameter. Both exclude parameters that are not trained,
    so of a LoRA adapter its factors are extrapolated one by one. UserError: there are none.
    """
    if modules not in MODULES:
        raise ValueError(f"modules {modules!r}: one of {', '.join(MODULES)}")
    chosen = None if modules == "all" else _linear_parameters(net)
    parameters = {}
    for name, p in net.named_parameters():
        if p.requires_grad and (chosen is None or id(p) in chosen):
            parameters[name] = p
    if not parameters:
        raise UserError(
            f"{type(net).__name__} has no trained linear layer in its decoder, so there is nothing "
            "to extrapolate; use --extrapolate none"
        )
    return parameters


def _linear_parameters(net: PreTrainedModel) -> set[int]:
    """Return the ``id`` of each parameter of the decoder's linear layers, without the head."""
    from transformers.pytorch_utils import Conv1D

    linear: set[int] = set()
    for name, module in net.get_decoder().named_modules():
        fused_experts = _fused_experts(name, module)
        if fused_experts or isinstance(module, (torch.nn.Linear, Conv1D)):
            linear.update(id(p) for p in module.parameters(recurse=False))
    for module in (net.get_input_embeddings(), net.get_output_embeddings()):
        if module is not None:
            linear.difference_update(id(p) for p in module.parameters())
    return linear


def _fused_experts(name: str, module: torch.nn.Module) -> list[Parameter]:
    """Return a module's expert matrices [experts, in, out]; none for another module."""
    if not name.endswith("experts"):
        return []
    return [p for p in module.parameters(recurse=False) if p.dim() == 3]


def read_shape(model: Model, support: int | None = None) -> Shape:
    """Return the shape that the FLOP count needs, from the model's modules and config.

    ``support``: number of ids that the head computes logits for (None: all).
    """
    config = model.config
    share = 1.0
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        share = getattr(config, "num_experts_per_tok", experts) / experts
    trunk = adapted = 0.0
    for name, module in model.net.get_decoder().named_modules():
        size = _matrix_size(module)
        if ".lora_" in name:
            adapted += size
        elif ".experts." in f".{name}.":
            trunk += share * size
        else:
            trunk += size
        trunk += share * sum(p.numel() for p in _fused_experts(name, module))
    frozen = None
    if model.adapter_off:
        adapted = 0.0
    elif model.adapter is not None:
        frozen = round(trunk)
    rows, columns = model.net.get_output_embeddings().weight.shape
    head = min(rows, support or rows) * columns
    return Shape(
        trunk=round(trunk + adapted), head=head, attention=_attention_shape(config), frozen=frozen
    )


def _matrix_size(module: torch.nn.Module) -> int:
    """Return the number of weights of a linear layer; 0 for another module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        # a quantized weight is packed, so its number of elements is smaller
        return module.in_features * module.out_features
    if isinstance(module, Conv1D):
        return module.weight.numel()
    return 0


def _attention_shape(config: PreTrainedConfig) -> tuple[tuple[int, int | None], ...]:
    """Return width (heads × head size) and window (None: unlimited) of each layer's attention."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = heads * head_size
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:  # without layer types, a window applies to every layer
        return ((width, window or None),) * config.num_hidden_layers
    layers = []
    for kind in kinds:
        if kind == "sliding_attention":
            layers.append((width, window))
        else:
            layers.append((width, None))
    return tuple(layers)

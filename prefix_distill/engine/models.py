"""A network with its tokenizer, and what sampling and the loss need from both."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from ..errors import UserError
from ..maths.divergence import Head
from ..maths.extrapolation import MODULES
from . import adapter
from .decoding import FASTEST, Decoding
from .experts import fused_experts
from .kept_state import Blanks, forget_state
from .output_layer import Scaling, capture_head_input
from .rope import find_switch
from .transformers_names import enable_checkpointing, name_cache_argument, read_cache

if TYPE_CHECKING:
    from peft import PeftModel

    from .transformers_names import CausalLM


# fields of configs that bound the logits: Gemma and others, RecurrentGemma, xLSTM
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(kw_only=True)
class Model:
    """A causal language model in two parts, so that the head can run on taught positions only.

    ``generation_config``: the settings that came with the weights and are saved with them. The
    network's own are blank, so that none of them changes sampling. ``eos``: ids that end a turn.
    ``stop_ids``: ids at which responses end in training, which are saved as EOS ids (None: those of
    the generation config).
    ``shares_prompts``: several responses may follow one forward pass over their prompt, because
    ``sharing.check_sharing`` found that exact; ``trains_on_shared_prompts``: so are gradients.
    ``decoding``: how rows are decoded together, found by ``exactness.find_decoding``;
    ``plain_because``: why sampling could not use its lean loop or only in part.
    ``recomputes``: gradient checkpointing is on.
    ``support``: the head computes logits for the first so many ids (None: all). ``adapter``: peft's
    wrapper of ``net`` if a LoRA adapter is trained. ``adapter_off``: this model is ``net`` without
    its adapter. ``unreached``: the parameters that no text token reaches, which are frozen.
    ``whole_net``: the trunk is ``net`` up to its output layer, not its decoder alone. ``scaling``:
    what ``net`` does to its logits, if the config does not tell (``choose_trunk``). ``blanks``: the
    attributes in which ``net`` may keep state between calls. ``left_out``: a warning on files of
    the model that are not used. ``home``: the head's device, if the
    layers lie on several devices. ``scratch``: the folder of offloaded layers, which must exist as
    long as the model.
    """

    name: str
    net: "CausalLM"
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    eos: frozenset[int]
    stop_ids: frozenset[int] | None = None
    shares_prompts: bool = False
    trains_on_shared_prompts: bool = True
    decoding: Decoding = FASTEST
    plain_because: set[str] = field(default_factory=set)
    recomputes: bool = False
    support: int | None = None
    adapter: "PeftModel | None" = None
    adapter_off: bool = False
    unreached: frozenset[str] = frozenset()
    whole_net: bool = False
    scaling: Scaling | None = None
    blanks: Blanks = field(default_factory=dict)
    left_out: str | None = None
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
    def unreached_modules(self) -> list[str]:
        """Return the modules of which no text token reaches a parameter, for an adapter."""
        reached = set()
        for name, _ in self.net.named_parameters():
            if name not in self.unreached:
                reached.add(name.rpartition(".")[0])
        return sorted({name.rpartition(".")[0] for name in self.unreached} - reached)

    def train_weights(self) -> None:
        """Let every parameter that a text token reaches require a gradient."""
        for name, p in self.net.named_parameters():
            p.requires_grad_(name not in self.unreached)

    @property
    def vocabulary(self) -> int:
        """Return the number of ids that the head computes logits for."""
        if self.support is not None:
            return self.support
        return len(self.net.get_output_embeddings().weight)

    @property
    def id_limit(self) -> int:
        """Return the number of ids that both the embedding and the output layer have."""
        rows = len(self.net.get_output_embeddings().weight)
        embedding = self.net.get_input_embeddings()
        if isinstance(embedding, torch.nn.Embedding):
            rows = min(rows, len(embedding.weight))
        return rows

    @property
    def positions(self) -> int | None:
        """Return the longest sequence (prompt and response) in tokens; None if unlimited."""
        length = getattr(self.config, "max_position_embeddings", None)
        if length == -1:
            return None
        return length

    @property
    def rope_switch(self) -> int | None:
        """Return the length beyond which RoPE has other factors; None if there is none."""
        return find_switch(self.config)

    @property
    def encodes_prompt_once(self) -> bool:
        """Return whether scoring and training run a prompt once for all its samples.

        With gradient checkpointing they do not, because a layer that fills the KV cache cannot run
        twice.
        """
        return self.shares_prompts and self.trains_on_shared_prompts and not self.recomputes

    @property
    def prefills_once(self) -> bool:
        """Return whether sampling runs a prompt once for all its responses.

        ``generate`` then continues from a cache that it did not make, as between two stretches.
        """
        return self.shares_prompts and self.decoding.stretch is not None

    @property
    def is_full_precision(self) -> bool:
        """Return whether the network computes in float32, and not in half precision.

        The embedding tells: the first parameters may be of a tower that stays in float32. Under
        autocast, float32 weights compute in half precision.
        """
        if torch.is_autocast_enabled(self.device.type):
            return False
        return self.net.get_input_embeddings().weight.dtype == torch.float32

    def choose_tolerance(self, full: float, half: float) -> float:
        """Return ``full`` if the network is in full precision, else ``half``."""
        return full if self.is_full_precision else half

    def trunk(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states [B, T, D], after the last norm.

        There is no mask: padding lies on the right, where causal attention hides it.
        """
        with self.adapter_context(), self._checkpointing():
            hidden_BTD, _ = self._run_trunk(input_ids=ids_BT, use_cache=False)
        return hidden_BTD.to(self.device)

    def read_logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the network's own logits [B, T, V], without padding and without a cache."""
        self.forget_state()
        with self.adapter_context():
            output = self.net(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False
            )
        return output.logits

    def trunk_cached(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """Return the final hidden states of ``ids_BT`` and the KV cache after them.

        ``mask_BT`` also covers the tokens in ``cache``. Its zeros are padding on the left and have
        no position.
        """
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        cache_argument = {name_cache_argument(self._trunk_module.forward): cache}
        with self.adapter_context():
            hidden_BTD, output = self._run_trunk(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                use_cache=True,
                **cache_argument,
            )
        return hidden_BTD.to(self.device), read_cache(output)

    @property
    def _trunk_module(self) -> PreTrainedModel:
        """Return the module that computes the trunk."""
        if self.whole_net:
            return self.net
        return self.net.get_decoder()

    def _run_trunk(self, **inputs: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Return the final hidden states and the output of the module that computed them."""
        self.forget_state()
        if not self.whole_net:
            output = self.net.get_decoder()(**inputs)
            return output.last_hidden_state, output
        with capture_head_input(self.net) as captured:
            output = self.net(**inputs)
        return captured[0], output

    def forget_state(self) -> None:
        """Drop the state that the network keeps outside its KV cache from an earlier call."""
        forget_state(self.net, self.blanks)

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
        if self.scaling is not None:
            return Head(
                weight_VD=weight,
                bias_V=bias,
                scale=self.scaling.scale,
                softcap=self.scaling.softcap,
            )
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(self.config, "logits_scaling", None) or 1.0  # Granite divides
        softcap = None
        for name in SOFTCAPS:
            softcap = softcap or getattr(self.config, name, None)
        return Head(weight_VD=weight, bias_V=bias, scale=float(scale), softcap=softcap)


def with_checkpointing(model: Model) -> Model:
    """Return ``model`` with gradient checkpointing.

    UserError: the architecture does not support it.
    """
    try:
        enable_checkpointing(model.net)
    except ValueError:
        raise UserError(
            f"model {model.name}: {type(model.net).__name__} has no layer that can recompute its "
            f"activations in backward; {_describe_layers(model.net)} keeps those of its forward "
            "pass; omit --gradient-checkpointing"
        ) from None
    return replace(model, recomputes=True)


def _describe_layers(net: torch.nn.Module) -> str:
    """Return the name and the class of the first module in the longest list of modules."""
    longest = torch.nn.ModuleList([net])
    place = "the network"
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) > len(longest):
            longest, place = module, f"{name}.0"
    return f"{place} ({type(longest[0]).__name__})"


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
    the decoder or is tied. ``all``: every parameter. Both exclude parameters that are not trained.
    UserError: there are none.
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
    for name, module in net.named_modules():
        experts = fused_experts(name, module)
        if experts or isinstance(module, (torch.nn.Linear, Conv1D)):
            linear.update(id(p) for p in module.parameters(recurse=False))
    for module in (net.get_input_embeddings(), net.get_output_embeddings()):
        if module is not None:
            linear.difference_update(id(p) for p in module.parameters())
    return linear

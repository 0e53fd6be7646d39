"""Which weights of a network a LoRA adapter changes, and why it leaves others out.

peft's own ``all-linear`` knows linear layers only. Here a target is any matrix that a forward pass
over text uses: a linear layer, the stacked matrices of fused experts, or a router.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from .peft_names import try_name

ALL = "all-linear"
LINEAR, EXPERTS, ROUTER, EMBEDDING, MATRIX = "linear", "experts", "router", "embedding", "matrix"
BY_DEFAULT = (LINEAR, EXPERTS, ROUTER)  # the kinds that all-linear includes
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
SHOWN = 3  # most names in one message


@dataclass(frozen=True, kw_only=True)
class Site:
    """A weight tensor that an adapter can change.

    ``module``, ``tensor``: the names of the module and of its parameter. ``kind``: LINEAR, EXPERTS,
    ROUTER, EMBEDDING or MATRIX. ``is_layer``: peft wraps the module; otherwise it replaces the
    tensor during the module's forward pass. ``size``: number of weights.
    """

    module: str
    tensor: str
    kind: str
    is_layer: bool
    size: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.tensor}"

    @property
    def pattern(self) -> str:
        """Return the name with ``*`` for numbers, which is the same in every layer."""
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", self.name)

    def is_called(self, wanted: str) -> bool:
        """Return whether ``wanted`` is a suffix of the name, its module or a module around it."""
        parts = f".{wanted}."
        return parts in f".{self.name}."


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The weights that get an adapter, and the obstacle at each of the others."""

    sites: list[Site]
    obstacles: dict[str, str]
    others: list[Site]

    def without(self, faults: dict[str, str]) -> "Targets":
        """Return the targets without the patterns in ``faults``, whose values are obstacles."""
        kept = [site for site in self.sites if site.pattern not in faults]
        dropped = [site for site in self.sites if site.pattern in faults]
        obstacles = dict(self.obstacles)
        for site in dropped:
            obstacles[site.name] = faults[site.pattern]
        return Targets(sites=kept, obstacles=obstacles, others=self.others + dropped)

    @property
    def modules(self) -> list[str]:
        """Return the layers that peft wraps."""
        return [site.module for site in self.sites if site.is_layer]

    @property
    def tensors(self) -> list[str]:
        """Return the tensors that peft replaces during a forward pass."""
        return [site.name for site in self.sites if not site.is_layer]

    @property
    def covered(self) -> float:
        """Return the share of the matrices' weights that have an adapter.

        Embeddings, the head, and layers that no text token reaches do not count.
        """
        covered = sum(site.size for site in self.sites if site.kind != EMBEDDING)
        missed = 0
        for site in self.others:
            if site.kind != EMBEDDING and self.obstacles.get(site.name) != UNREACHED:
                missed += site.size
        if not covered + missed:
            return 0.0
        return covered / (covered + missed)

    def describe(self) -> str:
        """Describe the adapted weights: 8 linear layers, 4 expert tensors and 2 routers."""
        parts = []
        for kind, noun in (
            (LINEAR, "linear layer"),
            (EXPERTS, "expert tensor"),
            (ROUTER, "router"),
            (EMBEDDING, "embedding"),
            (MATRIX, "other matrix"),
        ):
            count = sum(site.kind == kind for site in self.sites)
            if count:
                plural = "other matrices" if kind == MATRIX else f"{noun}s"
                parts.append(f"{count} {noun if count == 1 else plural}")
        if len(parts) < 2:
            return "".join(parts)
        return f"{', '.join(parts[:-1])} and {parts[-1]}"

    def describe_obstacles(self) -> list[str]:
        """Return one line for each obstacle, with the names of the tensors at which it stands."""
        sites: dict[str, list[Site]] = {}
        for site in self.others:
            if site.name in self.obstacles:
                sites.setdefault(self.obstacles[site.name], []).append(site)
        lines = []
        for obstacle, stopped in sites.items():
            lines.append(f"no adapter on {_describe_sites(stopped)}: {obstacle}")
        return lines


HEAD = "the loss computes the logits from the output head itself"
TIED = "several layers share this tensor, which cannot hold a merged adapter of each"
UNREACHED = "a forward pass over text does not call this layer, so an adapter there has no effect"


def _describe_sites(sites: list[Site]) -> str:
    """Return the first patterns of ``sites``: a.*.weight, b.*.weight and 2 more."""
    patterns = list(dict.fromkeys(site.pattern for site in sites))
    text = ", ".join(patterns[:SHOWN])
    if len(patterns) > SHOWN:
        return f"{text} and {len(patterns) - SHOWN} more"
    return text


def find_targets(net: PreTrainedModel, wanted: str, ids_BT: torch.Tensor) -> Targets:
    """Return the targets that ``wanted`` names: ``all-linear`` and names, separated by commas.

    ``ids_BT``: a text, which shows what ``net`` runs. A name is that of a layer, a tensor or a
    module around them, or the end of one. ``all-linear`` leaves out what has an obstacle.
    UserError: a name matches nothing, or only what has an obstacle.
    """
    names = [name.strip() for name in wanted.split(",")]
    if "" in names:
        raise UserError(
            f"--lora-targets {wanted}: expected names separated by commas, got an empty name; use "
            f"{ALL}, or names such as q_proj,v_proj"
        )
    survey = _Survey(net, ids_BT)
    chosen: dict[str, Site] = {}
    obstacles: dict[str, str] = {}
    for name in names:
        for site in _match(survey, name):
            obstacle = survey.find_obstacle(site)
            if obstacle is None:
                chosen[site.name] = site
            else:
                obstacles[site.name] = obstacle
        if name != ALL:
            _check_name(survey, name, chosen=chosen, obstacles=obstacles)
    if not chosen:
        raise UserError(
            f"--lora-targets {wanted}: {type(net).__name__} has no weight that an adapter can "
            "change; omit --lora to train all weights"
        )
    # the order of the network fixes which random numbers a layer gets
    sites = [site for site in survey.sites if site.name in chosen]
    others = []
    for site in survey.sites:
        if site.name not in chosen and site.module != survey.head_name:
            others.append(site)
    return Targets(sites=sites, obstacles=obstacles, others=others)


def _match(survey: "_Survey", name: str) -> list[Site]:
    """Return the sites that a name of --lora-targets means."""
    if name != ALL:
        return [site for site in survey.sites if site.is_called(name)]
    return [
        site for site in survey.sites if site.kind in BY_DEFAULT and site.module != survey.head_name
    ]


def _check_name(
    survey: "_Survey", name: str, *, chosen: dict[str, Site], obstacles: dict[str, str]
) -> None:
    """Raise UserError if a name matches no site, or none without an obstacle."""
    matches = _match(survey, name)
    if not matches:
        raise UserError(
            f"--lora-targets {name}: no matrix of {type(survey.net).__name__} has this name; use "
            f"{ALL}, or names such as {', '.join(survey.leaves()[:6])}"
        )
    for site in matches:
        if site.name in chosen:
            return
    raise UserError(
        f"--lora-targets {name}: {matches[0].name} gets no adapter, because "
        f"{obstacles[matches[0].name]}; use {ALL}, or names such as "
        f"{', '.join(survey.leaves()[:6])}"
    )


class _Survey:
    """All weight tensors of a network that could have an adapter, and what stands against it."""

    def __init__(self, net: PreTrainedModel, ids_BT: torch.Tensor):
        self.net = net
        self.modules = dict(net.named_modules())
        self.head_name = ""
        head = net.get_output_embeddings()
        for name, module in self.modules.items():
            if module is head:
                self.head_name = name
        self.names: dict[int, list[str]] = {}  # a tensor's id → its names
        for name, p in net.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(p), []).append(name)
        self.called = _called_modules(net, ids_BT)
        self.refusals: dict[tuple[str, str], str | None] = {}
        self.sites = list(self._find_sites())

    def _find_sites(self) -> Iterator[Site]:
        quantized = getattr(self.net, "is_quantized", False)
        counted: set[int] = set()
        for module_name, module in self.modules.items():
            for tensor_name, p in module.named_parameters(recurse=False):
                kind = _find_kind(module, tensor_name, p)
                if kind is None or not module_name:
                    continue
                is_layer = kind == EMBEDDING or (
                    kind == LINEAR and (quantized or _multiplies_only(module))
                )
                if is_layer and self._peft_renames(module_name):
                    is_layer = False
                size = 0 if id(p) in counted else _count_weights(module, p)
                counted.add(id(p))
                yield Site(
                    module=module_name,
                    tensor=tensor_name,
                    kind=kind,
                    is_layer=is_layer,
                    size=size,
                )

    def leaves(self) -> list[str]:
        """Return the last names of the layers that can have an adapter."""
        leaves = []
        for site in self.sites:
            if site.kind in BY_DEFAULT and self.find_obstacle(site) is None:
                leaf = site.module.rpartition(".")[2]
                leaves.append(site.tensor if site.kind == EXPERTS else leaf)
        return list(dict.fromkeys(leaves))

    def find_obstacle(self, site: Site) -> str | None:
        """Return why this weight gets no adapter; None if nothing stands against it."""
        if site.module == self.head_name:
            return HEAD
        if not self._is_reached(site.module):
            return UNREACHED
        if site.kind != EMBEDDING:
            p = getattr(self.modules[site.module], site.tensor)
            if len(self.names[id(p)]) > 1:
                return TIED
        if site.is_layer:
            return self._ask_peft(site.module, "module")
        return self._ask_peft(site.module, "tensor")

    def _is_reached(self, name: str) -> bool:
        """Return whether a forward pass over text calls the module, or may call it.

        An expert that is a module of its own is called only if a token is routed to it. So a member
        of a list counts if another member was called.
        """
        if self.called is None:
            return True
        while name not in self.called:
            parent = name.rpartition(".")[0]
            if isinstance(self.modules[parent], torch.nn.ModuleList):
                siblings = [f"{parent}.{child}" for child, _ in self._children(parent)]
                if not self.called.isdisjoint(siblings):
                    return True
            if parent in self.called or not parent:
                return False
            name = parent
        return True

    def _children(self, name: str) -> Iterator[tuple[str, torch.nn.Module]]:
        return self.modules[name].named_children()

    def _peft_renames(self, module_name: str) -> bool:
        """Return whether peft takes this layer's name for the former name of fused experts.

        peft rewrites such names by the model's type. It then adapts the experts and leaves out a
        dense layer or a shared expert of that name. Naming the tensor avoids this.
        """
        return (
            self._ask_peft(module_name, "module") is not None
            and self._ask_peft(module_name, "tensor") is None
        )

    def _ask_peft(self, module_name: str, way: str) -> str | None:
        """Return why peft refuses this name in a model of this type; None if it accepts it."""
        leaf = module_name.rpartition(".")[2]
        if (leaf, way) not in self.refusals:
            self.refusals[leaf, way] = try_name(self.net.config, leaf, way)
        return self.refusals[leaf, way]


def _find_kind(module: torch.nn.Module, tensor: str, p: Parameter) -> str | None:
    """Return the kind of a parameter; None if it is no matrix."""
    if isinstance(module, torch.nn.Embedding):
        return EMBEDDING
    if isinstance(module, torch.nn.Linear | Conv1D):
        if tensor != "weight":
            return None
        return LINEAR
    if isinstance(module, CONVOLUTIONS) or not p.is_floating_point():
        return None
    if p.dim() == 3 and min(p.shape) > 1:
        return EXPERTS
    if p.dim() == 2:
        # a matrix of a module of its own is called weight; a bias of experts is not
        return ROUTER if tensor == "weight" else MATRIX
    return None


def _multiplies_only(module: torch.nn.Module) -> bool:
    """Return whether the module is a plain product with its weight, so that peft can wrap it."""
    return type(module).forward in (torch.nn.Linear.forward, Conv1D.forward)


def _count_weights(module: torch.nn.Module, p: Parameter) -> int:
    if isinstance(module, torch.nn.Linear):
        # a quantized weight is packed, so its number of elements is smaller
        return module.in_features * module.out_features
    return p.numel()


@torch.no_grad()
def _called_modules(net: PreTrainedModel, ids_BT: torch.Tensor) -> set[str] | None:
    """Return the names of the modules that a forward pass over ``ids_BT`` calls.

    None: it cannot run, as on shape-only tensors if a model's control flow depends on numbers.
    """
    called: set[str] = set()
    hooks = []
    for name, module in net.named_modules():
        hooks.append(module.register_forward_pre_hook(_Recorder(name, called)))
    try:
        net(input_ids=ids_BT, use_cache=False)
    except Exception:  # the checks of the forward pass report it
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return called


class _Recorder:
    """A hook that adds a module's name to a set."""

    def __init__(self, name: str, called: set[str]):
        self.name = name
        self.called = called

    def __call__(self, module: torch.nn.Module, arguments: Any) -> None:
        self.called.add(self.name)

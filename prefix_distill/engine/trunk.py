"""Find where a network's trunk ends, so that head(trunk) equals its logits."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..errors import UserError
from .device import is_out_of_memory
from .models import Model
from .output_layer import measure_scaling
from .text_ids import make_row
from .trace import describe_failure, name_noise, recording

# largest difference in nats between the model's logits and head(trunk)
LOGIT_TOLERANCE = 1e-3
LOGIT_TOLERANCE_OF_HALF_PRECISION = 0.25


def choose_trunk(model: Model) -> None:
    """Set ``model.whole_net`` and ``model.scaling`` so that head(trunk) equals the logits.

    The trunk is the decoder that transformers names, or else the whole network up to its output
    layer. What follows that layer is read from the config, or else measured. UserError: no trunk
    gives the logits, or they are not finite.
    """
    logits_NV = _compute_logits(model)
    gaps: dict[str, str] = {}
    for candidate in _candidates(model):
        try:
            gap = _measure_gap(candidate, logits_NV)
        except Exception as error:  # what is no trunk may raise anything
            difference = describe_failure(model.net, error)
        else:
            if gap <= model.choose_tolerance(LOGIT_TOLERANCE, LOGIT_TOLERANCE_OF_HALF_PRECISION):
                model.whole_net, model.scaling = candidate.whole_net, candidate.scaling
                return
            difference = f"{gap:.2g} nats"
        gaps.setdefault(_describe_trunk(candidate), difference)
    found = " and ".join(f"{trunk}: {gap}" for trunk, gap in gaps.items())
    raise UserError(
        f"model {model.name}: head(hidden states) does not equal its logits (difference in "
        f"log-probability by source of the states: {found}){_locate_gap(model)}; expected logits "
        "that are a linear layer, a scale and a softcap of hidden states; use another model"
    )


def _locate_gap(model: Model) -> str:
    """Return a clause on the tensor that shows why no trunk gives the logits, or nothing.

    It is the first that differs between two passes, or else the output layer's beside the logits.
    """
    allowed = model.choose_tolerance(LOGIT_TOLERANCE, LOGIT_TOLERANCE_OF_HALF_PRECISION)
    where = name_noise(model, allowed=allowed)
    if where:
        return f"; two passes over the same tokens give other logits{where}"
    with recording(model.net) as recorded:
        logits_NV = _compute_logits(model)
    head = _name_head(model)
    raw_NV = recorded[0].get((head, "output", 1))
    if raw_NV is None or raw_NV.shape[1] < logits_NV.shape[1]:
        return ""
    raw_NV = raw_NV[:, : logits_NV.shape[1]].to(logits_NV.device)
    i = int((raw_NV - logits_NV).abs()[0].argmax())
    raw, logit = raw_NV[0, i].item(), logits_NV[0, i].item()
    return f"; the output of {head} is {raw:.3g} for id {i}, where the logits have {logit:.3g}"


def _candidates(model: Model) -> Iterator[Model]:
    """Yield the model with each trunk and each scaling, the usual ones first."""
    yield replace(model, whole_net=False, scaling=None)
    yield replace(model, whole_net=True, scaling=None)
    with model.adapter_context():
        try:
            scaling = measure_scaling(model.net, make_row(model, 8))
        except Exception:  # a network may compute anything with its logits
            return
    yield replace(model, whole_net=False, scaling=scaling)
    yield replace(model, whole_net=True, scaling=scaling)


def check_head(model: Model) -> float:
    """Return the largest difference between head(trunk) and the model's logits, in nats.

    UserError: they differ too much, so that the loss would train another distribution.
    """
    gap = _measure_gap(model, _compute_logits(model))
    allowed = model.choose_tolerance(LOGIT_TOLERANCE, LOGIT_TOLERANCE_OF_HALF_PRECISION)
    if gap > allowed:
        raise UserError(
            f"model {model.name}: head(hidden states) does not equal its logits: the "
            f"log-probabilities differ by {gap:.2g} nats, expected at most {allowed:g}; use "
            "another model"
        )
    return gap


@torch.no_grad()
def _compute_logits(model: Model) -> torch.Tensor:
    """Return the network's own logits [T, V] of a few tokens.

    UserError: they cannot be computed from tokens alone, or are not finite.
    """
    ids_BT = make_row(model, 8)
    try:
        logits_NV = model.read_logits(ids_BT)[0, :, : model.support].float()
    except Exception as error:  # a network may raise anything
        if is_out_of_memory(error):
            raise
        dtype = str(model.net.dtype).removeprefix("torch.")
        hint = "expected a language model that reads tokens alone; use another model"
        if model.net.dtype != torch.float32:
            hint += ", or --dtype float32"
        raise UserError(
            f"model {model.name}: a forward pass over tokens in {dtype} gives no logits "
            f"({describe_failure(model.net, error)}); {hint}"
        ) from None
    if not torch.isfinite(logits_NV).all():
        raise UserError(
            f"model {model.name}: its logits contain NaN or infinity; use an intact copy or "
            "--dtype float32"
        )
    return logits_NV


@torch.no_grad()
def _measure_gap(model: Model, logits_NV: torch.Tensor) -> float:
    """Return the largest difference between head(trunk) and the logits in log-probability."""
    row_BT = make_row(model, 8)
    hidden_BTD = model.trunk(row_BT)
    if hidden_BTD.dim() != 3 or hidden_BTD.shape[:2] != row_BT.shape:
        raise ValueError(f"shape {list(hidden_BTD.shape)}, expected [1, {row_BT.shape[1]}, D]")
    ours_NV = model.head().logits(hidden_BTD[0])
    theirs_NV = logits_NV.to(ours_NV.device)
    return (ours_NV.log_softmax(-1) - theirs_NV.log_softmax(-1)).abs().max().item()


def _describe_trunk(model: Model) -> str:
    net = model.net
    if not model.whole_net:
        return f"its decoder ({type(net.get_decoder()).__name__})"
    return f"the input of {_name_head(model)}"


def _name_head(model: Model) -> str:
    layer = model.net.get_output_embeddings()
    names = [name for name, module in model.net.named_modules() if module is layer]
    return names[0]

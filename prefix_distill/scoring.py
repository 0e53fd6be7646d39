"""Both models read the rollouts → for every taught token one hidden row per model. The only causal shift in the code."""

import torch

from .models import Model
from .rollout import Rollout


def sequences(rollouts: list[Rollout], teacher: bool = False) -> tuple[list[tuple[int, ...]], list[int]]:
    """What a model reads, and how many prompt tokens of it come first, per rollout.

    The response's last token is not read: nothing is predicted from it.
    """
    sides = [(r.teacher_prompt, r.teacher_ids) if teacher else (r.student_prompt, r.ids) for r in rollouts]
    return [prompt + ids[:-1] for prompt, ids in sides], [len(prompt) for prompt, _ in sides]


def hidden_rows(model: Model, rollouts: list[Rollout], teacher: bool = False) -> torch.Tensor:
    """Hidden rows [N, D] that predict the response tokens, rollout by rollout, token by token.

    Row for response token t is the hidden state at position t − 1: the shift. Rows are right-padded, so positions and
    causal attention need no correction and padding cannot reach a taught row.
    """
    read, prompts = sequences(rollouts, teacher)
    width = max(map(len, read))
    ids_BT = torch.zeros(len(read), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    taught_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(zip(read, prompts)):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
        taught_BT[row, prompt - 1 : len(ids)] = True
    device = model.device
    if device.type == "cuda":
        ids_BT, mask_BT, taught_BT = (t.pin_memory() for t in (ids_BT, mask_BT, taught_BT))
    ids_BT, mask_BT, taught_BT = (t.to(device, non_blocking=True) for t in (ids_BT, mask_BT, taught_BT))
    return model.trunk(ids_BT, mask_BT)[taught_BT]


def tokens(rollouts: list[Rollout]) -> torch.Tensor:
    """The realised response tokens [N], in the order of ``hidden_rows``."""
    return torch.tensor([token for r in rollouts for token in r.ids])


def micro_batches(rollouts: list[Rollout], size: int) -> list[list[Rollout]]:
    """Rollouts in groups of ``size``, longest sequence first so that neighbours need little padding; ties keep order."""
    order = sorted(rollouts, key=lambda r: (-len(r.student_prompt) - len(r.ids), r.prompt, r.sample))
    return [order[start : start + size] for start in range(0, len(order), size)]

"""Both models read the rollouts → for every taught token one hidden row per model. The only
causal shift in the code."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..maths import simct
from ..maths.divergence import Terms
from ..maths.flops import linear_tokens
from ..maths.fused import statistics
from ..maths.simct import Support, Units
from .alignment import Shared
from .models import Model
from .ranks import Place
from .rollout import Rollout

PADDING = 0.1  # largest share of padding among the tokens a micro-batch runs
# probability of the student's first token under the teacher, below which prompts may not match
FIRST_TOKEN = 0.01


def sequences(
    rollouts: list[Rollout], teacher: bool = False
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The prompt and the part of the response that a model reads, per rollout.

    The last taught token is not read, nor what follows: nothing that is taught is predicted from
    it.
    """
    return (
        [r.teacher_prompt if teacher else r.student_prompt for r in rollouts],
        [(r.teacher_ids if teacher else r.ids)[: r.extent(teacher) - 1] for r in rollouts],
    )


def hidden_rows(model: Model, rollouts: list[Rollout], teacher: bool = False) -> torch.Tensor:
    """Hidden rows [N, D] that predict the taught response tokens, rollout by rollout, token by
    token.

    Row for response token t is the hidden state at position t − 1: the shift. A prompt that several
    rollouts answer is read once where the model allows it: its KV cache is repeated for them,
    gradients add up in it.
    """
    prompts, responses = sequences(rollouts, teacher)
    if model.reads_once and len(set(prompts)) < len(prompts):
        hidden_BTD, first = _behind_shared_prompts(model, prompts, responses), [0] * len(prompts)
    else:
        ids_BT = right_padded([p + r for p, r in zip(prompts, responses, strict=True)])
        hidden_BTD, first = (
            model.trunk(to_device(ids_BT, model.device)),
            [len(p) - 1 for p in prompts],
        )
    taught_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.bool)
    for row, start, rollout in zip(taught_BT, first, rollouts, strict=True):
        row[start + torch.tensor(rollout.rows(teacher), dtype=torch.long)] = True
    return hidden_BTD[to_device(taught_BT, model.device)]


def _behind_shared_prompts(
    model: Model, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]
) -> torch.Tensor:
    """Hidden states [B, 1 + T, D]: the prompt's last one, then those of the response. Every
    distinct prompt is read once.

    Prompts are padded on the left and responses on the right, so nothing lies between them and
    sliding windows count right; what a response's padding sees, nobody sees.
    """
    distinct = list(dict.fromkeys(prompts))
    width = max(map(len, distinct))
    ids_UT = torch.tensor([(0,) * (width - len(p)) + p for p in distinct])
    mask_UT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct])
    ids_UT, mask_UT = to_device(ids_UT, model.device), to_device(mask_UT, model.device)
    which_B = to_device(torch.tensor([distinct.index(p) for p in prompts]), model.device)
    hidden_UTD, cache = model.trunk_cached(ids_UT, mask_UT)
    last_B1D = hidden_UTD[which_B, -1:]
    ids_BT = to_device(right_padded(responses), model.device)
    if not ids_BT.shape[1]:
        return last_B1D
    cache.batch_select_indices(which_B)
    mask_BT = torch.cat([mask_UT[which_B], torch.ones_like(ids_BT)], 1)
    return torch.cat([last_B1D, model.trunk_cached(ids_BT, mask_BT, cache)[0]], 1)


def right_padded(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Ids [B, T] on the CPU, zeros to the right of short rows."""
    width = max(map(len, rows))
    return torch.tensor([row + (0,) * (width - len(row)) for row in rows], dtype=torch.long).view(
        len(rows), width
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device`` that does not wait for it."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def tokens(rollouts: list[Rollout]) -> torch.Tensor:
    """The realised taught tokens [N], in the order of ``hidden_rows``."""
    return torch.tensor([r.ids[t] for r in rollouts for t in r.taught])


@torch.no_grad()
def check_sharing(model: Model) -> str | None:
    """None when responses read behind a shared prompt get the hidden states they get alone; else
    why they do not.

    Two prompts and five responses of different lengths, in the model's own dtype.
    """
    ids = (sorted(model.tokenizer.get_vocab().values()) * 40)[:40]
    made = [
        (tuple(ids[:p]), tuple(ids[p : p + n]))
        for p, n in ((7, 4), (7, 9), (12, 6), (7, 1), (12, 9))
    ]
    group = [
        Rollout(i, 0, prompt, prompt, response, response, False)
        for i, (prompt, response) in enumerate(made)
    ]
    apart = [hidden_rows(replace(model, shares_prompts=False), [r]) for r in group]
    try:
        together = hidden_rows(replace(model, shares_prompts=True), group)
    except Exception as error:
        # an architecture may lack the cache, the mask or the positions, and say so in any way
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    alone = torch.cat(apart).float()
    gap = ((together.float() - alone).norm() / alone.norm()).item()
    allowed = 1e-5 if model.net.dtype == torch.float32 else 0.03
    return (
        None
        if gap <= allowed
        else f"hidden states behind a shared prompt differ by {gap:.1g} of their norm"
    )


def head_rows(
    model: Model,
    rollouts: list[Rollout],
    shared: Support | None,
    teacher: bool,
    whole: bool = False,
) -> float:
    """Rows that the model's head projects once for the loss on ``rollouts``, in rows of its whole
    vocabulary (what the ledger counts); ``whole``: for statistics."""
    if shared is None:
        return sum(len(r.taught) for r in rollouts)
    columns = len(shared.teacher if teacher else shared.student)
    return unit_head_rows(rollouts, columns, model.vocabulary, teacher, whole)


def reads(
    rollouts: list[Rollout], shared: bool, teacher: bool = False
) -> list[tuple[int, list[int]]]:
    """(prompt length, lengths of the responses behind it, up to the last taught token) for every
    prompt that is read, in tokens: each distinct one once when ``shared``, else one per rollout.
    What the ledger counts."""
    behind: dict = {}
    for i, r in enumerate(rollouts):
        prompt = r.teacher_prompt if teacher else r.student_prompt
        behind.setdefault(prompt if shared else (i, prompt), (len(prompt), []))[1].append(
            r.extent(teacher)
        )
    return list(behind.values())


def micro_batches(rollouts: list[Rollout], size: int, shared: bool) -> list[list[Rollout]]:
    """Rollouts in groups of at most ``size`` with at most a tenth of padding in the student's
    linear layers.

    Two orders are tried, and the one that runs fewer tokens is taken: the samples of a prompt
    together (worth it when it is read once for them, ``shared``), or all rollouts by length.
    Nothing here depends on more than the rollouts.
    """
    by_prompt = sorted(
        rollouts, key=lambda r: (-len(r.student_prompt), r.prompt, -r.extent(), r.sample)
    )
    by_length = sorted(
        rollouts, key=lambda r: (-len(r.student_prompt) - r.extent(), r.prompt, r.sample)
    )
    plans = [_split(order, size, shared) for order in (by_prompt, by_length)]
    return min(
        plans, key=lambda groups: sum(linear_tokens(reads(group, shared))[1] for group in groups)
    )


def _split(order: list[Rollout], size: int, shared: bool) -> list[list[Rollout]]:
    groups: list[list[Rollout]] = []
    for rollout in order:
        if groups and len(groups[-1]) < size:
            useful, executed = linear_tokens(reads([*groups[-1], rollout], shared))
            if useful >= (1 - PADDING) * executed:
                groups[-1].append(rollout)
                continue
        groups.append([rollout])
    return groups


@dataclass(frozen=True)
class Reading:
    """Both models' hidden rows of rollouts that were read before their tokens were chosen: the
    student's [N, D] with their graph, the teacher's [N, E], for all taught tokens of ``rollouts``,
    in their order."""

    rollouts: list[Rollout]
    student_ND: torch.Tensor
    teacher_NE: torch.Tensor

    def only(self, kept: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the tokens that are still taught; ``kept``: the same rollouts in the same
        order."""
        return (
            self._only(kept, self.student_ND, teacher=False),
            self._only(kept, self.teacher_NE, teacher=True),
        )

    def _only(self, kept: list[Rollout], hidden: torch.Tensor, teacher: bool) -> torch.Tensor:
        """Return one model's rows of ``hidden`` for the tokens taught in ``kept``."""
        rows: list[int] = []
        start = 0
        for before, after in zip(self.rollouts, kept, strict=True):
            place = {t: start + i for i, t in enumerate(before.rows(teacher))}
            rows += [place[t] for t in after.rows(teacher)]
            start += len(place)
        return hidden[to_device(torch.tensor(rows, dtype=torch.long), hidden.device)]


def positions(
    rollouts: list[Rollout], facts: dict[str, torch.Tensor]
) -> dict[tuple[int, int], dict[str, dict[int, float]]]:
    """Statistics per row → (prompt, sample) → name → position → number."""
    parts = {
        name: values.split([len(r.taught) for r in rollouts]) for name, values in facts.items()
    }
    return {
        (r.prompt, r.sample): {
            name: dict(zip(r.taught, split[i].tolist(), strict=True))
            for name, split in parts.items()
        }
        for i, r in enumerate(rollouts)
    }


def row_statistics(  # noqa: PLR0913  both models with their inputs
    terms: Terms,
    student: Model,
    student_ND: torch.Tensor,
    teacher: Model,
    teacher_NE: torch.Tensor,
    shared: Support | None,
    rollouts: list[Rollout],
    forward: bool,
) -> dict[str, torch.Tensor]:
    """``fused.statistics`` of hidden rows that were read; across tokenizers (``shared``)
    ``simct.statistics``, per unit."""
    if shared is None:
        return statistics(
            terms, student_ND, student.head(), teacher_NE, teacher.head(), tokens(rollouts), forward
        )
    return simct.statistics(
        terms,
        shared,
        units_of(rollouts),
        student_ND,
        student.head(),
        teacher_NE,
        teacher.head(),
        forward,
    )


@torch.no_grad()
def token_statistics(  # noqa: PLR0913  both models, their inputs and a callback
    terms: Terms,
    student: Model,
    teacher: Model,
    shared: Support | None,
    rollouts: list[Rollout],
    place: Place,
    rows: int,
    spent: Callable[[list[Rollout]], None] | None = None,
    forward: bool = False,
) -> dict[tuple[int, int], dict[str, dict[int, float]]]:
    """``row_statistics`` of this rank's rollouts, ``rows`` of them at a time → (prompt, sample) →
    name → position → number, for the taught tokens (units). ``spent(group)`` is told what both
    models read."""
    found: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    for group in micro_batches(rollouts, rows, student.reads_once):
        with place.autocast(student.device):
            ours = hidden_rows(student, group)
        with place.autocast(teacher.device):
            theirs = hidden_rows(teacher, group, teacher=True)
        found |= positions(
            group, row_statistics(terms, student, ours, teacher, theirs, shared, group, forward)
        )
        if spent is not None:
            spent(group)
    return found


def shared_support(
    shared: Shared, mode: str, student_device: torch.device, teacher_device: torch.device
) -> Support:
    """O as tensors."""
    return Support(
        torch.tensor(shared.student + shared.student_eos, device=student_device),
        torch.tensor(shared.teacher + shared.teacher_eos, device=teacher_device),
        len(shared.student),
        mode == "simct-released",
    )


@dataclass
class _UnitRows:
    """One model's part of ``Units`` during its construction: the first row and token of every unit,
    and row, span and id of every token in a span."""

    first: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)
    id: list[int] = field(default_factory=list)
    rows: int = 0

    def add_exact(self, ids: tuple[int, ...]) -> None:
        """Add a unit of one token."""
        self.first.append(self.rows)
        self.token.append(ids[0])
        self.rows += 1

    def add_span(self, ids: tuple[int, ...], span: int) -> None:
        """Add the tokens of span number ``span``."""
        self.first.append(self.rows)
        self.token.append(ids[0])
        self.row.extend(range(self.rows, self.rows + len(ids)))
        self.span.extend([span] * len(ids))
        self.id.extend(ids)
        self.rows += len(ids)


def units_of(rollouts: list[Rollout]) -> Units:
    """The taught units of ``rollouts``, rollout by rollout."""
    student, teacher = _UnitRows(), _UnitRows()
    kinds: list[bool] = []
    spans = 0
    for r in rollouts:
        for u in r.taught_units:
            ours = r.ids[u.start : u.start + u.size]
            theirs = r.teacher_ids[u.teacher_start : u.teacher_start + u.teacher_size]
            kinds.append(u.exact)
            if u.exact:
                student.add_exact(ours)
                teacher.add_exact(theirs)
            else:
                student.add_span(ours, spans)
                teacher.add_span(theirs, spans)
                spans += 1
    exact = torch.tensor(kinds, dtype=torch.bool)
    return Units(
        _both(student.first, teacher.first),
        exact.nonzero()[:, 0],
        (~exact).nonzero()[:, 0],
        _both(student.row, teacher.row),
        _both(student.span, teacher.span),
        _both(student.id, teacher.id),
        _both(student.token, teacher.token),
    )


def _both(student: list[int], teacher: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(student, dtype=torch.long), torch.tensor(teacher, dtype=torch.long)


def unit_head_rows(
    rollouts: list[Rollout], columns: int, vocabulary: int, teacher: bool, whole: bool = False
) -> float:
    """Rows of its head that a model runs forward for the loss, in rows of the whole vocabulary;
    ``whole``: for ``statistics``."""
    exact = sum(u.exact for r in rollouts for u in r.taught_units)
    spans = [
        u.teacher_size if teacher else u.size
        for r in rollouts
        for u in r.taught_units
        if not u.exact
    ]
    return (exact if whole else exact * columns / vocabulary) + len(spans) + sum(spans)

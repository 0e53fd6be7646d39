"""Student and teacher: memory, alignment, coverage."""

import contextlib

from .. import config as configuration
from ..config import Config
from ..engine import scoring
from ..engine.alignment import Alignment, census, shares
from ..engine.device import memory_free
from ..engine.models import Model
from ..engine.ranks import Place
from ..engine.rollout import Rollout
from ..errors import PreflightError, UserError
from ..lab.task import LAB
from ..maths.divergence import Terms
from ..maths.schedule import parse_off_policy
from ..maths.weights import parse_window
from ..plugins import load_plugins
from ..prompts.prompt import Rendered

TASK = "choice"  # the embedded default: lab:choice and its pair


def fill_in(config: Config) -> tuple[Config, list[str]]:
    """Puts the embedded pair and its task where no student, teacher or data set is given, and
    says so."""
    notes = []
    own = config.models.teacher == configuration.SELF
    for section, key, value in (
        ("models", "student", f"{LAB}{TASK}/student{'-told' if own else ''}"),
        ("models", "teacher", f"{LAB}{TASK}/teacher"),
        ("data", "dataset", LAB + TASK),
    ):
        if getattr(getattr(config, section), key) is None:
            config = configuration.replace(config, **{section: {key: value}})
            notes.append(f"{key} {value}: none was given, so it comes from the embedded laboratory")
    # again: another config may have been built since this one
    notes += [plugin.describe() for plugin in load_plugins(config.runtime.plugin)]
    return config, notes


@contextlib.contextmanager
def as_preflight_error():
    """What is wrong here is no setting or file by itself: the parts do not go together."""
    try:
        yield
    except UserError as error:
        raise PreflightError(str(error)) from None


def spread_limit(config: Config, where: Place, notes: list[str]) -> int | None:
    """Bytes of each device that --teacher-device auto may fill; None where the teacher is in one
    place."""
    if config.runtime.teacher_device != "auto":
        return None
    if where.world > 1:
        raise UserError(
            f"--teacher-device auto with {where.world} ranks: it spreads one teacher over all "
            "GPUs; start one rank, or leave it out"
        )
    if config.runtime.teacher_memory is not None:
        limit = int(config.runtime.teacher_memory * 2**30)
    else:
        limit = (memory_free(where.device) or 8 << 30) // 2
    notes.append(
        "teacher's layers spread over "
        f"{'all GPUs' if where.device.type == 'cuda' else where.device.type}, up to "
        f"{limit / 2**30:.3g} GiB of each, then main memory, then disk"
    )
    return limit


def check_alignment(config: Config, notes: list[str]) -> Config:
    """What a loss on units does not know is refused."""
    estimator, _ = configuration.parse_estimator(config.divergence.estimator)
    off_policy, window = (
        parse_off_policy(config.rollout.off_policy),
        parse_window(config.weights.window),
    )
    ranked = config.weights.select not in ("all", "random") or (
        window is not None and window.statistic is not None
    )
    for wrong, got, instead in (
        (
            estimator != "full",
            f"--estimator {config.divergence.estimator}",
            "units are compared on all shared tokens: use full",
        ),
        (
            config.divergence.clip is not None,
            "--clip",
            "the clip is of one vocabulary: leave it out",
        ),
        (
            config.rollout.eos == "teacher",
            "--eos teacher",
            "its ids are not the student's: leave it out",
        ),
        (
            off_policy is not None and off_policy.loss == "sft" and ranked,
            "--off-policy sft with a ranked selection",
            "text without units cannot be ranked: use random, a window by position, or "
            "--off-policy divergence",
        ),
    ):
        if wrong:
            raise UserError(f"{got} with different tokenizers: {instead}")
    notes.append("rollouts stop at the student's end-of-sequence ids: the teacher's are its own")
    return configuration.replace(config, rollout={"eos": "student"})


def measure_coverage(
    alignment: Alignment, rendered: list[Rendered], notes: list[str], warnings: list[str]
) -> float:
    """Says how the text of some prompts aligns → the teacher's tokens per token of the student's
    in it."""
    contents = [r.prompt.messages[-1]["content"] for r in rendered[:64]]
    texts = [alignment.student.encode(content) for content in contents]
    share = shares(
        [
            census(
                alignment.rollout(Rollout(i, 0, (), (), ids, (), False))
                for i, ids in enumerate(texts)
                if ids
            )
        ]
    )
    if share["exact_share"] < 0.5:
        warnings.append(
            f"only {share['exact_share']:.0%} of the student's tokens have a counterpart of the "
            "same bytes in the teacher's tokenization: little can be taught by --cross-tokenizer "
            "strict"
        )
    notes.append(
        f"in the text of {len(texts)} prompts {share['exact_share']:.1%} of the student's tokens "
        f"align one to one, {share['span_share']:.1%} in spans, {share['dropped_share']:.1%} not "
        "at all (the end of each text counts as cut)"
    )
    return sum(len(alignment.teacher.encode(content)) for content in contents) / max(
        1, sum(map(len, texts))
    )


def describe_privileged_text(
    teacher: Model, rendered: list[Rendered], where: Place, warnings: list[str]
) -> str:
    """Does what the teacher alone sees help it? Its log-probability of that very text as the
    answer, behind its own prompt and behind the student's, nats per token."""
    found = []
    for ids in ("teacher_ids", "student_ids"):
        reads = []
        for i, r in enumerate(rendered):
            prompt, text = (
                getattr(r, ids),
                tuple(teacher.tokenizer(r.prompt.privileged, add_special_tokens=False).input_ids),
            )
            text = text[: max(1, (teacher.positions or len(prompt) + len(text)) - len(prompt))]
            reads.append(Rollout(i, 0, prompt, prompt, text, text, False))
        facts = scoring.token_statistics(
            Terms("reverse-kl", dtype=where.head_dtype), teacher, teacher, None, reads, where, 1
        )
        values = [v for row in facts.values() for v in row["teacher_logp"].values()]
        found.append(sum(values) / len(values))
    if found[0] <= found[1]:
        warnings.append(
            "the teacher makes no use of what --privileged-column shows it: it finds that text no "
            f"more likely for having it in its prompt ({found[0]:.3g} nats per token against "
            f"{found[1]:.3g})"
        )
    return (
        f"privileged prompt: of what it is shown, the teacher's log-probability is {found[0]:.3g} "
        f"nats per token behind its own prompt, {found[1]:.3g} behind the student's"
    )


def named(model: Model, ids) -> str:
    """Ids with their tokens: ``<|end|> (1)``."""
    return ", ".join(f"{model.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in sorted(ids))

"""How the responses of a model are batched so that every sample is exact."""

from dataclasses import dataclass
from typing import Literal

from ..maths.flops import STRETCH


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How rows are decoded together.

    ``batch``: what prompts may share a batch: of any length, with padding on the left; of equal
    length; or none. ``stretch``: rows that have ended leave the batch after so many tokens; None if
    they stay until all rows have ended. `exactness.find_decoding` finds what a model allows.
    """

    batch: Literal["padded", "equal", "single"] = "padded"
    stretch: int | None = STRETCH
    loop: Literal["lean", "plain"] = "lean"

    def can_share(self, length: int, other: int) -> bool:
        """Return whether prompts of these lengths, in tokens, may share a batch."""
        if self.batch == "equal":
            return length == other
        return self.batch == "padded"

    def restrictions(self, model: str) -> list[str]:
        """Return what keeps the samples of ``model`` exact, as notes; none for the fastest way."""
        if self.batch == "single":
            return [f"{model} decodes every row alone: in a batch its logits change"]
        notes = []
        if self.loop == "plain":
            notes.append(
                f"{model} decodes with generate's own loop: the lean one changes its logits"
            )
        if self.batch == "equal":
            notes.append(
                f"{model} decodes prompts of equal length together: padding changes its logits"
            )
        if self.stretch is None:
            notes.append(
                f"{model} keeps rows that have ended in the batch: its logits change when decoding "
                "stops and continues"
            )
        return notes


FASTEST = Decoding()
# from the fastest to the most conservative
WAYS = (
    FASTEST,
    Decoding(loop="plain"),
    Decoding(batch="equal"),
    Decoding(stretch=None),
    Decoding(batch="equal", stretch=None),
    Decoding(batch="single", stretch=None),
)

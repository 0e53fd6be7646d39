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

    def can_share(self, length: int, other: int) -> bool:
        """Return whether prompts of these lengths, in tokens, may share a batch."""
        if self.batch == "equal":
            return length == other
        return self.batch == "padded"

    def describe(self) -> str:
        """Return the restrictions, for a note; empty if there are none."""
        restrictions = []
        if self.batch == "equal":
            restrictions.append("only prompts of equal length share a batch")
        if self.batch == "single":
            restrictions.append("every row is decoded alone")
        elif self.stretch is None:
            restrictions.append("rows that have ended stay in the batch")
        return ", ".join(restrictions)


FASTEST = Decoding()
# from the fastest to the most conservative
WAYS = (
    FASTEST,
    Decoding(batch="equal"),
    Decoding(stretch=None),
    Decoding(batch="equal", stretch=None),
    Decoding(batch="single", stretch=None),
)

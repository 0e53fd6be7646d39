"""Schedule --prefix cosine:L0:L1:K: L0 to L1 tokens over K steps, along half a cosine."""

import math

from prefix_distill import register_schedule


@register_schedule("cosine")
def make(arguments, limit):
    first, last, steps = map(int, arguments)

    def length(step):
        share = (1 - math.cos(math.pi * min(step / steps, 1))) / 2
        return round(first + share * (last - first))

    return length

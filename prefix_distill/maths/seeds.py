"""Seeds that depend on every part of a name."""

import hashlib


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part: ``seed_of(seed, step, prompt, sample)``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

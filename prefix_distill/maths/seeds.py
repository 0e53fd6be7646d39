"""Seeds that depend on every part of a name."""

import hashlib


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part: ``seed_of(seed, step, prompt, sample)``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

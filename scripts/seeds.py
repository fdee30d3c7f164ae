"""Seeds that are named by what they are for."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, alike in every process (Python's own ``hash`` is not)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

"""A held-out part that stays the same whatever else is in the text."""

import hashlib


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out ``fraction``: by its own hash alone, whatever else is in the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < fraction

"""A held-out part that stays the same whatever else is in the text."""

import hashlib
from collections.abc import Sequence

from deepspeed_sdp.errors import DataError


def split_documents(documents: Sequence[str], holdout_fraction: float = 0.05) -> tuple[list[str], list[str]]:
    """``(train, heldout)``. A document is held out by its own hash alone, so equal documents never fall on both sides.

    Where that leaves a side empty (few documents), documents are cut by position instead: the end of each is held out.

    Raises:
        DataError: the text is too short to hold anything out.
    """
    heldout = [text for text in documents if is_heldout(text, holdout_fraction)]
    train = [text for text in documents if not is_heldout(text, holdout_fraction)]
    if train and heldout:
        return train, heldout
    cuts = [len(text) - max(1, round(len(text) * holdout_fraction)) for text in documents]
    train = [text[:cut] for text, cut in zip(documents, cuts, strict=True) if cut > 0]
    heldout = [text[cut:] for text, cut in zip(documents, cuts, strict=True) if cut > 0]
    if not train or not heldout:
        raise DataError(f"text: {sum(map(len, documents))} characters are too few to hold a part out for validation")
    return train, heldout


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out ``fraction``: by its own hash alone, whatever else is in the text."""
    return _draw(text) < fraction


def _draw(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

"""What the texts for services have in common."""

from __future__ import annotations


def is_utf8(text: str) -> bool:
    """Whether a path or argument can be written down: a name of other bytes has half surrogate pairs for them."""
    return not any("\ud800" <= character <= "\udfff" for character in text)

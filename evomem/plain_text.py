"""Base: text in which no character does more than be seen, whoever wrote it."""

from __future__ import annotations

_KEPT = "\n\t"
_FORMATTING = (0x61C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_HIDDEN = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), *_FORMATTING)
    if chr(code) not in _KEPT
}
"""Control characters, marks that turn the direction of writing, and separators of lines, as Python writes them."""


def plain(text: str) -> str:
    """Return a text with the characters spelled out that would move a terminal's cursor, or turn or hide other text."""
    return text.translate(_HIDDEN)

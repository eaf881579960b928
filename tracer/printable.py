"""Text of a capture or a trace as a terminal may show it.

Model names, messages and tokens are other people's text: a control character or an escape sequence in it could move
the cursor, rename the window or hide a line of what is printed.
"""

from __future__ import annotations

import unicodedata
from typing import Final

__all__ = ["printable"]

KEPT: Final = "\n\t"
HIDDEN: Final = ("Cc", "Cs")
"""Unicode categories: control characters, and halves of a pair, which no output can encode."""
TURNING: Final = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the direction in which what follows is shown."""
BREAKS: Final = "\u2028\u2029"


def printable(text: str) -> str:
    r"""The text with control characters as escapes (`\u001b`), as JSON has them; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(f"\\u{ord(char):04x}" if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    if char in KEPT:
        return False
    return unicodedata.category(char) in HIDDEN or char in TURNING or char in BREAKS

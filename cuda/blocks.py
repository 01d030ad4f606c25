"""How much of a map of pairs the torch references hold at once."""

from __future__ import annotations

# 32 MiB of float32. Of at least this size glibc takes memory from the system and gives it back; smaller blocks of a loop
# may be taken one behind the other, so that all of them together stay in memory.
_BLOCK_ELEMENTS = 1 << 23


def rows_at_once(elements: int) -> int:
    """Rows of ``elements`` float32 values each that fill a block."""
    return -(-_BLOCK_ELEMENTS // max(1, elements))

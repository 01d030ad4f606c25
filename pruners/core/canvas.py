"""The canvas of an AnyRes picture, read off its layout: a thumbnail, and crops of which unpadding left some tokens."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.errors import InputError
from foveate.pruners.core.tokens import Layout, View


@dataclass(frozen=True)
class Canvas:
    """A thumbnail and ``down x across`` crops, of which unpadding left ``rows x cols`` tokens."""

    thumbnail: View
    crops: tuple[View, ...]
    down: int
    across: int
    rows: int
    cols: int

    @property
    def top(self) -> int:
        """Canvas rows of padding above the picture."""
        return (self.down * self.thumbnail.rows - self.rows) // 2

    def refuse_shrunk(self, method: str) -> None:
        """Raise :class:`InputError` if the canvas has been scaled down: unpadding cuts rows or columns, never both."""
        full = self.down * self.thumbnail.rows, self.across * self.thumbnail.cols
        if self.rows < full[0] and self.cols < full[1]:
            raise InputError(
                f"{method}: the model shrinks this picture's canvas of {full[0]} x {full[1]} tokens to {self.rows} x "
                f"{self.cols}, so its tokens belong to no crop; use a smaller picture or another method"
            )


def canvas_of(layout: Layout) -> Canvas | None:
    """The canvas of an AnyRes picture; None for a picture without crops, and for videos."""
    thumbnail, *crops = layout.views
    if thumbnail.kind != "thumbnail" or not sum(crop.size for crop in crops):
        return None
    cols, n = crops[0].stride, len(crops)
    # widths repeat in every row of crops and add up to the canvas, also where some are 0
    widths = [crop.cols for crop in crops]
    fits = (p for p in range(1, n + 1) if n % p == 0 and widths == widths[:p] * (n // p) and sum(widths[:p]) == cols)
    across = next(fits)
    rows = sum(crop.rows for crop in crops[::across])
    return Canvas(thumbnail, tuple(crops), n // across, across, rows, cols)

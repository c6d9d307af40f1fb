"""How is the part of a window taken from what covers the whole canvas? In cells of the latent, unless said otherwise."""
from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

import comfy.utils

from .quadtree import Rect
from .windows import cut

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Canvas:
    """The latent that windows are cut from.

    model: the host's, which its conditionings were made for. shape: of x, (B, C, [T,] height, width). patch: the side of the
    model's patch. prepared: what was made once for the run. copies: what was made for batches of windows; the second part of
    a key is their windows. wraps: which axes are rings, see windows.py.
    """

    model: object
    shape: tuple[int, ...]
    device: torch.device
    patch: int
    prepared: dict
    copies: dict
    wraps: tuple[bool, bool] = (False, False)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]


def cut_latent(latent: torch.Tensor, rects: Sequence[Rect]) -> torch.Tensor:
    """The windows of a latent (B, ..., H, W) as rows, (windows * B, ..., h, w)."""
    if len(rects) == 1:
        return cut(latent, rects[0])
    return torch.cat([cut(latent, rect) for rect in rects])


def cut_rows(value: torch.Tensor, rects: Sequence[Rect], rows: int) -> torch.Tensor:
    """Cut a tensor with a row for all images, or one each, to windows."""
    if len(rects) > 1:
        value = comfy.utils.repeat_to_batch_size(value, rows)
    return cut_latent(value, rects)


def in_units_of(value: torch.Tensor, rects: Sequence[Rect], down: Fraction | int, across: Fraction | int, multiple: int = 1) -> list[Rect]:
    """The windows in a tensor with down x across elements per cell: whole multiples of elements, moved inside of it.

    One that goes on over the border begins below 0 here, too: cut_latent and cut_rows read it from both ends.
    """
    found = []
    for rect in rects:
        height, width = (math.ceil(math.ceil(length) / multiple) * multiple for length in (rect.height * down, rect.width * across))
        top, left = min(math.floor(rect.top * down), value.shape[-2] - height), min(math.floor(rect.left * across), value.shape[-1] - width)
        found.append(Rect(top, left, top + height, left + width))
    return found


def scaled(value: torch.Tensor, height: int, width: int, algorithm: str) -> torch.Tensor:
    """Planes of another size, a picture of another proportion around its middle, as the host scales hints."""
    return value if tuple(value.shape[-2:]) == (height, width) else comfy.utils.common_upscale(value, width, height, algorithm, "center")


def cut_padded(value: torch.Tensor, rects: Sequence[Rect], size: tuple[int, int], cell: int, multiple: int, rows: int) -> torch.Tensor:
    """Cut what has `cell` elements per cell, and more at its end, to windows of whole multiples of elements.

    A window over the border goes on without what there is beyond `size`, (height, width) in cells.
    """
    if len(rects) > 1:
        value = comfy.utils.repeat_to_batch_size(value, rows)
    parts = []
    for rect in rects:
        inside = value[..., :size[0] * cell if rect.top < 0 else None, :size[1] * cell if rect.left < 0 else None]
        parts.append(cut_latent(inside, in_units_of(inside, [rect], cell, cell, multiple)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def passes_whole(canvas: Canvas, what: str) -> None:
    """Say once in a run that windows see the whole of something."""
    say_once(canvas, f"{what} is not known to belong to a part of the picture: every window sees the whole of it")


def run_alone(canvas: Canvas, what: str) -> None:
    """Say once in a run that windows do not share a batch."""
    say_once(canvas, f"{what} may take the windows of a batch for images: they are run one at a time")


def say_once(canvas: Canvas, line: str) -> None:
    if ("said", line) not in canvas.prepared:
        canvas.prepared["said", line] = True
        log.info("%s", line)


def common_part(one: Rect, other: Rect) -> Rect | None:
    """What two rectangles share, if anything."""
    part = Rect(max(one.top, other.top), max(one.left, other.left), min(one.bottom, other.bottom), min(one.right, other.right))
    return part if part.height > 0 and part.width > 0 else None


def parts_in_window(place: Rect, window: Rect, size: tuple[int, int]) -> list[tuple[Rect, Rect]]:
    """The parts of a place that a window shows: each from the window's corner, and from that of the place on the canvas.

    size: (height, width) of the canvas, outside of which a place has nothing. A window over the border may show several.
    A place as long as the canvas goes on over the border with it.
    """
    place = common_part(place, Rect(0, 0, *size))
    if place is None:
        return []
    rows = _spans_in_window(place.top, place.bottom, window.top, window.bottom, size[0])
    cols = _spans_in_window(place.left, place.right, window.left, window.right, size[1])
    return [
        (Rect(top, left, top + height, left + width), Rect(down, across, down + height, across + width))
        for (top, down, height), (left, across, width) in itertools.product(rows, cols)]


def _spans_in_window(first: int, last: int, start: int, end: int, length: int) -> list[tuple[int, int, int]]:
    """Along one axis: where in the window, where in the place, how long."""
    if start < 0 and (first, last) == (0, length):
        return [(0, start, end - start)]
    found = []
    for moved in (length, 0) if start < 0 else (0,):
        low, high = max(first - moved, start), min(last - moved, end)
        if low < high:
            found.append((low - start, low + moved - first, high - low))
    return found


def moved_to(rect: Rect, origin: Rect) -> Rect:
    """The rectangle in coordinates that begin at the corner of another."""
    return Rect(rect.top - origin.top, rect.left - origin.left, rect.bottom - origin.top, rect.right - origin.left)

"""What do several rooms need? Rectangles and cutting by them, reducing grids, and refusing what cannot be."""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F


class Refusal(ValueError):
    """A setting that cannot be, in English and in a form that the browser can say in other languages.

    text: the message, with the names of the values in braces. code: names the text in locales/*/main.json.
    """

    def __init__(self, code: str, text: str, **values):
        super().__init__(text.format(**values))
        self.code, self.values = code, values


@dataclass(frozen=True, slots=True)
class Rect:
    """A half-open rectangle; the owner says whether in pixels or in cells."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


def common_part(one: Rect, other: Rect) -> Rect | None:
    """What two rectangles share, if anything."""
    part = Rect(max(one.top, other.top), max(one.left, other.left), min(one.bottom, other.bottom), min(one.right, other.right))
    return part if part.height > 0 and part.width > 0 else None


def moved_to(rect: Rect, origin: Rect) -> Rect:
    """The rectangle in coordinates that begin at the corner of another."""
    return Rect(rect.top - origin.top, rect.left - origin.left, rect.bottom - origin.top, rect.right - origin.left)


def area(rect: Rect) -> int:
    return rect.height * rect.width


def grown(rect: Rect, by: int, height: int, width: int) -> Rect:
    """A rectangle with so much more on every side, as far as height x width reach."""
    return Rect(max(rect.top - by, 0), max(rect.left - by, 0), min(rect.bottom + by, height), min(rect.right + by, width))


def scaled(rect: Rect, by: int) -> Rect:
    """A rectangle in a resolution finer by so much."""
    return Rect(rect.top * by, rect.left * by, rect.bottom * by, rect.right * by)


def shrunk(rect: Rect, by: int) -> Rect:
    """The least rectangle of a resolution coarser by so much that holds it."""
    return Rect(rect.top // by, rect.left // by, -(-rect.bottom // by), -(-rect.right // by))


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


def slices(rect: Rect) -> tuple:
    """Index of a rectangle inside of what it is taken from, in the last two dimensions."""
    return ..., slice(rect.top, rect.bottom), slice(rect.left, rect.right)


def cut(value: torch.Tensor, rect: Rect) -> torch.Tensor:
    """A rectangle of the last two dimensions. One that begins below 0 begins at the end and goes on at the start."""
    if rect.top >= 0 and rect.left >= 0:
        return value[slices(rect)]
    places = torch.arange(rect.top, rect.bottom), torch.arange(rect.left, rect.right)
    rows, cols = (place.remainder(length).to(value.device) for place, length in zip(places, value.shape[-2:]))
    return value[..., rows[:, None], cols]


def pieces(rect: Rect, height: int, width: int) -> list[tuple[Rect, Rect]]:
    """What cut puts together: each part of height x width cells, and where it is in the rectangle."""
    found = []
    for top, bottom in _spans(rect.top, rect.bottom):
        for left, right in _spans(rect.left, rect.right):
            here = Rect(top % height, left % width, (bottom - 1) % height + 1, (right - 1) % width + 1)
            found.append((here, Rect(top - rect.top, left - rect.left, bottom - rect.top, right - rect.left)))
    return found


def _spans(start: int, end: int) -> list[tuple[int, int]]:
    """A span, in two where it crosses 0."""
    return [(start, min(end, 0)), (0, end)] if start < 0 < end else [(start, end)]


def cut_latent(latent: torch.Tensor, rects: Sequence[Rect]) -> torch.Tensor:
    """The windows of a latent (B, ..., H, W) as rows, (windows * B, ..., h, w)."""
    if len(rects) == 1:
        return cut(latent, rects[0])
    return torch.cat([cut(latent, rect) for rect in rects])


def blocks(values: torch.Tensor, side: int, dim: int, how=torch.sum) -> torch.Tensor:
    """Reduce runs of `side` along a dimension; the last run may be shorter."""
    length = values.shape[dim]
    whole = length - length % side
    parts = []
    if whole:
        parts.append(how(values.narrow(dim, 0, whole).unflatten(dim, (whole // side, side)), dim=dim + 1))
    if whole < length:
        parts.append(how(values.narrow(dim, whole, length - whole), dim=dim, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def pool(values: torch.Tensor, side: int, how) -> torch.Tensor:
    """Reduce side x side blocks of a (rows, cols) grid."""
    return blocks(blocks(values, side, 0, how), side, 1, how)


def block_means(values: torch.Tensor, side: int) -> torch.Tensor:
    """The mean of each side x side block of the last two dimensions, (..., rows, cols); the last ones may be cut off."""
    flat = values.reshape(1, -1, *values.shape[-2:])
    return F.avg_pool2d(flat, side, ceil_mode=True, count_include_pad=False).reshape(*values.shape[:-2], -(-values.shape[-2] // side), -(-values.shape[-1] // side))


def double(grid: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Each node's value for its four quarters, cut to the finer grid's shape."""
    return grid.repeat_interleave(2, 0).repeat_interleave(2, 1)[:like.shape[0], :like.shape[1]]


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise Refusal("share", "{name}: expected a number from 0 to 1, got {got}.", name=name, got=value)


def check_picture(image: torch.Tensor, name: str) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"{name}: expected a picture of shape (batch, height, width, channels), got {tuple(image.shape)}. Connect an IMAGE that is not empty.")

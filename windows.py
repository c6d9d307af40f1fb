"""Which windows does the model see? Everything here is in cells of the latent.

A leaf is not a window: a diffusion transformer given 4 x 4 cells wastes its text tokens and hallucinates. Windows are
rectangles, or squares of a few sizes, as tight as what is active, grown by the overlap and shifted inside the latent.
Which of them is a question of cost: the cheapest cover of the cells that are active at a step, see cover.py.

A picture may go on over its border, at the opposite one. Along such an axis the latent is a ring: a window over the
border begins below 0, as an index that counts from the end, and is never longer than the latent.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .cover import BLOCK, Axis, Cover, Part, cuts_cover, quadtree_cover
from .utils import Rect

# As tight as what is active, or squares of a few sizes.
WINDOW_SHAPES = ("tight", "square")

# Which axes of a picture go on over its border: (down, across).
WRAPS = {"none": (False, False), "horizontal": (False, True), "both": (True, True)}


@dataclass(frozen=True, slots=True)
class Window:
    """rect: the cells the model sees. core: the cells it was chosen for, inside rect; cores do not overlap."""

    rect: Rect
    core: Rect


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Windows whose cores hold every active cell of a height x width latent."""

    height: int
    width: int
    windows: tuple[Window, ...]
    cost: float

    @property
    def is_whole(self) -> bool:
        """True if there is one window and it is the latent."""
        return len(self.windows) == 1 and self.windows[0].rect == Rect(0, 0, self.height, self.width)


@dataclass(frozen=True, slots=True)
class WindowCost:
    """What a window costs in tokens: each once for the linear layers, and attention's square.

    A transformer layer of width c spends about 24 c^2 operations on a token and 4 c on each pair of tokens,
    so n tokens cost n + n^2 / (6 c) tokens' worth. Every window pays for the text again.
    layer: the 6, in layers of another build. text_share: what a token of text costs in them, against a patch.
    text_attends: False where patches only look at the text.
    """

    patch: int = 2
    frames: int = 1
    text_tokens: int = 0
    width: int = 2048
    layer: float = 6.0
    text_share: float = 1.0
    text_attends: bool = True

    def of(self, height, width):
        """In tokens. height, width: cells, whole numbers or tensors of them."""
        patches = -(-height // self.patch) * -(-width // self.patch) * self.frames
        attending = patches + self.text_tokens if self.text_attends else patches
        return patches + self.text_share * self.text_tokens + attending * attending / (self.layer * self.width)


@dataclass(frozen=True, slots=True)
class WindowSizes:
    """How large windows may be.

    sides: of the cores, each twice the one before. overlap: added on every side. wraps: which axes are rings. step: windows
    are rectangles, their lengths multiples of it and their cores no shorter than the first side; 0: they are squares of
    these sides.
    """

    sides: tuple[int, ...]
    overlap: int
    wraps: tuple[bool, bool] = (False, False)
    step: int = 0

    def shape(self, side: int, height: int, width: int) -> tuple[int, int]:
        """What the model sees of a height x width latent through a square window of this core."""
        return min(side + 2 * self.overlap, height), min(side + 2 * self.overlap, width)

    def lengths(self, length: int) -> tuple[int, ...]:
        """The lengths that windows may have along an axis of so many cells, in growing order; of squares one for each side."""
        squares = [min(side + 2 * self.overlap, length) for side in self.sides]
        if not self.step:
            return tuple(squares)
        return tuple(sorted({*squares, *range(-(-self.sides[0] // self.step) * self.step, squares[-1], self.step)}))


def window_sizes(
    min_window: int, max_window: int, overlap: int, patch: int, wraps: tuple[bool, bool] = (False, False), step: int = 0,
) -> WindowSizes:
    """Halve the largest side down to the smallest; all sides, the overlap and the step are multiples of the patch."""
    largest = max(max_window // patch, 1) * patch
    sides = [largest]
    while sides[0] // 2 >= max(min_window, patch) and sides[0] // 2 % patch == 0:
        sides.insert(0, sides[0] // 2)
    return WindowSizes(tuple(sides), math.ceil(overlap / patch) * patch, wraps, math.ceil(step / patch) * patch)


def plan_windows(active: torch.Tensor, sizes: WindowSizes, cost: WindowCost, offset: tuple[int, int] | None = None) -> TilePlan:
    """Find the cheapest cover of the active cells by windows: squares of a quadtree, or rectangles if they are no cheaper.

    active: (height, width) bool. offset: how far the quadtree's grid is moved up and left, which leaves rectangles no cuts
    but its own; None takes the best place.
    """
    axes = [_axis(length, ring, sizes, cost.patch, sizes.sides[0]) for length, ring in zip(active.shape, sizes.wraps)]
    prices = torch.full([len(axis.lengths) + 1 for axis in axes], math.inf, dtype=torch.float64)
    prices[:-1, :-1] = torch.tensor([[cost.of(height, width) for width in axes[1].lengths] for height in axes[0].lengths])
    covers = [(axes, quadtree_cover(active, axes, prices, cost.patch, sizes.sides[-1] // sizes.sides[0], offset))]
    if offset is None and any(sizes.wraps) and len(sizes.sides) > 1:
        # Squares that halve a ring are none of the quadtree's; two windows as long as the ring may cost less than many small ones.
        halves = [_axis(axis.length, axis.is_ring, sizes, cost.patch, sizes.sides[-1]) for axis in axes]
        covers.append((halves, quadtree_cover(active, halves, prices, cost.patch, 1, None)))
    if sizes.step and offset is None:
        finer = [_axis(axis.length, axis.is_ring, sizes, cost.patch, _side_of_cuts(axis.length, sizes, cost.patch)) for axis in axes]
        covers.append((finer, cuts_cover(active, finer, prices, cost.patch)))
    axes, cover = _cheapest(covers)
    windows = [_window(part, axes, cost.patch, sizes.overlap) for part in cover.parts]
    return TilePlan(*active.shape, tuple(windows), sum(cost.of(window.rect.height, window.rect.width) for window in windows))


def full_grid(height: int, width: int, sizes: WindowSizes, cost: WindowCost) -> TilePlan:
    """The plain grid of the largest windows, which sampling everything would take."""
    return plan_windows(torch.ones(height, width, dtype=torch.bool), replace(sizes, sides=sizes.sides[-1:], step=0), cost, (0, 0))


def group_windows(windows: Sequence[Window], kind_of) -> list[tuple[Window, ...]]:
    """Windows of one shape and one kind together, in the order in which they first occur."""
    groups: dict = {}
    for window in windows:
        groups.setdefault((window.rect.height, window.rect.width, kind_of(window)), []).append(window)
    return [tuple(group) for group in groups.values()]


def _cheapest(covers: Sequence[tuple[Sequence[Axis], Cover]]) -> tuple[Sequence[Axis], Cover]:
    """The first that no other one undercuts by more than the last bit, in which sums in another order differ."""
    least = min(cover.cost for _, cover in covers)
    return next((axes, cover) for axes, cover in covers if cover.cost <= least * (1 + 1e-9))


def _axis(length: int, is_ring: bool, sizes: WindowSizes, patch: int, side: int) -> Axis:
    """A window as long as a ring has no overlap beyond itself: it serves half of the ring, another one the other half."""
    overlap = sizes.overlap
    if is_ring and side + 2 * overlap > length:
        side = math.ceil(length / 2 / patch) * patch if overlap else side
        overlap = max(min((length - side) // 2, overlap), 0)
    squares = replace(sizes, step=0).lengths(length)
    return Axis(length, is_ring, side, overlap, sizes.lengths(length), squares, sizes.sides[0] if sizes.step else 0)


def _side_of_cuts(length: int, sizes: WindowSizes, patch: int) -> int:
    """Half the smallest core; in a large latent more, up to a quarter of the largest, as the search takes a block at a time."""
    side = sizes.sides[0]
    side = side if side // 2 % patch or side < 2 else side // 2
    while side * BLOCK < length and side * 4 < sizes.sides[-1]:
        side *= 2
    return side


def _window(part: Part, axes: Sequence[Axis], patch: int, overlap: int) -> Window:
    """The window around what is active: it in the middle, on whole patches, inside the latent unless that is a ring."""
    spans = []
    for axis, start, end, fit, moved in zip(axes, part.box[:2], part.box[2:], part.fits, part.moved):
        end, size = min(-end, axis.length), axis.lengths[fit]
        place = _place(start, end, size, patch, axis, overlap)
        # On a ring the place is the one index, 0 or below 0 over the border, from which the window's cells follow each other.
        at = (place - moved) % axis.length if axis.is_ring else place
        at -= axis.length if at + size > axis.length else 0
        spans.append((at, at + size, start - place + at, end - place + at))
    (top, bottom, *rows), (left, right, *cols) = spans
    return Window(Rect(top, left, bottom, right), Rect(rows[0], cols[0], rows[1], cols[1]))


def _place(start: int, end: int, size: int, patch: int, axis: Axis, overlap: int) -> int:
    middle = (start + end - size) // 2 // patch * patch
    if axis.is_ring:
        # One as long as the ring may have more around a part that is shorter than half of it.
        around = max(axis.overlap, min(overlap, (size - (end - start)) // 2 // patch * patch))
        return max(middle, end + around - size)
    if end + axis.overlap >= axis.length:
        return axis.length - size
    return min(max(middle, 0), axis.length - size)

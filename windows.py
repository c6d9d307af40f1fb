"""Which windows does the model see? Everything here is in cells of the latent.

A leaf is not a window: a diffusion transformer given 4 x 4 cells wastes its text tokens and hallucinates. Windows are
squares of a few sizes, grown by the overlap and shifted inside the latent, so that one size gives one shape.
Which of them is a question of cost: the cheapest quadtree cover of the cells that are active at a step.

A picture may go on over its border, at the opposite one. Along such an axis the latent is a ring: a window over the
border begins below 0, as an index that counts from the end, and is never longer than the latent.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .utils import Rect

# Which axes of a picture go on over its border: (down, across).
WRAPS = {"none": (False, False), "horizontal": (False, True), "both": (True, True)}

# Grids tried along each axis for one plan; finer steps were measured to find hardly cheaper plans.
ALIGNMENTS = 4


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
    """sides: of the cores, each twice the one before. overlap: added on every side. wraps: which axes are rings."""

    sides: tuple[int, ...]
    overlap: int
    wraps: tuple[bool, bool] = (False, False)

    def shape(self, side: int, height: int, width: int) -> tuple[int, int]:
        """What the model sees of a height x width latent through a window of this core."""
        return min(side + 2 * self.overlap, height), min(side + 2 * self.overlap, width)


def window_sizes(min_window: int, max_window: int, overlap: int, patch: int, wraps: tuple[bool, bool] = (False, False)) -> WindowSizes:
    """Halve the largest side down to the smallest; all sides and the overlap are multiples of the patch."""
    largest = max(max_window // patch, 1) * patch
    sides = [largest]
    while sides[0] // 2 >= max(min_window, patch) and sides[0] // 2 % patch == 0:
        sides.insert(0, sides[0] // 2)
    return WindowSizes(tuple(sides), math.ceil(overlap / patch) * patch, wraps)


def plan_windows(active: torch.Tensor, sizes: WindowSizes, cost: WindowCost, offset: tuple[int, int] | None = None) -> TilePlan:
    """Find the cheapest cover of the active cells by squares of a quadtree.

    active: (height, width) bool. offset: how far the quadtree's grid is moved up and left; None takes the best of up to
    4 x 4 places. Bottom-up: a square costs the least of one window, the smallest that holds what is active in it, and
    the sum over its quarters. A ring is cut open where the grid begins, and windows go on over the cut.
    """
    axes = [_axis(length, ring, sizes, cost.patch) for length, ring in zip(active.shape, sizes.wraps)]
    shapes = [sizes.shape(side, *active.shape) for side in sizes.sides]
    prices = torch.tensor([cost.of(*shape) for shape in shapes] + [math.inf], dtype=torch.float64)
    boxes, moves = _boxes_on_grids(active, sizes, axes, cost.patch, offset)
    levels, best = [], torch.full(boxes.shape[1:], math.inf, dtype=torch.float64)
    while True:
        fit = _smallest_fit(boxes, shapes, axes)
        price = prices[fit].masked_fill_(_is_empty(boxes), 0.0)
        levels.append(_Level(boxes, fit, price <= best))
        best = torch.minimum(price, best)
        if best[0].numel() == 1:
            break
        boxes, best = _join_quarters(boxes, torch.amin, _NOTHING), _join_quarters(best, torch.sum, 0)
    # The same prices summed in another order differ in the last bit.
    place = int((best.flatten() <= best.min() * (1 + 1e-9)).nonzero()[0])
    windows = [_window(box, shapes[fit], axes, moves[place], cost.patch) for box, fit in _chosen(levels, place)]
    return TilePlan(*active.shape, tuple(windows), sum(cost.of(window.rect.height, window.rect.width) for window in windows))


def full_grid(height: int, width: int, sizes: WindowSizes, cost: WindowCost) -> TilePlan:
    """The plain grid of the largest windows, which sampling everything would take."""
    return plan_windows(torch.ones(height, width, dtype=torch.bool), replace(sizes, sides=sizes.sides[-1:]), cost, (0, 0))


def group_windows(windows: Sequence[Window], kind_of) -> list[tuple[Window, ...]]:
    """Windows of one shape and one kind together, in the order in which they first occur."""
    groups: dict = {}
    for window in windows:
        groups.setdefault((window.rect.height, window.rect.width, kind_of(window)), []).append(window)
    return [tuple(group) for group in groups.values()]

# A box is (top, left, -bottom, -right), so that the least of several boxes encloses them all.
_NOTHING = 1 << 30


@dataclass(frozen=True)
class _Level:
    """The squares of one side on several grids: tensors of (grids, rows, cols).

    boxes: (4, grids, rows, cols), what is active. fit: the smallest window for it. undivided: one window is cheapest.
    """

    boxes: torch.Tensor
    fit: torch.Tensor
    undivided: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of the latent. side: of the smallest squares along it. overlap: what a window shows around its core."""

    length: int
    is_ring: bool
    side: int
    overlap: int


def _axis(length: int, is_ring: bool, sizes: WindowSizes, patch: int) -> _Axis:
    """A window as long as a ring has no overlap beyond itself: it serves half of the ring, another one the other half."""
    side, overlap = sizes.sides[0], sizes.overlap
    if not is_ring or side + 2 * overlap <= length:
        return _Axis(length, is_ring, side, overlap)
    half = math.ceil(length / 2 / patch) * patch if overlap else side
    return _Axis(length, is_ring, half, max(min((length - half) // 2, overlap), 0))


def _boxes_on_grids(active: torch.Tensor, sizes: WindowSizes, axes: Sequence[_Axis], patch: int, offset: tuple[int, int] | None):
    """The boxes of the smallest squares on several grids, (4, grids, rows, cols), and how far each is moved along rings."""
    count = sizes.sides[-1] // sizes.sides[0]
    step = max(count // ALIGNMENTS, 1)
    steps = [range(0, count * axis.side, step * axis.side) if axis.is_ring else (0,) for axis in axes] if offset is None else [(by,) for by in offset]
    found, moves = [], []
    for move in [(down, across) for down in steps[0] for across in steps[1]]:
        rolled = [by if axis.is_ring else 0 for by, axis in zip(move, axes)]
        boxes = _active_boxes(active.roll(rolled, (0, 1)), axes, patch, [by - roll for by, roll in zip(move, rolled)])
        found.append(boxes[:, None] if offset is not None else _shifted(boxes, step, [0 if axis.is_ring else count - step for axis in axes]))
        moves += [rolled] * found[-1].shape[1]
    return torch.cat(found, 1), moves


def _active_boxes(active: torch.Tensor, axes: Sequence[_Axis], patch: int, offset: Sequence[int]) -> torch.Tensor:
    """The box of whole patches around the active cells of each smallest square, (4, rows, cols)."""
    after = [-(axis.length + before) % axis.side for axis, before in zip(axes, offset)]
    squares = F.pad(active, (offset[1], after[1], offset[0], after[0])).unflatten(1, (-1, axes[1].side)).unflatten(0, (-1, axes[0].side))
    top, bottom = _ends(squares.any(3), offset[0])
    left, right = _ends(squares.any(1).permute(1, 2, 0), offset[1])
    boxes = torch.stack([top, left.T, bottom, right.T])
    # What lies beyond the last square by no more than the overlap, its window sees anyway.
    for dim, axis in enumerate(axes, 1):
        if axis.side - after[dim - 1] <= axis.overlap and boxes.shape[dim] > 1 and not axis.is_ring:
            boxes, last = boxes.split([boxes.shape[dim] - 1, 1], dim)
            boxes = torch.cat([boxes.narrow(dim, 0, boxes.shape[dim] - 1), torch.minimum(boxes.narrow(dim, -1, 1), last)], dim)
    return boxes.div(patch, rounding_mode="floor") * patch


def _ends(lines: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and negated last of the lines that are true in each square: (squares, side, n) to two of (squares, n)."""
    number = torch.arange(lines.shape[0] * lines.shape[1], dtype=torch.int32).view(*lines.shape[:2], 1) - offset
    return torch.where(lines, number, _NOTHING).amin(1), torch.where(lines, -number - 1, _NOTHING).amin(1)


def _shifted(boxes: torch.Tensor, step: int, room: Sequence[int]) -> torch.Tensor:
    """The boxes on grids moved by up to `room` squares, (4, grids, rows, cols); the first grid is not moved."""
    rows, cols = boxes.shape[1] + room[0], boxes.shape[2] + room[1]
    grids = F.pad(boxes, (room[1], room[1], room[0], room[0]), value=_NOTHING).unfold(1, rows, step).unfold(2, cols, step)
    return grids.flip(1, 2).flatten(1, 2)


def _is_empty(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[0] > _NOTHING // 2


def _smallest_fit(boxes: torch.Tensor, shapes: list[tuple[int, int]], axes: Sequence[_Axis]) -> torch.Tensor:
    """The index of the first shape that holds a box and the overlap around it; len(shapes) if there is none."""
    fits = []
    for axis, start, end, lengths in zip(axes, boxes[:2], boxes[2:], torch.tensor(shapes, dtype=torch.int32).T.contiguous()):
        if axis.is_ring:
            needed = (-end).clamp(max=axis.length) - start + 2 * axis.overlap
        else:
            needed = (axis.overlap - end).clamp(max=axis.length) - (start - axis.overlap).clamp(min=0)
        fits.append(torch.searchsorted(lengths, needed.contiguous()))
    return torch.maximum(*fits)


def _join_quarters(values: torch.Tensor, how, nothing: int) -> torch.Tensor:
    """Reduce 2 x 2 squares to the one of twice their side."""
    whole = F.pad(values, (0, values.shape[-1] % 2, 0, values.shape[-2] % 2), value=nothing)
    return how(whole.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)), (-3, -1))


def _chosen(levels: Sequence[_Level], place: int) -> list[tuple[list[int], int]]:
    """Walk down one grid to the squares that are cheapest undivided: their boxes and the windows that fit."""
    found = []
    wanted = torch.ones(1, 1, dtype=torch.bool)
    for level in reversed(levels):
        boxes = level.boxes[:, place]
        wanted = wanted[:boxes.shape[1], :boxes.shape[2]] & ~_is_empty(boxes)
        taken = wanted & level.undivided[place]
        found += zip(boxes[:, taken].T.tolist(), level.fit[place][taken].tolist())
        wanted = (wanted & ~taken).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return found


def _window(box: list[int], shape: tuple[int, int], axes: Sequence[_Axis], move: Sequence[int], patch: int) -> Window:
    """The window of this shape around a box: in its middle, on whole patches, inside the latent unless that is a ring."""
    spans = []
    for axis, start, end, size, moved in zip(axes, box[:2], box[2:], shape, move):
        end = min(-end, axis.length)
        place = _place(start, end, size, patch, axis)
        # On a ring the place is the one index, 0 or below 0 over the border, from which the window's cells follow each other.
        at = (place - moved) % axis.length if axis.is_ring else place
        at -= axis.length if at + size > axis.length else 0
        spans.append((at, at + size, start - place + at, end - place + at))
    (top, bottom, *rows), (left, right, *cols) = spans
    return Window(Rect(top, left, bottom, right), Rect(rows[0], cols[0], rows[1], cols[1]))


def _place(start: int, end: int, size: int, patch: int, axis: _Axis) -> int:
    middle = (start + end - size) // 2 // patch * patch
    if axis.is_ring:
        return max(middle, end + axis.overlap - size)
    if end + axis.overlap >= axis.length:
        return axis.length - size
    return min(max(middle, 0), axis.length - size)

"""Which rectangles hold what is active at the least price? Everything here is in cells of the latent.

The latent is laid out in squares as large as the smallest window. A rectangle of squares costs the least of one window,
the smallest that holds what is active in it, and the sum over its parts. Two searches find the least there is: over the
squares of a quadtree, cut into quarters, on several grids; and over all rectangles, cut in two wherever squares meet.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Grids tried along each axis for one quadtree; finer steps were measured to find hardly cheaper plans.
ALIGNMENTS = 4

# Rectangles are sought in blocks of so many squares along each axis: their number grows with its fourth power.
BLOCK = 16

# A box is (top, left, -bottom, -right), so that the least of several boxes encloses them all.
NOTHING = 1 << 30


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the latent.

    side: of the squares along it. overlap: what a window shows around its core. lengths: those that windows may have, in
    growing order. squares: those of squares among them. shortest: a core is extended to it; 0: windows are squares.
    """

    length: int
    is_ring: bool
    side: int
    overlap: int
    lengths: tuple[int, ...]
    squares: tuple[int, ...]
    shortest: int


@dataclass(frozen=True, slots=True)
class Part:
    """box: what is active in it. fits: which of the lengths its window has. moved: how far the latent was rolled when it was found."""

    box: tuple[int, int, int, int]
    fits: tuple[int, int]
    moved: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cover:
    cost: float
    parts: tuple[Part, ...]


def quadtree_cover(active: torch.Tensor, axes: Sequence[Axis], prices: torch.Tensor, patch: int, count: int, offset: tuple[int, int] | None) -> Cover:
    """The cheapest cover by squares of a quadtree.

    prices: (heights + 1, widths + 1), infinite where a length is none. count: squares along the largest core. offset: how
    far the grid is moved up and left; None takes the best of up to 4 x 4 places.
    """
    boxes, moves = _boxes_on_grids(active, axes, patch, count, offset)
    levels, best = [], torch.full(boxes.shape[1:], math.inf, dtype=torch.float64)
    while True:
        fits = _fits(boxes, axes)
        price = prices[fits[0], fits[1]].masked_fill_(_is_empty(boxes), 0.0)
        levels.append((boxes, fits, price <= best))
        best = torch.minimum(price, best)
        if best[0].numel() == 1:
            break
        boxes, best = _join_quarters(boxes, torch.amin, NOTHING), _join_quarters(best, torch.sum, 0)
    # The same prices summed in another order differ in the last bit.
    place = int((best.flatten() <= best.min() * (1 + 1e-9)).nonzero()[0])
    return Cover(float(best.min()), tuple(Part(box, fits, moves[place]) for box, fits in _undivided(levels, place)))


def cuts_cover(active: torch.Tensor, axes: Sequence[Axis], prices: torch.Tensor, patch: int) -> Cover:
    """The cheapest cover by rectangles of squares that come from cutting in two again and again, block by block.

    A ring is cut open along the line of squares that the fewest active cells lie across.
    """
    moved = tuple(_quiet_place(cells, axis, patch) for cells, axis in zip((active, active.T), axes))
    boxes = _active_boxes(active.roll(moved, (0, 1)), axes, patch, (0, 0))
    rows, cols = (min(size, BLOCK) for size in boxes.shape[1:])
    boxes = F.pad(boxes, (0, -boxes.shape[2] % cols, 0, -boxes.shape[1] % rows), value=NOTHING)
    boxes = boxes.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).movedim(3, 2).flatten(1, 2)
    windows = _windows(boxes, axes, prices)
    costs = _costs_of_cuts([price for *_, price in windows], rows, cols)
    parts = [Part(box, fits, moved) for block in range(boxes.shape[1]) for box, fits in _pieces(windows, costs, block)]
    return Cover(float(costs[-1][-1, :, 0, 0].sum()), tuple(parts))


# Of rectangles of squares, by width in a list, then tensors of (..., heights, blocks, rows, cols): what is active in them,
# (4, ...), which lengths their windows have, (2, ...), and what these cost. What lies beyond a block is not active there.
_Windows = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _windows(boxes: torch.Tensor, axes: Sequence[Axis], prices: torch.Tensor) -> _Windows:
    """All rectangles that one window may hold. boxes: of the squares, (4, blocks, rows, cols)."""
    # One square more than the longest window has, as it need not begin where a square does.
    heights, widths = (min(math.ceil(axis.lengths[-1] / axis.side) + 1, size) for axis, size in zip(axes, boxes.shape[2:]))
    tall = [boxes]
    for height in range(1, heights):
        tall.append(torch.minimum(tall[-1], _moved(boxes, -2, height, NOTHING)))
    wide = tall = torch.stack(tall, 1)
    found = []
    for width in range(widths):
        wide = torch.minimum(wide, _moved(tall, -1, width, NOTHING))
        fits = _fits(wide, axes)
        found.append((wide, fits, prices[fits[0], fits[1]].masked_fill_(_is_empty(wide), 0.0)))
    return found


def _costs_of_cuts(prices: Sequence[torch.Tensor], rows: int, cols: int) -> list[torch.Tensor]:
    """The least cost of each rectangle of squares, by its width: (heights, blocks, rows, cols)."""
    found: list[torch.Tensor] = []
    for width in range(1, cols + 1):
        # Twice as many rows: beyond the end of a block nothing costs anything.
        costs = prices[0].new_full((rows, prices[0].shape[1], 2 * rows, cols), math.inf)
        costs[:, :, rows:] = 0
        inside = costs[:, :, :rows]
        if width <= len(prices):
            inside[:len(prices[width - 1])] = prices[width - 1]
        for cut in range(1, width):
            torch.minimum(inside, found[cut - 1] + _moved(found[width - cut - 1], -1, cut, 0), out=inside)
        _cut_rows(costs, rows)
        found.append(inside)
    return found


def _cut_rows(costs: torch.Tensor, rows: int) -> None:
    """Let rectangles of one width cost no more than two above each other, in place."""
    by_height, by_block, by_row, by_col = costs.stride()
    for height in range(2, rows + 1):
        # The lower parts, the shortest first: each begins where what is left above it ends.
        below = costs.as_strided((height - 1, costs.shape[1], rows, costs.shape[3]), (by_height - by_row, by_block, by_row, by_col), (height - 1) * by_row)
        above = costs[:height - 1, :, :rows].flip(0)
        here = costs[height - 1, :, :rows]
        torch.minimum(here, above.add_(below).amin(0), out=here)


def _pieces(windows: _Windows, costs: Sequence[torch.Tensor], block: int) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
    """Go down from a whole block to the windows that it is cut into: their boxes and fits."""
    rows, cols = costs[0].shape[0], len(costs)
    # Few of their numbers are looked at, which is quick in numpy; lists of all would take longer than the search.
    table = [of_width[:, block].numpy() for of_width in costs]
    single = [price[:, block].numpy() for *_, price in windows]

    def cost(height: int, width: int, row: int, col: int) -> float:
        return table[width - 1][height - 1, row, col] if row < rows and col < cols else 0.0

    found, todo = [], [(rows, cols, 0, 0)]
    while todo:
        height, width, row, col = todo.pop()
        least = cost(height, width, row, col)
        if least == 0:
            continue
        if width <= len(single) and height <= len(single[0]) and single[width - 1][height - 1, row, col] == least:
            boxes, fits, _ = windows[width - 1]
            found.append((tuple(boxes[:, height - 1, block, row, col].tolist()), tuple(fits[:, height - 1, block, row, col].tolist())))
            continue
        across = (((height, cut, row, col), (height, width - cut, row, col + cut)) for cut in range(1, width))
        down = (((cut, width, row, col), (height - cut, width, row + cut, col)) for cut in range(1, height))
        todo += next(halves for halves in (*across, *down) if cost(*halves[0]) + cost(*halves[1]) == least)
    return found


def _quiet_place(active: torch.Tensor, axis: Axis, patch: int) -> int:
    """How far to roll a ring, the first dimension, for the fewest active cells to lie across its ends; 0 for what is none."""
    if not axis.is_ring:
        return 0
    across = (active & active.roll(1, 0)).sum(1)
    # Where all are alike, no windows meet on the latent's own border.
    half = max(axis.side // 2 // patch * patch, patch)
    return min((by % axis.length for by in range(half, axis.length + half, half)), key=lambda by: int(across[-by % axis.length]))


def _boxes_on_grids(
    active: torch.Tensor, axes: Sequence[Axis], patch: int, count: int, offset: tuple[int, int] | None,
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The boxes of the squares on several grids, (4, grids, rows, cols), and how far each is moved along rings."""
    step = max(count // ALIGNMENTS, 1)
    steps = [range(0, count * axis.side, step * axis.side) if axis.is_ring else (0,) for axis in axes] if offset is None else [(by,) for by in offset]
    found, moves = [], []
    for move in [(down, across) for down in steps[0] for across in steps[1]]:
        rolled = tuple(by if axis.is_ring else 0 for by, axis in zip(move, axes))
        boxes = _active_boxes(active.roll(rolled, (0, 1)), axes, patch, [by - roll for by, roll in zip(move, rolled)])
        found.append(boxes[:, None] if offset is not None else _shifted(boxes, step, [0 if axis.is_ring else count - step for axis in axes]))
        moves += [rolled] * found[-1].shape[1]
    return torch.cat(found, 1), moves


def _active_boxes(active: torch.Tensor, axes: Sequence[Axis], patch: int, offset: Sequence[int]) -> torch.Tensor:
    """The box of whole patches around the active cells of each square, (4, rows, cols)."""
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
    return torch.where(lines, number, NOTHING).amin(1), torch.where(lines, -number - 1, NOTHING).amin(1)


def _shifted(boxes: torch.Tensor, step: int, room: Sequence[int]) -> torch.Tensor:
    """The boxes on grids moved by up to `room` squares, (4, grids, rows, cols); the first grid is not moved."""
    rows, cols = boxes.shape[1] + room[0], boxes.shape[2] + room[1]
    grids = F.pad(boxes, (room[1], room[1], room[0], room[0]), value=NOTHING).unfold(1, rows, step).unfold(2, cols, step)
    return grids.flip(1, 2).flatten(1, 2)


def _moved(values: torch.Tensor, dim: int, by: int, beyond: int) -> torch.Tensor:
    """What lies so much further along a dimension, in the place of each value."""
    if by >= values.shape[dim]:
        return torch.full_like(values, beyond)
    return F.pad(values.narrow(dim, by, values.shape[dim] - by), (0, by) if dim == -1 else (0, 0, 0, by), value=beyond)


def _is_empty(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[0] > NOTHING // 2


def _fits(boxes: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
    """Along each axis the index of the first length that holds a box and the overlap around it, (2, ...); that after the last if none does."""
    fits = torch.stack([_fit(axis, start, end) for axis, start, end in zip(axes, boxes[:2], boxes[2:])])
    return fits if any(axis.shortest for axis in axes) else fits.amax(0).expand_as(fits)


def _fit(axis: Axis, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    if axis.is_ring:
        needed = (-end).clamp(max=axis.length) - start + 2 * axis.overlap
    else:
        needed = (axis.overlap - end).clamp(max=axis.length) - (start - axis.overlap).clamp(min=0)
    longest = axis.lengths[-1]
    first = torch.bucketize(torch.arange(longest + 2), torch.tensor(axis.lengths))
    found = first[needed.clamp(0, longest + 1)]
    if not axis.shortest:
        return found
    if not axis.is_ring:
        # As much as a window may be chosen for is seen as in a square at the latent's border, too: a narrower hand-over was seen as a line.
        needed = torch.where(-end - start >= longest - 2 * axis.overlap, _of_square(axis, needed), needed)
        found = torch.where(found < len(axis.lengths), first[needed.clamp(0, longest + 1)], found)
    extended = first[(needed + (axis.shortest + start + end).clamp(min=0)).clamp(0, longest)]
    return torch.where(found < len(axis.lengths), extended, found)


def _of_square(axis: Axis, needed: torch.Tensor) -> torch.Tensor:
    """The length of the first square that is long enough, or else what is needed."""
    squares = torch.tensor(axis.squares)
    return torch.maximum(needed, squares[torch.bucketize(needed, squares).clamp(max=len(squares) - 1)])


def _join_quarters(values: torch.Tensor, how, nothing: int) -> torch.Tensor:
    """Reduce 2 x 2 squares to the one of twice their side."""
    whole = F.pad(values, (0, values.shape[-1] % 2, 0, values.shape[-2] % 2), value=nothing)
    return how(whole.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)), (-3, -1))


def _undivided(levels: Sequence[tuple], place: int) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
    """Walk down one grid to the squares that are cheapest undivided: their boxes and fits."""
    found = []
    wanted = torch.ones(1, 1, dtype=torch.bool)
    for boxes, fits, undivided in reversed(levels):
        boxes = boxes[:, place]
        wanted = wanted[:boxes.shape[1], :boxes.shape[2]] & ~_is_empty(boxes)
        taken = wanted & undivided[place]
        found += zip(map(tuple, boxes[:, taken].T.tolist()), map(tuple, fits[:, place][:, taken].T.tolist()))
        wanted = (wanted & ~taken).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return found

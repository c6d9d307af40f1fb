"""Which windows does the model see? Everything here is in cells of the latent.

A leaf is not a window: a diffusion transformer given 4 x 4 cells wastes its text tokens and hallucinates. Windows are
aligned squares of a few sizes, grown by the overlap and shifted inside the latent, so that one size gives one shape.
Which of them is a question of cost: the cheapest quadtree cover of the cells that are active at a step.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .quadtree import Rect

METHODS = ("Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion")
SHIFTS = ("random", "sorted", "fibonacci")


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
    """

    patch: int = 2
    frames: int = 1
    text_tokens: int = 0
    width: int = 2048

    def of(self, height: int, width: int) -> float:
        tokens = math.ceil(height / self.patch) * math.ceil(width / self.patch) * self.frames + self.text_tokens
        return tokens + tokens * tokens / (6 * self.width)


@dataclass(frozen=True, slots=True)
class WindowSizes:
    """sides: of the cores, each twice the one before. overlap: added on every side."""

    sides: tuple[int, ...]
    overlap: int

    def shape(self, side: int, height: int, width: int) -> tuple[int, int]:
        """What the model sees of a height x width latent through a window of this core."""
        return min(side + 2 * self.overlap, height), min(side + 2 * self.overlap, width)


def window_sizes(min_window: int, max_window: int, overlap: int, patch: int) -> WindowSizes:
    """Halve the largest side down to the smallest; all sides and the overlap are multiples of the patch."""
    largest = max(max_window // patch, 1) * patch
    sides = [largest]
    while sides[0] // 2 >= max(min_window, patch) and sides[0] // 2 % patch == 0:
        sides.insert(0, sides[0] // 2)
    return WindowSizes(tuple(sides), math.ceil(overlap / patch) * patch)


def plan_windows(active: torch.Tensor, sizes: WindowSizes, cost: WindowCost, offset: tuple[int, int] = (0, 0)) -> TilePlan:
    """Find the cheapest cover of the active cells by aligned squares.

    active: (height, width) bool. offset: how far the grid of squares is moved up and left.
    Bottom-up: a square costs the least of one window here and the sum over its quarters that hold active cells.
    """
    height, width = active.shape
    axes = [(_Axis(height, side, offset[0], sizes.overlap), _Axis(width, side, offset[1], sizes.overlap)) for side in sizes.sides]
    count = _pool(active.double(), *(axis.square_of(torch.arange(axis.length)) for axis in axes[0]), axes[0])
    prices = [cost.of(*sizes.shape(side, height, width)) for side in sizes.sides]
    counts, best, whole = [count], (count > 0) * prices[0], [torch.ones_like(count, dtype=torch.bool)]
    for pair, price in zip(axes[1:], prices[1:]):
        parents = [torch.arange(best.shape[dim]).div(2, rounding_mode="floor").clamp(max=axis.count - 1) for dim, axis in enumerate(pair)]
        counts.append(_pool(counts[-1], *parents, pair))
        quarters = _pool(best, *parents, pair)
        whole.append(price <= quarters)
        best = (counts[-1] > 0) * quarters.clamp(max=price)
    windows = _chosen(axes, counts, whole)
    return TilePlan(height, width, windows, sum(cost.of(window.rect.height, window.rect.width) for window in windows))


def full_grid(height: int, width: int, sizes: WindowSizes, cost: WindowCost) -> TilePlan:
    """The plain grid of the largest windows, which sampling everything would take."""
    return plan_windows(torch.ones(height, width, dtype=torch.bool), WindowSizes(sizes.sides[-1:], sizes.overlap), cost)


def group_windows(windows: Sequence[Window], kind_of) -> list[tuple[Window, ...]]:
    """Windows of one shape and one kind together, in the order in which they first occur."""
    groups: dict = {}
    for window in windows:
        groups.setdefault((window.rect.height, window.rect.width, kind_of(window)), []).append(window)
    return [tuple(group) for group in groups.values()]


def blend_weight(method: str, height: int, width: int) -> torch.Tensor:
    """The weight of a window's cells, (height, width), above 0 everywhere.

    MultiDiffusion (arXiv 2302.08113) averages; Mixture of Diffusers (arXiv 2302.02412) trusts the middle: a Gaussian of
    variance 0.01 in units of the side, along each axis by itself.
    """
    if method == "MultiDiffusion":
        return torch.ones(height, width)
    if method != "Mixture of Diffusers":
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    falloffs = []
    for length in (height, width):
        position = (torch.arange(length) + 0.5) / length - 0.5
        falloffs.append(torch.exp(-position.square() / 0.02))
    return falloffs[0][:, None] * falloffs[1]


@dataclass(frozen=True, slots=True)
class Blend:
    """How the windows of one plan add up: weights per shape, and their sum over the latent."""

    weights: dict[tuple[int, int], torch.Tensor]
    total: torch.Tensor | None

    def weight_of(self, window: Window, like: torch.Tensor) -> torch.Tensor:
        """The weight of a window's cells, (height, width); the weights of all windows sum to 1 on every active cell."""
        if self.total is None:
            return _core_only(window, like)
        return (self.weights[window.rect.height, window.rect.width] / self.total[slices(window.rect)]).to(like.dtype)


def plan_blend(method: str, plan: TilePlan, device: torch.device) -> Blend:
    """Make the weights of a plan.

    SpotDiffusion (arXiv 2407.15507) does not blend: each cell comes from the window whose core holds it.
    """
    if method == "SpotDiffusion":
        return Blend({}, None)
    shapes = {(window.rect.height, window.rect.width) for window in plan.windows}
    weights = {shape: blend_weight(method, *shape).to(device) for shape in shapes}
    total = torch.zeros(plan.height, plan.width, device=device)
    for window in plan.windows:
        total[slices(window.rect)] += weights[window.rect.height, window.rect.width]
    return Blend(weights, total)


def shift_offsets(method: str, steps: int, side: int, patch: int, seed: int) -> list[tuple[int, int]]:
    """How far SpotDiffusion moves its grid at each step: multiples of an eighth of the side.

    random: uniform. sorted: the same, in growing order. fibonacci: the golden ratio's sequence, which spreads seams most evenly.
    """
    if method not in SHIFTS:
        raise ValueError(f"shift_method: expected one of {', '.join(SHIFTS)}, got {method!r}.")
    places = torch.rand(steps, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if method == "sorted":
        places = places.sort(0).values
    if method == "fibonacci":
        ratios = torch.tensor([0.6180339887498949, 0.7548776662466927], dtype=torch.float64)
        places = (places[:1] + torch.arange(steps)[:, None] * ratios) % 1
    stride = max(side // 8 // patch, 1) * patch
    return [(down * stride, across * stride) for down, across in (places * (side // stride)).long().tolist()]


def slices(rect: Rect) -> tuple:
    """Index of a rectangle in the last two dimensions."""
    return ..., slice(rect.top, rect.bottom), slice(rect.left, rect.right)


@dataclass(frozen=True, slots=True)
class _Axis:
    """The squares of one side along one axis of the latent; the last takes what the overlap reaches anyway."""

    length: int
    side: int
    offset: int
    overlap: int

    @property
    def size(self) -> int:
        return min(self.side + 2 * self.overlap, self.length)

    @property
    def count(self) -> int:
        if self.size == self.length:
            return 1
        return max(math.ceil((self.length + self.offset - self.overlap) / self.side), 1)

    def square_of(self, cells: torch.Tensor) -> torch.Tensor:
        return ((cells + self.offset) // self.side).clamp(max=self.count - 1)

    def core(self, square: int) -> tuple[int, int]:
        start = square * self.side - self.offset
        last = square == self.count - 1
        return max(start, 0) if self.count > 1 else 0, self.length if last else min(start + self.side, self.length)

    def window(self, square: int) -> tuple[int, int]:
        start = square * self.side - self.offset - self.overlap
        last = square == self.count - 1
        start = self.length - self.size if last else max(0, min(start, self.length - self.size))
        return start, start + self.size


def _pool(values: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, axes: tuple[_Axis, _Axis]) -> torch.Tensor:
    """Sum values into the squares that `rows` and `cols` name."""
    tall = torch.zeros(axes[0].count, values.shape[1], dtype=values.dtype).index_add_(0, rows, values)
    return torch.zeros(axes[0].count, axes[1].count, dtype=values.dtype).index_add_(1, cols, tall)


def _chosen(axes, counts, whole) -> tuple[Window, ...]:
    """Walk down from the largest squares to those that were cheapest as one window."""
    windows = []
    wanted = counts[-1] > 0
    for level in range(len(axes) - 1, -1, -1):
        taken = wanted & whole[level]
        for row, col in taken.nonzero().tolist():
            (top, bottom), (left, right) = axes[level][0].window(row), axes[level][1].window(col)
            (core_top, core_bottom), (core_left, core_right) = axes[level][0].core(row), axes[level][1].core(col)
            windows.append(Window(Rect(top, left, bottom, right), Rect(core_top, core_left, core_bottom, core_right)))
        if level:
            rest, below = wanted & ~taken, axes[level - 1]
            parents = [torch.arange(axis.count).div(2, rounding_mode="floor").clamp(max=parent.count - 1) for axis, parent in zip(below, axes[level])]
            wanted = rest[parents[0]][:, parents[1]] & (counts[level - 1] > 0)
    return tuple(windows)


def _core_only(window: Window, like: torch.Tensor) -> torch.Tensor:
    """1 on the window's core, 0 on the rest of it."""
    weight = like.new_zeros(window.rect.height, window.rect.width)
    core, rect = window.core, window.rect
    weight[core.top - rect.top:core.bottom - rect.top, core.left - rect.left:core.right - rect.left] = 1
    return weight

"""What does the plan of a photo cost? Eight photos, their trees, and the cells that the model would see."""
from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from PIL import Image
from qtd_pack.denoise_schedule import share_at
from qtd_pack.quadtree import CellStatistics, Quadtree, grow_quadtree, measure_cells
from qtd_pack.sampling_run import strengths_in_cells
from qtd_pack.settings import STEP_PX
from qtd_pack.windows import TilePlan, WindowCost, WindowSizes, full_grid, plan_windows, window_sizes

PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "moon", "retina", "rocket")
BUDGETS = (0.25, 0.4, 0.6)
CURVE_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CELL_PX = 8

# FLUX.1-dev: 2 x 2 cells to a token, 512 tokens of text, 3072 wide.
FLUX_DEV = WindowCost(patch=2, frames=1, text_tokens=512, width=3072)


def load_photo(name: str, side_px: int) -> torch.Tensor:
    """A photo of scikit-image's wheel, (1, H, W, 3) in 0..1, its longer side scaled to side_px and both cropped to 16 px."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    with Image.open(next(folder.glob(f"{name}.*"))) as file:
        photo = file.convert("RGB")
    scale = side_px / max(photo.size)
    photo = photo.resize([max(round(length * scale), 16) for length in photo.size], Image.LANCZOS)
    photo = photo.crop((0, 0, photo.width // 16 * 16, photo.height // 16 * 16))
    return torch.from_numpy(numpy.asarray(photo, dtype=numpy.float32) / 255)[None]


@lru_cache(maxsize=None)
def photo_cells(name: str, side_px: int, min_leaf: int) -> CellStatistics:
    return measure_cells(load_photo(name, side_px), min_leaf, with_gradients=False)


@lru_cache(maxsize=None)
def photo_tree(name: str, side_px: int, budget: float, min_leaf: int = 64, max_leaf: int = 1024) -> Quadtree:
    return grow_quadtree(
        photo_cells(name, side_px, min_leaf), detail_budget=budget, content_threshold=0.0, max_leaf=max_leaf, min_denoise=0.0, max_denoise=1.0, metric="variance")


def tree_of_threshold(cells: CellStatistics, threshold: float, max_leaf: int) -> Quadtree:
    return grow_quadtree(cells, detail_budget=0.0, content_threshold=threshold, max_leaf=max_leaf, min_denoise=0.0, max_denoise=1.0, metric="variance")


@lru_cache(maxsize=None)
def threshold_tree(name: str, side_px: int, budget: float, min_leaf: int = 64, max_leaf: int = 1024) -> Quadtree:
    """The old rule: squares are split while their content exceeds one threshold, whose mean strength comes nearest to the budget."""
    cells, low, high = photo_cells(name, side_px, min_leaf), 1.0, 450.0
    found = [tree_of_threshold(cells, threshold, max_leaf) for threshold in (low, high)]
    for _ in range(24):
        middle = (low + high) / 2
        found.append(tree_of_threshold(cells, middle, max_leaf))
        low, high = (middle, high) if found[-1].mean_strength > budget else (low, middle)
    return min(found, key=lambda tree: abs(tree.mean_strength - budget))


@dataclass(frozen=True, slots=True)
class Redrawn:
    """What a tree redraws of a picture: shares from 0 to 1.

    content: of the content of the smallest cells, strength for strength. busiest: mean strength of the busiest tenth of
    them. busiest_kept, kept: strength 0 among those and in the whole. strength: mean.
    """

    content: float
    busiest: float
    busiest_kept: float
    kept: float
    strength: float


def smallest_cells(cells: CellStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Content and area of each, in order."""
    leaves = tree_of_threshold(cells, 0.0, cells.cell_px).leaves
    found = torch.tensor([(leaf.detail, leaf.rect.height * leaf.rect.width) for leaf in leaves], dtype=torch.float64)
    return found[:, 0], found[:, 1]


def redrawn(tree: Quadtree, cells: CellStatistics) -> Redrawn:
    content, area = smallest_cells(cells)
    strength = cell_strengths(tree).flatten()
    busiest = strength[content >= content.quantile(0.9)]
    return Redrawn(
        float((strength * content * area).sum() / (content * area).sum()), float(busiest.mean()), float((busiest == 0).double().mean()),
        tree.kept_share, tree.mean_strength)


def cell_strengths(tree: Quadtree) -> torch.Tensor:
    """The strength over each smallest cell, (rows, cols)."""
    grid = torch.zeros(-(-tree.height // tree.min_leaf), -(-tree.width // tree.min_leaf), dtype=torch.float64)
    for leaf in tree.leaves:
        top, left, side = (length // tree.min_leaf for length in (leaf.rect.top, leaf.rect.left, leaf.side))
        grid[top:top + side, left:left + side] = leaf.strength
    return grid


@dataclass(frozen=True)
class PlannedRun:
    """The plan of each step of an img2img run, and the full grid beside it."""

    plans: tuple[TilePlan, ...]
    grid: TilePlan
    mean_strength: float

    @property
    def cost(self) -> float:
        """As a share of the full grid's."""
        return sum(plan.cost for plan in self.plans) / (self.grid.cost * len(self.plans))

    @property
    def cells(self) -> int:
        return sum(cells_of(plan) for plan in self.plans)


def cells_of(plan: TilePlan) -> int:
    """What the model sees in one step of one image."""
    return sum(window.rect.height * window.rect.width for window in plan.windows)


def sizes_px(min_window: int, max_window: int, overlap: int = 64, *, shapes: str = "tight", patch: int = 2, cell_px: int = CELL_PX) -> WindowSizes:
    """The windows' sizes as the node's inputs give them, in pixels."""
    step = STEP_PX if shapes == "tight" else 0
    return window_sizes(*(length // cell_px for length in (min_window, max_window, overlap)), patch, step=step // cell_px)


def planned_run(tree, *, steps: int = 20, sizes: WindowSizes | None = None, cost: WindowCost = FLUX_DEV, cell_px: int = CELL_PX) -> PlannedRun:
    """Plan a run by this tree over its own picture; tight windows of 256 to 1024 px with 64 px of overlap unless told."""
    sizes = sizes or sizes_px(256, 1024, patch=cost.patch, cell_px=cell_px)
    height, width = tree.height // cell_px, tree.width // cell_px
    strengths = strengths_in_cells(tree, height, width)
    known: dict[int, TilePlan] = {}
    plans = []
    for step in range(steps):
        active = share_at("img2img", strengths, step / steps) > 0
        count = int(active.sum())
        if count not in known:
            known[count] = plan_windows(active, sizes, cost)
        plans.append(known[count])
    return PlannedRun(tuple(plans), full_grid(height, width, sizes, cost), tree.mean_strength)


def curve(tree_of: Callable[..., Quadtree], plan_run: Callable, photos, side: int, budgets, max_leaf: int) -> list[tuple[float, float]]:
    """Cost of a run and content redrawn, mean of the photos, for each budget."""
    points = []
    for budget in budgets:
        trees = [tree_of(name, side, budget, 64 * side // 2048, max_leaf * side // 2048) for name in photos]
        content = statistics.mean(redrawn(tree, photo_cells(name, side, tree.min_leaf)).content for name, tree in zip(photos, trees))
        points.append((statistics.mean(plan_run(tree).cost for tree in trees), content))
    return points


def pairs(photos=PHOTOS, side: int = 2048, budgets=CURVE_BUDGETS, max_leaf: int = 512) -> dict[str, list[tuple[float, float]]]:
    """The curves of the old pair and of the new one, (cost, content redrawn) in growing order."""
    of_shapes = lambda shapes: lambda tree: planned_run(tree, sizes=sizes_px(*(length * side // 2048 for length in (256, 1024, 64)), shapes=shapes))
    return {
        "one threshold, square windows": curve(threshold_tree, of_shapes("square"), photos, side, budgets, max_leaf),
        "best tree, tight windows": curve(photo_tree, of_shapes("tight"), photos, side, budgets, max_leaf),
    }


def at_cost(points: list[tuple[float, float]], cost: float) -> float:
    """The content redrawn at a cost, between the points of a curve; nothing is redrawn for nothing, and all by the last."""
    return float(numpy.interp(cost, [0.0, *(paid for paid, _ in points)], [0.0, *(content for _, content in points)]))

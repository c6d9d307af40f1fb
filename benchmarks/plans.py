"""What does the plan of a photo cost? Eight photos, their trees, and the cells that the model would see."""
from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from PIL import Image
from qtd_pack.denoise_schedule import share_at
from qtd_pack.quadtree import build_quadtree
from qtd_pack.sampling_run import strengths_in_cells
from qtd_pack.windows import TilePlan, WindowCost, WindowSizes, full_grid, plan_windows, window_sizes

PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "moon", "retina", "rocket")
BUDGETS = (0.25, 0.4, 0.6)
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
def photo_tree(name: str, side_px: int, budget: float, min_leaf: int = 64, max_leaf: int = 1024):
    return build_quadtree(load_photo(name, side_px), detail_budget=budget, min_leaf=min_leaf, max_leaf=max_leaf)


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


def planned_run(tree, *, steps: int = 20, sizes: WindowSizes | None = None, cost: WindowCost = FLUX_DEV, cell_px: int = CELL_PX) -> PlannedRun:
    """Plan a run by this tree over its own picture; windows of 256 to 1024 px with 64 px of overlap unless told."""
    sizes = sizes or window_sizes(256 // cell_px, 1024 // cell_px, 64 // cell_px, cost.patch)
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

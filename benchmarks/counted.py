"""What do the host's full-size models take for a run, without a GPU? Operations, counted and not timed."""
from __future__ import annotations

import math
import statistics
from collections import Counter

import comfy.conds
import torch
from measuring import table
from qtd_pack.model_facts import patch_cells, window_cost
from qtd_pack.settings import STEP_PX
from qtd_pack.tiled_diffusion import TiledDiffusion
from qtd_pack.windows import TilePlan, WindowCost, WindowSizes, window_sizes

from full_size import MODELS, built, operations
from plans import BUDGETS, PHOTOS, photo_tree, planned_run

COUNTED = ("FLUX.1-dev", "FLUX.2-dev", "SDXL", "Qwen-Image", "Wan 2.2 A14B image to video")
STEPS = 20


def counted(name: str, height: int, width: int) -> int:
    """Operations for a window; one that lies on its side takes as many."""
    return operations(name, *sorted((height, width)))


def operations_of(name: str, plans: tuple[TilePlan, ...]) -> int:
    """Of a run by these plans, one for each step: every shape is counted once and taken as often as it occurs."""
    shapes = Counter((window.rect.height, window.rect.width) for plan in plans for window in plan.windows)
    return sum(times * counted(name, *shape) for shape, times in shapes.items())


def price_of(name: str, height: int, width: int) -> WindowCost:
    """What the patch makes of this model and its text on a latent of so many cells."""
    full = MODELS[name]
    conds = {"c_crossattn": comfy.conds.CONDCrossAttn(torch.zeros(1, full.text[0], 1))}
    return window_cost(built(name), [[{"model_conds": conds}]], full.latent_shape(height, width))


def default_windows(name: str) -> WindowSizes:
    """The node's own, in cells of this model."""
    sides = (TiledDiffusion.min_window // MODELS[name].px, TiledDiffusion.max_window // MODELS[name].px, math.ceil(TiledDiffusion.tile_overlap / MODELS[name].px))
    return window_sizes(*sides, patch_cells(built(name)), step=math.ceil(STEP_PX / MODELS[name].px))


def photo_row(name: str, photo: str, side: int) -> dict[str, float]:
    """Operations of a run over one photo, plain, in the full grid and by budgets; and what the planner thinks of the latter."""
    px, row = MODELS[name].px, {}
    for budget in BUDGETS:
        tree = photo_tree(photo, side, budget, 64, 0)
        height, width = tree.height // px, tree.width // px
        run = planned_run(tree, steps=STEPS, sizes=default_windows(name), cost=price_of(name, height, width), cell_px=px)
        row |= {f"{budget}": operations_of(name, run.plans), f"{budget} planned": run.cost}
    return row | {"plain": STEPS * counted(name, height, width), "grid": operations_of(name, (run.grid,) * STEPS)}


def model_rows(name: str, photos, side: int) -> list[tuple]:
    """A row for each way to run, means of the photos."""
    found = [photo_row(name, photo, side) for photo in photos]
    mean = {key: statistics.mean(row[key] for row in found) for key in found[0]}
    share = lambda key, whole: f"{statistics.mean(row[key] / row[whole] for row in found):.3f}"
    rows = [("plain, the whole canvas at once", "plain", "-"), ("full grid", "grid", "1.000")]
    rows += [(f"budget {budget}", f"{budget}", f"{mean[f'{budget} planned']:.3f}") for budget in BUDGETS]
    return [(name, side, text, f"{mean[key] / 1e15:.3g}", share(key, "grid"), planned, share(key, "plain")) for text, key, planned in rows]


def operations_part(tiny: bool) -> str:
    """Part f."""
    names, photos, sides = (("Lumina 2",), PHOTOS[:1], (512,)) if tiny else (COUNTED, PHOTOS, (2048, 4096))
    rows = [row for name in names for side in sides for row in model_rows(name, photos, side)]
    return "## f. Full-size models without a GPU: operations\n\n" + table(
        ("model", "side, px", "", "10^15 operations", "of the full grid", "as planned", "of plain"), rows) + (
        f"\nCounted, not timed: multiplications and additions of the host's networks at their published widths and depths, counted by torch on its `meta` device, "
        f"which has no weights and computes nothing. Means of eight photos, {STEPS} steps, one conditioning, the node's own windows, overlap and leaves; each shape of window "
        "was counted once. How long they take, part e tells where there is a GPU. The video has 81 frames.\n")

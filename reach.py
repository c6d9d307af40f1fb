"""How much of each cell is an entry of a conditioning about? In cells of the latent, in whole numbers of UNIT, on the CPU."""
from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F

import comfy.samplers

from .canvas import Canvas
from .conditioning import rect_of_area
from .utils import Rect, pieces

# In an entry: {"set", "number" (0: the whole picture), "share", "mask", "mask_strength", "region", "placed"}: the mask that it had
# before, its region's, and what the two make together.
REGION = "quadtree_region"

# Masks are summed in whole numbers of this, upwards, so that only nothing adds up to 0.
UNIT = 2 ** -20


def is_of_region(entry: dict) -> bool:
    """Whether an entry is one of a region, and none that has lost its mask."""
    return REGION in entry and "mask" in entry


def reach_of(entry: dict, canvas: Canvas) -> torch.Tensor:
    """How much an entry says of each cell, (images, height, width)."""
    return _units(entry.get("mask"), entry.get("mask_strength", 1.0), entry, canvas)


def own_reach(entry: dict, canvas: Canvas) -> torch.Tensor | None:
    """How much of each cell an entry of a region takes by itself; None where it takes all."""
    mask, strength = own_mask(entry, canvas)
    return None if mask is None and "area" not in entry else _units(mask, strength, entry, canvas)


def region_reach(entry: dict, canvas: Canvas) -> torch.Tensor:
    """How much of each cell is its region's, as far as the entry says something of it."""
    own = own_reach(entry, canvas)
    # Without one of its own, its mask is the region's.
    mask = entry["mask"] if own is None else in_cells(entry[REGION]["region"], canvas)
    region = _units(mask, 1.0, {"strength": entry.get("strength", 1.0)}, canvas)
    if own is None:
        return region
    return (region.double() * own * UNIT).ceil().long()


def own_mask(entry: dict, canvas: Canvas) -> tuple[torch.Tensor | None, float]:
    """The mask in cells that an entry of a region has of its own, and its strength: the one that it came with, or one that replaced the region's."""
    mark = entry[REGION]
    if _is_replaced(entry, canvas):
        return entry["mask"], entry.get("mask_strength", 1.0)
    return None if mark["mask"] is None else in_cells(mark["mask"], canvas), mark["mask_strength"]


def _is_replaced(entry: dict, canvas: Canvas) -> bool:
    """Whether a node has set another mask after the regions' own."""
    placed, mask = entry[REGION]["placed"], entry["mask"]
    key = "is replaced", id(placed), id(mask)
    if key not in canvas.prepared:
        canvas.prepared[key] = placed, mask, not torch.equal(_scaled(placed, canvas), mask)
    return canvas.prepared[key][-1]


def in_cells(mask: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """A mask as the host scales it to the latent, on its device; made once in a run."""
    key = "mask in cells", id(mask)
    if key not in canvas.prepared:
        canvas.prepared[key] = mask, _scaled(mask, canvas)
    return canvas.prepared[key][1]


def _scaled(mask: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    resolved = [{"mask": mask}]
    comfy.samplers.resolve_areas_and_cond_masks_multidim(resolved, canvas.shape[2:], canvas.device)
    return resolved[0]["mask"]


def _units(mask: torch.Tensor | None, strength: float, entry: dict, canvas: Canvas) -> torch.Tensor:
    """A mask within an entry's area, (images, height, width), in units; the mean of its frames. Nothing where a strength is 0."""
    if entry.get("strength", 1.0) == 0 or (mask is not None and strength == 0):
        return torch.zeros(1, *canvas.size, dtype=torch.int64)
    key = "units", id(mask), entry.get("area"), canvas.rows
    if key not in canvas.prepared:
        planes = torch.ones(1, 1, *canvas.size) if mask is None else mask[:canvas.rows].abs().float().cpu()
        units = (planes.flatten(1, -3).mean(1) if planes.ndim > 3 else planes).double().div(UNIT).ceil().long()
        if "area" in entry:
            place = rect_of_area(entry["area"])
            inside = torch.zeros_like(units)
            inside[:, place.top:place.bottom, place.left:place.right] = 1
            units *= inside
        canvas.prepared[key] = mask, units
    return canvas.prepared[key][1]


def sums(units: torch.Tensor, rects: Sequence[Rect]) -> list[int]:
    """The sum in each rectangle."""
    total: numpy.ndarray = F.pad(units.cumsum(0).cumsum(1), (1, 0, 1, 0)).numpy()
    return [
        sum(int(total[part.bottom, part.right] - total[part.top, part.right] - total[part.bottom, part.left] + total[part.top, part.left])
            for part, _ in pieces(rect, *units.shape))
        for rect in rects]

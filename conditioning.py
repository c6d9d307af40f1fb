"""What does one window see of each conditioning? Everything here is in cells of the latent.

Anything spatial is cut to the window, anything else passes whole. Windows of a batch are stacked along the rows: all
images of the first window, then all of the second, which is the order in which the host repeats rows to a batch.
"""
from __future__ import annotations

import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

import comfy.conds
import comfy.samplers
import comfy.utils

from .quadtree import Rect
from .windows import slices


@dataclass(frozen=True)
class Canvas:
    """The latent that the windows are cut from.

    shape: of x, (B, C, [T,] height, width). cache: what was prepared once for the run.
    """

    shape: tuple[int, ...]
    cache: dict

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]


def cut_latent(latent: torch.Tensor, rects: Sequence[Rect]) -> torch.Tensor:
    """The windows of a latent (B, ..., H, W) as rows, (windows * B, ..., h, w)."""
    if len(rects) == 1:
        return latent[slices(rects[0])]
    return torch.cat([latent[slices(rect)] for rect in rects])


def cut_conds(conds: Sequence[list[dict] | None], rects: Sequence[Rect], canvas: Canvas) -> list[list[dict] | None]:
    """Cut every conditioning to a batch of windows of one shape and one kind (see kind_of_window)."""
    return [None if entries is None else [cut for entry in entries if (cut := _cut_entry(entry, rects, canvas)) is not None] for entries in conds]


def kind_of_window(conds: Sequence[list[dict] | None], rect: Rect) -> Hashable:
    """Windows of one kind may share a batch: the host takes one area per conditioning and batch."""
    entries = [entry for entries in conds if entries is not None for entry in entries]
    return tuple(_area_in_window(entry["area"], rect) for entry in entries if "area" in entry)


def _cut_entry(entry: dict, rects: Sequence[Rect], canvas: Canvas) -> dict | None:
    """One conditioning for a batch of windows, or None if its area misses them."""
    cut = dict(entry)
    # Caches of other nodes are keyed on this: it has to name the windows, too, and stay the same at every step.
    cut["uuid"] = uuid.uuid5(entry["uuid"], repr(rects))
    cut["model_conds"] = {key: _cut_cond(value, rects, canvas) for key, value in entry["model_conds"].items()}
    if "area" in entry:
        area = _area_in_window(entry["area"], rects[0])
        if area is None:
            return None
        cut["area"] = area
        if "mask" not in entry:
            cut["mask"], cut["mask_strength"] = _area_mask(entry["area"], canvas), 1.0
    if "mask" in cut:
        cut["mask"] = _stack(cut["mask"], rects, canvas)
    return cut


def _cut_cond(cond: comfy.conds.CONDRegular, rects: Sequence[Rect], canvas: Canvas):
    """Cut the tensors of one conditioning that are as large as the latent."""
    if torch.is_tensor(cond.cond):
        return cond._copy_with(_stack(cond.cond, rects, canvas)) if _is_spatial(cond.cond, canvas) else cond
    if isinstance(cond, comfy.conds.CONDList):
        return cond._copy_with([_stack(value, rects, canvas) if _is_spatial(value, canvas) else value for value in cond.cond])
    return cond


def _is_spatial(value: torch.Tensor, canvas: Canvas) -> bool:
    return value.ndim >= 4 and tuple(value.shape[-2:]) == canvas.size


def _stack(value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor:
    """Cut a tensor with a row for all images, or one each, to windows."""
    if len(rects) > 1:
        value = comfy.utils.repeat_to_batch_size(value, canvas.rows)
    return cut_latent(value, rects)


def _area_in_window(area: tuple[int, ...], rect: Rect) -> tuple[int, ...] | None:
    """The part of an area (sizes, then offsets) inside a window, in the window's cells; None if there is none."""
    dims = len(area) // 2
    height, width, top, left = area[dims - 2], area[dims - 1], area[-2], area[-1]
    part = Rect(max(top, rect.top), max(left, rect.left), min(top + height, rect.bottom), min(left + width, rect.right))
    if part.height <= 0 or part.width <= 0:
        return None
    return (*area[:dims - 2], part.height, part.width, *area[dims:-2], part.top - rect.top, part.left - rect.left)


def _area_mask(area: tuple[int, ...], canvas: Canvas) -> torch.Tensor:
    """The feathered weight that the host gives an area of the whole latent, (1, [T,] H, W).

    The host feathers a given number of cells inside an area's edge; done per window, edges that lie outside the
    window would lose theirs.
    """
    key = ("area", area)
    if key not in canvas.cache:
        like = torch.ones(1, 1, *canvas.shape[2:])
        weight = comfy.samplers.get_area_and_mult({"area": area, "model_conds": {}, "uuid": None}, like, None)
        mask = torch.zeros_like(like)[0]
        part = mask
        for dim, size in enumerate(weight.area[:len(weight.area) // 2]):
            part = part.narrow(dim + 1, weight.area[len(weight.area) // 2 + dim], size)
        part += weight.mult[0]
        canvas.cache[key] = mask
    return canvas.cache[key]

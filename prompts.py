"""Which prompts does one window get? In cells of the latent.

A prompt with a mask costs a row of the model in every window, although its mask may be 0 there: what says nothing of a
window's active cells is left out before the model is asked. Regions can go further: a window gets the prompt of one.
"""
from __future__ import annotations

import uuid
from collections.abc import Hashable, Sequence

import numpy
import torch
import torch.nn.functional as F

import comfy.samplers
import comfy.utils

from .canvas import Canvas
from .conditioning import rect_of_area
from .utils import Rect, pieces

# In an entry: {"set", "number" (0: the whole picture), "share", "mask", "mask_strength"}; the last two are what it had before.
REGION = "quadtree_region"

# Masks are summed in whole numbers of this, upwards, so that only nothing adds up to 0.
_UNIT = 2 ** -20

# Two regions cover equally much if they differ by no more than arithmetic leaves of a share.
_TIE = 1e-6

# Where masks add up to 1, arithmetic leaves less than this for the whole picture.
_NOTHING = 1e-5


def region_conditioning(whole: list, regions: Sequence[list], masks: Sequence[torch.Tensor], *, per_window: bool, share: float) -> list:
    """One conditioning of ordinary masked entries: each region's, and the whole picture's where they leave something.

    whole, regions: as the host's nodes pass them. masks: ([b,] height, width), one for each region, of one aspect. share: of
    the whole picture's prompt within regions. per_window: mark the entries, so that windows get the prompt of one region.
    A mask that an entry has is multiplied; areas are kept, but none is made from a mask. A region whose mask is 0 everywhere
    is left out. Raises ValueError for lists of different lengths and masks of different aspects.
    """
    if len(regions) != len(masks):
        raise ValueError(
            f"regions: expected as many as masks, {len(masks)}, got {len(regions)}. "
            "Encode the texts of Quadtree Region Text, all of them and nothing else, and connect the masks of the same Quadtree Regions.")
    placed = [(number, cond, mask) for number, (cond, mask) in enumerate(zip(regions, _of_one_size(masks)), 1) if bool(mask.any())]
    if not placed:
        return whole
    rest = 1 - (1 - share) * sum(mask for *_, mask in placed).clamp(0, 1)
    name = str(uuid.uuid4()) if per_window else None
    found = [_masked(entry, torch.where(rest < _NOTHING, 0.0, rest), 1.0, name, 0, share) for entry in whole]
    for number, cond, mask in placed:
        found += [_masked(entry, mask, 1 - share, name, number, share) for entry in cond]
    return found


def _of_one_size(masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The masks (b, height, width) in the size of the first."""
    found = [(mask[None] if mask.ndim == 2 else mask).float() for mask in masks]
    for number, mask in enumerate(found, 1):
        (height, width), (rows, cols) = found[0].shape[-2:], mask.shape[-2:]
        if abs(rows * width - cols * height) > max(height, width, rows, cols):
            raise ValueError(
                f"masks: expected masks of one picture, {width} x {height} px or of that aspect, got {cols} x {rows} for region {number}. "
                "Connect the masks of one Quadtree Regions.")
    return [_scaled(mask, found[0]) for mask in found]


def _scaled(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask in the size of another one, as the host would scale it to a latent."""
    height, width = like.shape[-2:]
    if tuple(mask.shape[-2:]) == (height, width):
        return mask
    return comfy.utils.common_upscale(mask[:, None], width, height, "bilinear", "none")[:, 0]


def _masked(entry: list, mask: torch.Tensor, strength: float, name: str | None, number: int, share: float) -> list:
    """An entry where a mask is, with the mask that it had."""
    tokens, extras = entry[0], entry[1]
    own, own_strength = extras.get("mask"), extras.get("mask_strength", 1.0)
    placed = {"mask": mask, "mask_strength": strength, "set_area_to_bounds": False}
    if own is not None:
        own = (own[None] if own.ndim == 2 else own).float()
        placed |= {"mask": _scaled(own, mask) * mask.to(own.device), "mask_strength": strength * own_strength}
    if name is not None:
        placed[REGION] = {"set": name, "number": number, "share": share, "mask": own, "mask_strength": own_strength}
    return [tokens, extras | placed, *entry[2:]]


def prompts_of_windows(
    conds: Sequence[list[dict] | None], rects: Sequence[Rect], active: torch.Tensor, sigma: torch.Tensor, canvas: Canvas,
) -> list[Sequence[list[dict] | None]]:
    """The conditionings of each window: without what says nothing of its active cells, and of each set of regions with one.

    active: (height, width), the cells that are sampled at this sigma, on the CPU. Entries of one window are those of another
    or, in their place, ones that say something else.
    """
    entries = [entry for entries in conds for entry in entries or ()]
    if not any(_is_placed(entry) for entry in entries):
        return [conds] * len(rects)
    are_on = [is_on(entry, sigma) for entry in entries]
    key = "prompts", id(active), tuple(rects), tuple((entry["uuid"], id(entry.get("mask"))) for entry in entries), tuple(are_on)
    if key not in canvas.prepared:
        on = iter(are_on)
        canvas.prepared[key] = active, [entries and _choices(entries, rects, active, [next(on) for _ in entries], canvas) for entries in conds]
    _, choices = canvas.prepared[key]
    return list(zip(*(_asked(entries, of_cond, canvas) if entries else [entries] * len(rects) for entries, of_cond in zip(conds, choices))))


def _is_placed(entry: dict) -> bool:
    return "default" not in entry and ("mask" in entry or entry.get("strength", 1.0) == 0)


def is_on(entry: dict, sigma: torch.Tensor) -> bool:
    """Whether the host asks for an entry at this sigma."""
    start, end = entry.get("timestep_start"), entry.get("timestep_end")
    return not (start is not None and sigma[0] > start or end is not None and sigma[0] < end)


def _choices(entries: list[dict], rects: Sequence[Rect], active: torch.Tensor, is_on: Sequence[bool], canvas: Canvas) -> list[list[tuple[int, float | None]]]:
    """For each window the entries that it gets: their index, and the part of the strength that is left to one of a region."""
    says = [_sums(_reach(entry, canvas) * active, rects) if _is_placed(entry) else [1] * len(rects) for entry in entries]
    return [_choice(entries, [of_entry[index] for of_entry in says], is_on) for index in range(len(rects))]


def _choice(entries: list[dict], says: Sequence[int], is_on: Sequence[bool]) -> list[tuple[int, float | None]]:
    covered: dict[Hashable, dict[int, int]] = {}
    for entry, amount, on in zip(entries, says, is_on):
        if REGION in entry and on and amount and entry[REGION]["number"]:
            of_set = covered.setdefault(entry[REGION]["set"], {})
            of_set[entry[REGION]["number"]] = max(amount, of_set.get(entry[REGION]["number"], 0))
    found = []
    for index, entry in enumerate(entries):
        part = _part_of_window(entry, covered) if REGION in entry else None
        if (is_on[index] and part > 0) if REGION in entry else says[index]:
            found.append((index, part))
    return found


def _part_of_window(entry: dict, covered: dict) -> float:
    """What part of its strength a region's entry has in a window, given how much each region covers of it."""
    of_set, number, share = covered.get(entry[REGION]["set"], {}), entry[REGION]["number"], entry[REGION]["share"]
    if not of_set:
        return float(number == 0)
    most = max(of_set.values())
    first = min(other for other, amount in of_set.items() if amount >= most * (1 - _TIE))
    return share if number == 0 else (1 - share) * (number == first)


def _asked(entries: list[dict], choices: Sequence[Sequence[tuple[int, float | None]]], canvas: Canvas) -> list[list[dict]]:
    """What the host is to see of a conditioning in each window. Where an entry occurs again, it is the same object."""
    made = {(index, part): entries[index] if part is None else _unmarked(entries[index], part, canvas) for choice in choices for index, part in choice}
    return [[made[chosen] for chosen in choice] for choice in choices]


def _unmarked(entry: dict, part: float, canvas: Canvas) -> dict:
    """The entry of a region, on and all over a window, but for the mask that it came with."""
    mark = entry[REGION]
    found = {key: value for key, value in entry.items() if key not in (REGION, "mask", "mask_strength", "timestep_start", "timestep_end")}
    if mark["mask"] is not None:
        found |= {"mask": _in_cells(mark["mask"], canvas), "mask_strength": mark["mask_strength"]}
    return found | {"strength": entry.get("strength", 1.0) * part}


def _in_cells(mask: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    key = "mask in cells", id(mask)
    if key not in canvas.prepared:
        resolved = [{"mask": mask}]
        comfy.samplers.resolve_areas_and_cond_masks_multidim(resolved, canvas.shape[2:], canvas.device)
        canvas.prepared[key] = mask, resolved[0]["mask"]
    return canvas.prepared[key][1]


def _reach(entry: dict, canvas: Canvas) -> torch.Tensor:
    """How much an entry with a mask says of each cell, (height, width), in units; the mean of its images and frames."""
    if entry.get("strength", 1.0) == 0 or ("mask" in entry and entry.get("mask_strength", 1.0) == 0):
        return torch.zeros(canvas.size, dtype=torch.int64)
    key = "reach", id(entry["mask"]), entry.get("area"), canvas.rows
    if key not in canvas.prepared:
        mask = entry["mask"][:canvas.rows].abs().flatten(0, -3).float().mean(0).cpu()
        units = (mask.double() / _UNIT).ceil().long()
        if "area" in entry:
            inside = torch.zeros_like(units)
            place = rect_of_area(entry["area"])
            inside[place.top:place.bottom, place.left:place.right] = 1
            units *= inside
        canvas.prepared[key] = entry["mask"], units
    return canvas.prepared[key][1]


def _sums(units: torch.Tensor, rects: Sequence[Rect]) -> list[int]:
    """The sum in each rectangle."""
    total: numpy.ndarray = F.pad(units.cumsum(0).cumsum(1), (1, 0, 1, 0)).numpy()
    return [
        sum(int(total[part.bottom, part.right] - total[part.top, part.right] - total[part.bottom, part.left] + total[part.top, part.left])
            for part, _ in pieces(rect, *units.shape))
        for rect in rects]

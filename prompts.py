"""Which prompts does one window get? In cells of the latent.

A prompt with a mask costs a row of the model in every window, although its mask may be 0 there: what says nothing of a
window's active cells is left out before the model is asked. Regions can go further: a window gets the prompt of one.
"""
from __future__ import annotations

import logging
import uuid
from collections.abc import Hashable, Sequence

import torch

import comfy.utils

from .canvas import Canvas
from .reach import REGION, UNIT, in_cells, is_of_region, own_mask, own_reach, reach_of, region_reach, sums
from .utils import Rect, cut

# Two regions cover equally much if they differ by no more than arithmetic leaves of a share.
_TIE = 1e-6

# Where masks add up to 1, arithmetic leaves less than this for the whole picture.
_NOTHING = 1e-5

log = logging.getLogger(__name__)


def region_conditioning(whole: list, regions: Sequence[list], masks: Sequence[torch.Tensor], *, per_window: bool, share: float) -> list:
    """One conditioning of ordinary masked entries: each region's, and the whole picture's where they leave something.

    whole, regions: as the host's nodes pass them. masks: ([b,] height, width), one for each region, of one aspect. share: of
    the whole picture's prompt within regions. per_window: mark the entries, so that windows get the prompt of one region.
    A mask that an entry has is multiplied; areas are kept, but none is made from a mask. A region whose mask is 0 everywhere
    is left out. Raises ValueError for lists of different lengths and masks that do not belong to one picture.
    """
    if len(regions) != len(masks):
        raise ValueError(
            f"regions: expected as many as masks, {len(masks)}, got {len(regions)}. "
            "Encode the texts of Quadtree Region Text, all of them and nothing else, and connect the masks of the same Quadtree Regions.")
    placed = [(number, cond, mask) for number, (cond, mask) in enumerate(zip(regions, _of_one_size(masks)), 1) if bool(mask.any())]
    _tell_left_out(sorted(set(range(1, len(masks) + 1)) - {number for number, *_ in placed}), len(masks))
    if not placed:
        return whole
    rest = 1 - (1 - share) * sum(mask for *_, mask in placed).clamp(0, 1)
    name = str(uuid.uuid4()) if per_window else None
    found = _masked(whole, torch.where(rest < _NOTHING, 0.0, rest), 1.0, name, 0, share)
    for number, cond, mask in placed:
        found += _masked(cond, mask, 1 - share, name, number, share)
    return found


def _tell_left_out(numbers: Sequence[int], of: int) -> None:
    if not numbers:
        return
    if len(numbers) == of:
        log.info("Quadtree Region Prompts: no mask is above 0 anywhere, so there is no region, and only the whole picture's prompt")
    else:
        log.info("Quadtree Region Prompts: masks of regions %s are 0 everywhere, so these prompts are left out", ", ".join(map(str, numbers)))


def _of_one_size(masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The masks (b, height, width) in the size of the first."""
    found = [(mask[None] if mask.ndim == 2 else mask).float() for mask in masks]
    for number, mask in enumerate(found, 1):
        (height, width), (rows, cols) = found[0].shape[-2:], mask.shape[-2:]
        if abs(rows * width - cols * height) > max(height, width, rows, cols):
            raise ValueError(
                f"masks: expected masks of one picture, {width} x {height} px or of that aspect, got {cols} x {rows} for region {number}. "
                "Connect the masks of one Quadtree Regions.")
    several = sorted({len(mask) for mask in found} - {1})
    if len(several) > 1:
        raise ValueError(f"masks: expected one for all pictures of a batch, or one for each of them, got masks of {' and of '.join(map(str, several))} pictures.")
    return [_scaled(mask, found[0]) for mask in found]


def _scaled(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask in the size of another one, as the host would scale it to a latent."""
    height, width = like.shape[-2:]
    if tuple(mask.shape[-2:]) == (height, width):
        return mask
    return comfy.utils.common_upscale(mask[:, None], width, height, "bilinear", "none")[:, 0]


def _masked(cond: list, mask: torch.Tensor, strength: float, name: str | None, number: int, share: float) -> list:
    """A conditioning's entries where a mask is, with the masks that they had."""
    return [_masked_entry(entry, mask, strength, part, name, number, share) for entry, part in zip(cond, _parts_of_combined(cond))]


def _parts_of_combined(cond: list) -> list[float]:
    """How much each entry of a conditioning counts, so that those that are on at a time count as one; ones with a place of their own count whole."""
    spans = [None if extras.keys() & {"mask", "area", "default"} else (extras.get("start_percent", 0.0), extras.get("end_percent", 1.0)) for _, extras, *_ in cond]
    everywhere = [span for span in spans if span is not None]
    found = []
    for span in spans:
        begins = [] if span is None else [start for start, _ in everywhere if span[0] <= start < span[1]]
        found.append(1 / max([sum(start <= begin < end for start, end in everywhere) for begin in begins], default=1))
    return found


def _masked_entry(entry: list, mask: torch.Tensor, strength: float, part: float, name: str | None, number: int, share: float) -> list:
    tokens, extras = entry[0], entry[1]
    own, own_strength = extras.get("mask"), extras.get("mask_strength", 1.0) * part
    placed = {"mask": mask, "mask_strength": strength * own_strength, "set_area_to_bounds": False}
    if own is not None:
        own = (own[None] if own.ndim == 2 else own).float()
        if len({len(own), len(mask), 1}) > 2:
            raise ValueError(f"{f'regions: the prompt of region {number}' if number else 'conditioning: it'} has a mask for {len(own)} pictures of a batch, where `masks` are for {len(mask)}.")
        placed["mask"] = _scaled(own, mask) * mask.to(own.device)
    if name is not None:
        placed[REGION] = {"set": name, "number": number, "share": share, "mask": own, "mask_strength": own_strength, "region": mask, "placed": placed["mask"]}
    return [tokens, extras | placed, *entry[2:]]


def prompts_of_windows(
    conds: Sequence[list[dict] | None], rects: Sequence[Rect], active: torch.Tensor, sigma: torch.Tensor, canvas: Canvas,
) -> list[Sequence[list[dict] | None]]:
    """The conditionings of each window: without what says nothing of its active cells, and of each set of regions with one.

    rects: the part of each window that counts. active: (height, width), the cells that are sampled at this sigma, on the CPU.
    Entries of one window are those of another or, in their place, ones that say something else.
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


def says_something(entry: dict, active: torch.Tensor, canvas: Canvas) -> bool:
    """Whether an entry says anything of the active cells, (height, width) on the CPU."""
    return not _is_placed(entry) or bool((reach_of(entry, canvas) * active).any())


# For each window the entries that it gets: their index, and the part of the strength that each image leaves to one of a region.
Choice = list[tuple[int, tuple[float, ...] | None]]


def _choices(entries: list[dict], rects: Sequence[Rect], active: torch.Tensor, is_on: Sequence[bool], canvas: Canvas) -> list[Choice]:
    says = [sums(reach_of(entry, canvas).sum(0) * active, rects) if _is_placed(entry) else [1] * len(rects) for entry in entries]
    members: dict[Hashable, dict[int, dict]] = {}
    for index, (entry, on) in enumerate(zip(entries, is_on)):
        if is_of_region(entry) and on:
            members.setdefault(entry[REGION]["set"], {})[index] = entry
    parts = {index: of_windows for of_set in members.values() for index, of_windows in _parts_of_set(of_set, rects, active, canvas).items()}
    found: list[Choice] = []
    for window in range(len(rects)):
        of_window = [(index, parts[index][window] if index in parts else () if is_of_region(entry) else None) for index, entry in enumerate(entries)]
        found.append([(index, part) for index, part in of_window if (any(part) if part is not None else says[index][window])])
    return found


def _parts_of_set(members: dict[int, dict], rects: Sequence[Rect], active: torch.Tensor, canvas: Canvas) -> dict[int, list[tuple[float, ...] | None]]:
    """The part of each entry of a set of regions in each window, image by image; None where the set is asked as its masks are.

    That is where the region that a window gets has a mask or an area of its own, and would leave cells without a prompt.
    """
    own = {index: own_reach(entry, canvas) for index, entry in members.items()}
    numbers = _winners(members, rects, active, canvas)
    found = {index: [tuple(_part(entry[REGION], number) for number in of_window) for of_window in numbers] for index, entry in members.items()}
    if all(reach is None for reach in own.values()):
        return found
    reach = {index: reach_of(entry, canvas) for index, entry in members.items()}
    heard = {index: None if own[index] is None else sums(own[index].sum(0) * active, rects) for index in members}
    for window in range(len(rects)):
        for index in members:
            if heard[index] is not None and not heard[index][window]:
                found[index][window] = ()
        if _has_hole(reach, own, {index: parts[window] for index, parts in found.items()}, rects[window], active):
            for parts in found.values():
                parts[window] = None
    return found


def _has_hole(reach: dict, own: dict, parts: dict, rect: Rect, active: torch.Tensor) -> bool:
    """Whether entries with these parts leave an active cell of a window to nobody, of which one of the set says something."""
    for image in range(max((len(part) for part in parts.values()), default=0)):
        chosen = [own[index] for index, part in parts.items() if part and part[image]]
        if any(one is None for one in chosen):
            continue
        said, given = (sum((one[image % len(one)] for one in several), torch.zeros_like(active, dtype=torch.int64)) for several in (reach.values(), chosen))
        if bool(cut((said > 0) & (given == 0) & active, rect).any()):
            return True
    return False


def _winners(members: dict[int, dict], rects: Sequence[Rect], active: torch.Tensor, canvas: Canvas) -> list[list[int]]:
    """The number of the region that covers most of the active cells of each window, for each image; 0 where what no region covers is more."""
    reach: dict[int, torch.Tensor] = {}
    for entry in members.values():
        number, units = entry[REGION]["number"], region_reach(entry, canvas)
        if number:
            reach[number] = torch.maximum(reach[number], units) if number in reach else units
    rest = torch.full((max(map(len, reach.values()), default=1), *canvas.size), round(1 / UNIT))
    for units in reach.values():
        rest -= units
    reach[0] = rest.clamp(min=0)
    covered = {number: [sums(units[image % len(units)] * active, rects) for image in range(len(rest))] for number, units in reach.items()}
    return [[_winner({number: of_images[image][window] for number, of_images in covered.items()}) for image in range(len(rest))] for window in range(len(rects))]


def _winner(covered: dict[int, int]) -> int:
    most = max((amount for number, amount in covered.items() if number), default=0)
    if not most or covered[0] > most * (1 + _TIE):
        return 0
    return min(number for number, amount in covered.items() if number and amount >= most * (1 - _TIE))


def _part(mark: dict, winner: int) -> float:
    """What part of its strength a region's entry has where this region was chosen."""
    if winner == 0:
        return float(mark["number"] == 0)
    return mark["share"] if mark["number"] == 0 else (1 - mark["share"]) * (mark["number"] == winner)


def _asked(entries: list[dict], choices: Sequence[Choice], canvas: Canvas) -> list[list[dict]]:
    """What the host is to see of a conditioning in each window. Where an entry occurs again, it is the same object."""
    made = {(index, parts): entries[index] if parts is None else _unmarked(entries[index], parts, canvas) for choice in choices for index, parts in choice}
    return [[made[chosen] for chosen in choice] for choice in choices]


def _unmarked(entry: dict, parts: tuple[float, ...], canvas: Canvas) -> dict:
    """The entry of a region, on and all over a window, but for a mask of its own; of images with other parts, each has its own."""
    found = {key: value for key, value in entry.items() if key not in (REGION, "mask", "mask_strength", "timestep_start", "timestep_end")}
    own, strength = own_mask(entry, canvas)
    part = parts[0] if len(set(parts)) == 1 else 1.0
    if len(set(parts)) > 1:
        like = in_cells(entry[REGION]["region"], canvas)[:1]
        of_images = torch.tensor(parts, device=like.device).view(-1, *[1] * (like.ndim - 1))
        own = of_images * (torch.ones_like(like) if own is None else comfy.utils.repeat_to_batch_size(own, len(parts)))
    if own is None:
        return found | {"strength": entry.get("strength", 1.0) * part * strength}
    return found | {"mask": own, "mask_strength": strength, "strength": entry.get("strength", 1.0) * part}

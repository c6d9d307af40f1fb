"""What does one window see of each conditioning? Everything here is in cells of the latent.

Anything spatial is cut to the window, anything else passes whole. Windows of a batch are stacked along the rows: all
images of the first window, then all of the second, which is the order in which the host repeats rows to a batch.

A conditioning is one of the host's dictionaries (RULES_OF_ENTRIES); its `model_conds` hold what its model made of it for
a latent of the canvas' size, by name (RULES_OF_CONDS).
"""
from __future__ import annotations

import math
import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch

import comfy.conds
import comfy.samplers
import comfy.utils

from .canvas import Canvas, cut_rows, passes_whole
from .control import counts_rows, cut_control
from .copies import are_copies
from .masks import cut_attention
from .patches import bring_patches
from .utils import Rect, common_part, cut, in_units_of, moved_to, parts_in_window

# What the host reads of an entry and can have only one of in a batch.
SAME_IN_A_BATCH = ("area", "default", "hooks", "mask_strength", "strength", "timestep_end", "timestep_start")

# The host repeats no text more often than this to make it as long as another.
MOST_PADDING = 4

# A conditioning of another size than the latent's is enlarged this often, if window borders run through its cells.
FINEST_SPLIT = 8


def cut_conds(conds: Sequence[Sequence[list[dict] | None]], rects: Sequence[Rect], canvas: Canvas) -> list[list[dict] | None]:
    """Cut the conditionings of each window of a batch, of one shape and one kind (see kind_of_window), to it."""
    return [
        None if of_windows[0] is None else [part for entries in zip(*of_windows) for part in _cut_entries(entries, rects, canvas)]
        for of_windows in zip(*conds)]


def rows_of(conds: Sequence[Sequence[dict] | None]) -> int:
    """How often the model is asked for each image of a window with these conditionings."""
    return sum(len(entries) for entries in conds if entries)


def kind_of_window(conds: Sequence[list[dict] | None], rect: Rect, canvas: Canvas) -> Hashable:
    """Windows of one kind may share a batch: the host takes one area, and one set of boxes, per conditioning and batch."""
    return tuple(None if entries is None else tuple(_kind_of_entry(entry, rect, canvas) for entry in entries) for entries in conds)


def _kind_of_entry(entry: dict, rect: Rect, canvas: Canvas) -> Hashable:
    parts = [part for part, _ in _parts_of_entry(entry, rect, canvas.size)]
    if not parts:
        return None
    boxes = [(id(text), *place) for part in parts for text, *place in _boxes_in_window(entry, rect, part, canvas.size)] if "gligen" in entry else []
    # The guides of LTX-Video are described for a whole batch by one list, and other packs may take rows for images.
    is_alone = "keyframe_idxs" in entry["model_conds"] or counts_rows(entry.get("control")) or bring_patches(entry.get("hooks"))
    return tuple(parts) if "area" in entry else (), tuple(boxes), rect if is_alone else None, _number_among_alike(entry, canvas)


@dataclass(frozen=True, eq=False)
class _Alike:
    """Entries that the host can evaluate together. known: what was made for each of them. lengths: of their texts, by name."""

    first: dict
    known: dict = field(default_factory=dict)
    lengths: dict[str, set[int]] = field(default_factory=dict)

    def takes(self, entry: dict, rows: int) -> bool:
        return _are_alike(entry, self.first, rows) and all(_pad_to_longest(lengths | self.lengths.get(key, set())) for key, lengths in _lengths(entry).items())

    def add(self, key: Hashable, entry: dict) -> None:
        self.known[key] = entry["model_conds"]
        for name, lengths in _lengths(entry).items():
            self.lengths.setdefault(name, set()).update(lengths)


def _number_among_alike(entry: dict, canvas: Canvas) -> int:
    """The same for entries that the host can evaluate together, each for a window of its own."""
    groups, key = canvas.prepared.setdefault("alike", []), (entry["uuid"], entry.get("strength"))
    for number, group in enumerate(groups):
        if group.known.get(key) is entry["model_conds"]:
            return number
    number = next((number for number, group in enumerate(groups) if group.takes(entry, canvas.rows)), len(groups))
    if number == len(groups):
        groups.append(_Alike(entry))
    groups[number].add(key, entry)
    return number


def _lengths(entry: dict) -> dict[str, set[int]]:
    """The lengths of an entry's texts, which the host pads where they differ."""
    return {key: {cond.cond.shape[1]} for key, cond in entry["model_conds"].items() if isinstance(cond, comfy.conds.CONDCrossAttn)}


def _pad_to_longest(lengths: set[int]) -> bool:
    """Whether the host, which pads to a multiple of all lengths, would pad to the longest; it then goes with whatever that goes with."""
    return math.lcm(*lengths) == max(lengths) <= MOST_PADDING * min(lengths)


def _are_alike(entry: dict, other: dict, rows: int) -> bool:
    """Whether two entries differ in nothing but what the model made of them, and that can be concatenated as the host does it."""
    shapes = [one["mask"].shape[1:] if "mask" in one else None for one in (entry, other)]
    conds, others = entry["model_conds"], other["model_conds"]
    return (
        all(are_copies(entry.get(key), other.get(key)) for key in ("control", "gligen"))
        and all(entry.get(key) == other.get(key) for key in SAME_IN_A_BATCH)
        and shapes[0] == shapes[1] and conds.keys() == others.keys() and all(_can_join(conds[key], others[key], rows) for key in conds))


def _can_join(cond, other, rows: int) -> bool:
    return type(cond) is type(other) and _of_so_many(cond, rows).can_concat(_of_so_many(other, rows))


def _of_so_many(cond, rows: int):
    """A value for so many images, of which only the shape matters: nothing is copied."""
    value = getattr(cond, "cond", None)
    if isinstance(cond, comfy.conds.CONDRegular) and torch.is_tensor(value) and value.ndim:
        cond = cond._copy_with(value[:1].expand(rows, *value.shape[1:]))
    return _as_rows(cond, rows)


def _as_rows(cond, rows: int):
    """What the host makes of a value for so many images, its area left as it is."""
    return cond.process_cond(batch_size=rows, area=None)


def _parts_of_entry(entry: dict, rect: Rect, size: tuple[int, int]) -> list[tuple[Rect, Rect]]:
    """The parts of its area, or of the whole, in a window; see parts_in_window. The host takes each for a conditioning of its own."""
    return parts_in_window(rect_of_area(entry["area"]) if "area" in entry else Rect(0, 0, *size), rect, size)


def _cut_entries(entries: Sequence[dict], rects: Sequence[Rect], canvas: Canvas) -> list[dict]:
    """What each window of a batch is given in one place: the same entry, or alike ones."""
    if all(entry is entries[0] for entry in entries):
        return _cut_entry(entries[0], rects, canvas)
    cuts = [_cut_entry({key: value for key, value in entry.items() if key != "control"}, [rect], canvas) for entry, rect in zip(entries, rects)]
    joined = [_joined(parts, canvas) for parts in zip(*cuts)]
    if "control" not in entries[0]:
        return joined
    return [part | _cut_entry_control(entries[0], rects, canvas, index) for index, part in enumerate(joined)]


def _joined(parts: Sequence[dict], canvas: Canvas) -> dict:
    """One entry with the rows of several."""
    found = parts[0] | {"uuid": uuid.uuid5(parts[0]["uuid"], repr([part["uuid"] for part in parts]))}
    if "mask" in found:
        found["mask"] = torch.cat([comfy.utils.repeat_to_batch_size(part["mask"], canvas.rows) for part in parts])
    found["model_conds"] = {}
    for key, first in parts[0]["model_conds"].items():
        value, *others = (_as_rows(part["model_conds"][key], canvas.rows) for part in parts)
        found["model_conds"][key] = first._copy_with(value.concat(others))
    return found


def _cut_entry(entry: dict, rects: Sequence[Rect], canvas: Canvas) -> list[dict]:
    """One conditioning for a batch of windows: once for each part of its area that they show."""
    found = []
    for index, (part, _) in enumerate(_parts_of_entry(entry, rects[0], canvas.size)):
        # Caches of other nodes are keyed on this: it has to name the windows, too, and stay the same at every step.
        cut_one = entry | {"uuid": uuid.uuid5(entry["uuid"], repr((rects, index) if index else rects))}
        for key, rule in RULES_OF_ENTRIES.items():
            if key in entry:
                cut_one |= rule(entry, rects, canvas, index)
        found.append(cut_one)
    return found


def _cut_area(entry: dict, rects: Sequence[Rect], canvas: Canvas, index: int) -> dict:
    """The area inside the windows, and its feathered weight as a mask, which replaces the host's own feathering."""
    area = {"area": _area_in_window(entry, rects[0], canvas, index)}
    if "mask" in entry:
        return area
    return area | {"mask": cut_rows(_area_weight(entry["area"], canvas), rects, canvas.rows), "mask_strength": 1.0}


def _cut_mask(entry: dict, rects: Sequence[Rect], canvas: Canvas, index: int) -> dict:
    return {"mask": cut_rows(entry["mask"], rects, canvas.rows)}


def _cut_gligen(entry: dict, rects: Sequence[Rect], canvas: Canvas, index: int) -> dict:
    """The boxes inside the windows, which may be none."""
    part, _ = _parts_of_entry(entry, rects[0], canvas.size)[index]
    return {"gligen": (*entry["gligen"][:2], _boxes_in_window(entry, rects[0], part, canvas.size))}


def _cut_entry_control(entry: dict, rects: Sequence[Rect], canvas: Canvas, index: int) -> dict:
    """The host scales a hint to what it samples: to an area, where there is one."""
    place = Rect(0, 0, *canvas.size)
    if "area" in entry:
        place = common_part(rect_of_area(entry["area"]), place)
    return {"control": cut_control(entry["control"], rects, place, canvas, index)}


def _cut_model_conds(entry: dict, rects: Sequence[Rect], canvas: Canvas, index: int) -> dict:
    conds = entry["model_conds"]
    if "vinput_mask" in conds:
        return {"model_conds": _laid_out_for_window(entry, rects, canvas, index)}
    return {"model_conds": {key: _cut_cond(key, cond, rects, canvas) for key, cond in conds.items()}}


RULES_OF_ENTRIES = {"area": _cut_area, "mask": _cut_mask, "gligen": _cut_gligen, "control": _cut_entry_control, "model_conds": _cut_model_conds}


def _area_in_window(entry: dict, rect: Rect, canvas: Canvas, index: int) -> tuple[int, ...]:
    """One part of an area (sizes, then offsets) inside a window, in the window's cells."""
    area, (part, _) = entry["area"], _parts_of_entry(entry, rect, canvas.size)[index]
    dims = len(area) // 2
    return (*area[:dims - 2], part.height, part.width, *area[dims:-2], part.top, part.left)


def rect_of_area(area: tuple[int, ...]) -> Rect:
    dims = len(area) // 2
    return Rect(area[-2], area[-1], area[-2] + area[dims - 2], area[-1] + area[dims - 1])


def _area_weight(area: tuple[int, ...], canvas: Canvas) -> torch.Tensor:
    """The feathered weight that the host gives an area of the whole latent, (1, [T,] H, W).

    The host feathers a given number of cells inside an area's edge; done per window, edges that lie outside the
    window would lose theirs.
    """
    key = "area", area, canvas.shape[2:]
    if key not in canvas.prepared:
        around, inner = _clear_of_borders(area, canvas)
        like = torch.ones(1, 1, *canvas.shape[2:-2], *around, device=canvas.device)
        found = comfy.samplers.get_area_and_mult({"area": inner, "model_conds": {}, "uuid": None}, like, None)
        weight = part = torch.zeros_like(like)[0]
        for dim in range(part.ndim - 1):
            part = part.narrow(dim + 1, found.area[part.ndim - 1 + dim], found.area[dim])
        part += found.mult[0]
        for dim, length, whole in zip((-2, -1), canvas.size, around):
            weight = weight.narrow(dim, (whole - length) // 2, length)
        canvas.prepared[key] = weight
    return canvas.prepared[key]


def _clear_of_borders(area: tuple[int, ...], canvas: Canvas) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The height and width of a canvas, and the area in it, with a cell beyond each border that does not end the picture.

    The host feathers no edge on a border. Where the picture goes on there, an edge is one like any other, unless the area goes on, too.
    """
    inner, around = list(area), []
    for place, wraps in enumerate(canvas.wraps, len(area) // 2 - 2):
        start, length = area[place + len(area) // 2], canvas.size[len(around)]
        inner[place] = min(area[place], length - start)
        margin = int(wraps and inner[place] < length)
        inner[place + len(area) // 2] += margin
        around.append(length + 2 * margin)
    return tuple(around), tuple(inner)


def _boxes_in_window(entry: dict, rect: Rect, part: Rect, size: tuple[int, int]) -> list[tuple]:
    """GLIGEN's boxes (embedding, height, width, top, left), moved and clipped to the part of the window that its area leaves."""
    corner = rect_of_area(entry["area"]) if "area" in entry else Rect(0, 0, 0, 0)
    found = []
    for embedding, height, width, top, left in entry["gligen"][2]:
        # The host counts boxes from the area's corner.
        top, left = top + corner.top, left + corner.left
        for box, _ in parts_in_window(Rect(top, left, top + height, left + width), rect, size):
            box = common_part(box, part)
            if box is not None:
                box = moved_to(box, part)
                found.append((embedding, box.height, box.width, box.top, box.left))
    return found


def _laid_out_for_window(entry: dict, rects: Sequence[Rect], canvas: Canvas, index: int) -> dict:
    """HiDream-O1's conditioning lists the tokens of a picture of one size, so its model has to list the window's."""
    area = _area_in_window(entry, rects[0], canvas, index) if "area" in entry else None
    size = rects[0].height, rects[0].width
    key = "layout", entry["uuid"], size, area
    if key not in canvas.prepared:
        noise = torch.empty(*canvas.shape[:-2], *size, device=canvas.device)
        canvas.prepared[key] = canvas.model.extra_conds(**entry | {"noise": noise, "device": canvas.device, "area": area})
    return canvas.prepared[key]


def _cut_cond(key: str, cond, rects: Sequence[Rect], canvas: Canvas):
    """Cut one of the values that the model made, by its name or its size."""
    value = getattr(cond, "cond", None)
    if key == "guide_attention_entries":
        return cond._copy_with([_guide_in_window(guide, rects[0], canvas) for guide in value])
    if isinstance(cond, comfy.conds.CONDList):
        return cond._copy_with([_cut_value(key, part, rects, canvas) for part in value])
    if isinstance(cond, comfy.conds.CONDRegular) and torch.is_tensor(value):
        return cond._copy_with(_cut_value(key, value, rects, canvas))
    if not (isinstance(cond, comfy.conds.CONDConstant) and (key in WHOLE or _is_plain(value))):
        passes_whole(canvas, f"conditioning {key!r}")
    return cond


def _cut_value(key: str, value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor:
    cut = None if key in WHOLE else RULES_OF_CONDS.get(key, _of_latent_size)(value, rects, canvas)
    if cut is not None:
        return cut
    if value.ndim >= 4 and key not in WHOLE and key not in REFERENCES:
        passes_whole(canvas, f"conditioning {key!r} of shape {tuple(value.shape)}")
    # The host repeats rows to the batch as a block, which suits windows only if a block is a window.
    if len(rects) > 1 and value.ndim > 0 and value.shape[0] > 1:
        return comfy.utils.repeat_to_batch_size(value, canvas.rows)
    return value


def _is_plain(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (int, float, str))


def _of_latent_size(value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor | None:
    if value.ndim < 4 or tuple(value.shape[-2:]) != canvas.size:
        return None
    return cut_rows(value, rects, canvas.rows)


def _in_proportion(value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor | None:
    """A tensor of another resolution that covers the canvas."""
    if value.ndim < 4:
        return None
    edges = {-2: [edge for rect in rects for edge in (rect.top, rect.bottom)], -1: [edge for rect in rects for edge in (rect.left, rect.right)]}
    for dim, places in edges.items():
        split = math.lcm(*(Fraction(place * value.shape[dim], canvas.shape[dim]).denominator for place in places))
        if split > FINEST_SPLIT:
            return None
        value = value.repeat_interleave(split, dim) if split > 1 else value
    ratios = (Fraction(value.shape[dim], canvas.shape[dim]) for dim in (-2, -1))
    return cut_rows(value, in_units_of(value, rects, *ratios), canvas.rows)


def _resized(value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor:
    """Stable Cascade's prior, resized as its network would for the whole canvas, so that the network leaves a window's as it is."""
    return cut_rows(torch.nn.functional.interpolate(value, canvas.size, mode="bilinear", align_corners=True), rects, canvas.rows)


def _attention_mask(value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor | None:
    """FLUX's mask of text and picture tokens by themselves, (b, tokens, tokens); other families' are of the text alone."""
    return cut_attention(value, rects, canvas) if value.ndim == 3 else None


def _keyframes(value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor | None:
    """LTX-Video's guides, (b, 3, tokens, 2): start and end of frame, row and column in px; a window's own px start at 0."""
    height, width = canvas.size
    if value.shape[2] % (height * width):
        return None
    rect, scales = rects[0], canvas.model.diffusion_model.vae_scale_factors
    rows, cols = (torch.arange(start, end, device=value.device) for start, end in ((rect.top, rect.bottom), (rect.left, rect.right)))
    tokens = value.unflatten(2, (-1, height, width))[:, :, :, rows[:, None] % height, cols % width]
    # Over the border px go on: what lies before 0 is at the end of the latent.
    tokens[:, 1] -= ((rows // height * -height + rect.top) * scales[1]).view(-1, 1, 1)
    tokens[:, 2] -= ((cols // width * -width + rect.left) * scales[2]).view(-1, 1)
    return tokens.flatten(2, 4)


def _guide_in_window(guide: dict, rect: Rect, canvas: Canvas) -> dict:
    """The size and the mask of one guide of LTX-Video. A small one has a token at every few cells, its latent_shape."""
    height, width = canvas.size
    frames, rows, cols = guide["latent_shape"]
    down, across = height // rows, width // cols
    part = Rect(math.ceil(rect.top / down), math.ceil(rect.left / across), math.ceil(rect.bottom / down), math.ceil(rect.right / across))
    found = guide | {
        "pre_filter_count": guide["pre_filter_count"] // (height * width) * rect.height * rect.width,
        "latent_shape": [frames, part.height, part.width]}
    if guide.get("pixel_mask") is not None:
        mask = guide["pixel_mask"]
        small = torch.nn.functional.interpolate(mask.flatten(0, 1), (rows, cols), mode="area")
        found["pixel_mask"] = cut(small.unflatten(0, mask.shape[:2]), part)
    return found


RULES_OF_CONDS = {
    "attention_mask": _attention_mask,
    "c_concat": _in_proportion,
    "camera_conditions": _in_proportion,
    "effnet": _resized,
    "keyframe_idxs": _keyframes,
    "lq_latent": _in_proportion,
    "pose_latents": _in_proportion,
    "ref_mask_latents": _in_proportion,
    "sam_latents": _in_proportion,
}

# Pictures beside the one that is sampled: those of the latent's size show the same place, others have places of their own.
REFERENCES = frozenset({"context_latents", "ref_latent", "ref_latents", "reference_latent", "reference_motion"})

# Known to have no place in the picture, although they have as many dimensions as a picture, or hold objects.
WHOLE = frozenset({
    "audio_embed", "audio_codes", "encoder_hidden_states_llama3", "face_pixel_values", "latent_shapes", "ref_audio", "ref_contexts", "refer_audio",
    "siglip_feats"})

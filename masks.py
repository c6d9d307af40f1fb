"""What does one window see of a mask or a picture that an object of another pack holds, and by what is one known?

By its name, that of the argument, attribute or variable that leads to it, and by its shape: the picture's proportion.
"""
from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy
import torch

import comfy.utils

from .canvas import Canvas, cut_rows
from .copies import reachable
from .utils import Rect, cut_latent, in_units_of

# Within something named for masks, these are none; nor are the weights of a layer, whose name has dots.
NO_MASK = re.compile(r"embed|cond(?!_hint)|sigma|timestep|strength|^[qkv]$|^(key|value|context|dtype|device)s?$|weight|bias|scale|token|latent|image|pixel|noise|\.")
NEVER = re.compile(r"embed|weights?$|bias$|\.")
PICTURE = re.compile(r"image|picture|pixel|latent|hint|control|canvas|photo|frame", re.IGNORECASE)
NO_PICTURE = re.compile(r"embed|cond|sigma|timestep|^[qkv]$|key|value|context|weight|bias|token|\.")


@dataclass(frozen=True, eq=False)
class View:
    """Windows in a place that something covers. rects: from the place's corner. size: of the place. All in cells."""

    rects: tuple[Rect, ...]
    size: tuple[int, int]
    canvas: Canvas

    @property
    def cell_px(self) -> int:
        return self.canvas.model.latent_format.spacial_downscale_ratio


def is_mask(path: Sequence[str]) -> bool:
    """True if the names that lead to a value say that it is a mask. The first is that of the object that holds it."""
    return _is_called("mask", path)


def is_hint(path: Sequence[str]) -> bool:
    return _is_called("hint", path)


def is_picture(path: Sequence[str]) -> bool:
    return bool(PICTURE.search(_own_name(path)))


def is_no_picture(path: Sequence[str]) -> bool:
    return bool(NO_PICTURE.search(_own_name(path)))


def _is_called(word: str, path: Sequence[str]) -> bool:
    own, names = _own_name(path), [name.lower() for name in (path[1:] or path)]
    if word in own:
        return not NEVER.search(own)
    return any(word in name for name in names) and not NO_MASK.search(own)


def _own_name(path: Sequence[str]) -> str:
    return next((name.lower() for name in reversed(path[1:] or path) if name), "")


def covers(value: torch.Tensor, view: View) -> tuple[int, int] | None:
    """The dimensions of height and width of a tensor in the proportion of a place: its last two, or those before colours.

    Or in that of the whole picture, which is laid over any place that a control covers.
    """
    for size in (view.size, view.canvas.size):
        if value.ndim >= 2 and _in_proportion(*value.shape[-2:], *size):
            return -2, -1
        if value.ndim >= 3 and value.shape[-1] <= 4 and _in_proportion(*value.shape[-3:-1], *size):
            return -3, -2
    return None


def _in_proportion(height: int, width: int, rows: int, cols: int) -> bool:
    """To a cell, since a host crops pictures to whole cells, and to an element."""
    return min(height, width) > 1 and abs(height - width * rows / cols) < max(1, width / cols)


def as_tensor(value) -> torch.Tensor | None:
    """A mask as a tensor, if it is one: real numbers, no indices."""
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "fbu":
        return torch.from_numpy(value)
    return value if torch.is_tensor(value) and (value.is_floating_point() or value.dtype in (torch.bool, torch.uint8)) else None


def cut_to(value, view: View, algorithm: str = "bilinear"):
    """The windows' part of a mask or a picture that covers a place; None if it does not.

    One window: the dimensions stay as they are. Several: a row for each image of each window, in front.
    """
    whole = as_tensor(value)
    dims = None if whole is None else covers(whole, view)
    if dims is None:
        return None
    planes = whole.movedim(dims, (-2, -1))
    across = [Fraction(planes.shape[dim], view.size[dim]) for dim in (-2, -1)]
    if any((edge * ratio).denominator > 1 for rect in view.rects for edge, ratio in _edges(rect, across)):
        planes, across = _in_px(planes, view, algorithm), [view.cell_px] * 2
    planes = planes[None] if planes.ndim == 2 and len(view.rects) > 1 else planes
    part = cut_rows(planes, in_units_of(planes, view.rects, *across), view.canvas.rows).movedim((-2, -1), dims).contiguous()
    return part.numpy() if isinstance(value, numpy.ndarray) else part


def cut_attention(value: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor | None:
    """The part of a mask between tokens, (..., tokens, tokens), text's first; None if it has none of the picture's.

    For several windows its first dimension is the images of a batch.
    """
    height, width = (math.ceil(length / canvas.patch) for length in canvas.size)
    text = value.shape[-1] - height * width
    if value.ndim < 2 or value.shape[-2] != value.shape[-1] or text < 0:
        return None
    if len(rects) > 1:
        value = comfy.utils.repeat_to_batch_size(value if value.ndim > 2 else value[None], canvas.rows)
    picture, parts = torch.arange(text, text + height * width, device=value.device).view(height, width), []
    for rect in in_units_of(picture, rects, Fraction(1, canvas.patch), Fraction(1, canvas.patch)):
        tokens = torch.cat([torch.arange(text, device=value.device), cut_latent(picture, [rect]).flatten()])
        parts.append(value[..., tokens, :][..., tokens])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _edges(rect: Rect, across: Sequence[Fraction]):
    down, right = across
    return (rect.top, down), (rect.bottom, down), (rect.left, right), (rect.right, right)


def _in_px(planes: torch.Tensor, view: View, algorithm: str) -> torch.Tensor:
    """As large as the place in px, kept for the run."""
    key = "px", planes.data_ptr(), tuple(planes.shape), view.size, algorithm
    if key not in view.canvas.prepared:
        height, width = (length * view.cell_px for length in view.size)
        samples = planes.reshape(-1, 1, *planes.shape[-2:])
        # Nothing between true and false, and between whole numbers.
        algorithm = algorithm if planes.is_floating_point() else "nearest-exact"
        scaled = comfy.utils.common_upscale(samples.float(), width, height, algorithm, "disabled").to(planes.dtype)
        view.canvas.prepared[key] = planes, scaled.reshape(*planes.shape[:-2], height, width)
    return view.canvas.prepared[key][1]


def empty_caches(part, closed: tuple[type, ...]) -> None:
    """Let a copy make anew, and for itself, what its original has made or will make of whole masks and hints."""
    inside = getattr(part, "__dict__", {})
    for name, value in list(inside.items()):
        sources = (f"{name}_original", f"{name}_orig", f"original_{name}", f"orig_{name}")
        if "cache" in name or any(source in inside for source in sources) or _is_by_size(value):
            inside[name] = _emptied(value, closed)


def _is_by_size(value) -> bool:
    """True for a dictionary that is empty, or tells sizes apart."""
    return type(value) is dict and all(isinstance(key, (tuple, torch.Size)) for key in value)


def _emptied(value, closed: tuple[type, ...]):
    """A container of its own that is empty, and None for a tensor; anything else is no cache."""
    if torch.is_tensor(value):
        return None
    holds = isinstance(value, (dict, list, set, tuple)) and any(map(torch.is_tensor, reachable(value, closed)))
    if isinstance(value, tuple):
        return None if holds else value
    return type(value)() if holds or isinstance(value, (dict, list, set)) and not value else value

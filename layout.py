"""How do windows follow one layout, where each would make up a picture of its own? In cells of the latent.

Windows know each other through the latent alone. Where a strength is near 1 they begin with noise, each makes up its mind
by itself, and what they share is too little to agree on: a collage. A look at the whole picture, as small as a window,
sees all of it. What is larger than a part of a window follows that look, most at the first steps.

The mean of n x n cells has an n-th of their noise, so the model is told the sigma at which there is as much (as in
arXiv 2404.01709).
"""
from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .canvas import Canvas
from .conditioning import RULES_OF_CONDS, cut_conds
from .patches import what_is_cut
from .prompts import is_on, says_something
from .tones import low_pass
from .utils import Rect, block_means, cut, cut_latent

# What is smaller than this part of a window is the window's own.
PARTS = 8

# Halvings of the span that a sigma is looked for in.
HALVINGS = 40

# Of an entry, and of what its model made of it: what has a place in the picture and is not known to have one in a small one.
IN_PLACE = {
    "control": "a control shows each window its part", "gligen": "GLIGEN's boxes are placed in the picture", "hooks": "hooks follow the sampler's sigmas",
    "guide_attention_entries": "guides are placed in the picture", "vinput_mask": "the model lists the tokens of one size"}


@dataclass(frozen=True, eq=False)
class Look:
    """What the model is asked about the whole picture. rect: what is seen of it. factor: cells that become one, along each axis."""

    rect: Rect
    factor: int
    x: torch.Tensor
    sigma: torch.Tensor
    conds: list[list[dict] | None]


def hold_of(hold: float, strengths: torch.Tensor, progress: float) -> torch.Tensor:
    """How far cells of these strengths follow the look, at a progress from 0 to 1: less with every step, and not at all what began with much of the original."""
    return hold * (strengths - progress).clamp(min=0)


def hindrance(conds: Sequence[Sequence[dict] | None], model_options: dict, canvas: Canvas) -> str | None:
    """Why the whole picture cannot be looked at small, if so."""
    options = model_options["transformer_options"]
    if "easycache" in options:
        return "EasyCache compares one call of the model with the one before"
    if options.get("context_window") is not None:
        return "the host evaluates frames piece by piece"
    for entry in (entry for entries in conds for entry in entries or ()):
        for key, why in IN_PLACE.items():
            if entry.get(key) is not None or key in entry["model_conds"]:
                return why
        for key in RULES_OF_CONDS.keys() & entry["model_conds"].keys():
            value = getattr(entry["model_conds"][key], "cond", None)
            if torch.is_tensor(value) and value.ndim > 2 and tuple(value.shape[-2:]) != canvas.size:
                return f"conditioning {key!r} has a size of its own"
    if what_is_cut(model_options, canvas):
        return "a patch holds something of the picture"
    return None


def look_at(
    x: torch.Tensor, sigma: torch.Tensor, conds: Sequence[Sequence[dict] | None], active: torch.Tensor, side: int, canvas: Canvas, turned: bool,
) -> Look | None:
    """The whole picture in no more cells than a window of this side has; None if nothing would be left of it, or nothing is to be told of its noise.

    active: (height, width), on the CPU; what says nothing of these cells is not asked. turned: whether what goes on over a border
    is seen from its middle, so that what is a border of the look moves.
    """
    factor = max(math.ceil(math.sqrt(math.prod(canvas.size)) / side), 2)
    unit = factor * canvas.patch
    height, width = (length // unit * unit for length in canvas.size)
    told = _sigma_of_means(canvas.model.model_sampling, float(sigma.flatten()[0]), factor)
    if not height or not width or told is None:
        return None
    top, left = (length // 2 // canvas.patch * canvas.patch if wraps and turned else 0 for length, wraps in zip(canvas.size, canvas.wraps))
    rect = Rect(-top, -left, height - top, width - left)
    on = [None if entries is None else [entry for entry in entries if is_on(entry, sigma) and says_something(entry, active, canvas)] for entries in conds]
    small = [None if entries is None else _small_entries(entries, rect, factor) for entries in cut_conds([on], [rect], canvas)]
    return Look(rect, factor, told[1] * _means(cut_latent(x, [rect]), factor), torch.full_like(sigma, told[0]), small)


def follow(
    result: torch.Tensor, seen: torch.Tensor, look: Look, hold: torch.Tensor, active: torch.Tensor, original: torch.Tensor, side: int, wraps: tuple[bool, bool],
) -> torch.Tensor:
    """The windows' result with what is slow in it led to what was seen of the whole.

    hold: of each cell. active: the cells that windows gave; in the place of others is the original.
    """
    given = _means(cut_latent(torch.where(active, result, original), [look.rect]), look.factor)
    difference = (seen - given) * _means(cut(active.to(result), look.rect), look.factor)
    slow = low_pass(difference, max(side / PARTS / look.factor, 1), wraps)
    return result + hold.to(result) * _in_place(slow, look, result)


def _in_place(slow: torch.Tensor, look: Look, like: torch.Tensor) -> torch.Tensor:
    """What was found of the look, over the whole canvas; what it leaves of that is as what is next to it."""
    (height, width), planes = like.shape[-2:], slow.flatten(0, -3)[None]
    planes = F.interpolate(planes.float(), scale_factor=look.factor, mode="bilinear")
    planes = F.pad(planes, (0, width - planes.shape[-1], 0, height - planes.shape[-2]), mode="replicate")
    return planes.roll((look.rect.top, look.rect.left), (-2, -1)).view(like.shape).to(like)


def _means(value: torch.Tensor, factor: int) -> torch.Tensor:
    """The means of squares of so many cells, which fit in, in the value's own type."""
    return block_means(value.float(), factor).to(value)


def _sigma_of_means(sampling, sigma: float, factor: int) -> tuple[float, float] | None:
    """The sigma at which the model expects a factor-th of the noise, and what their means are multiplied by to be such a latent; None for a model without noise."""
    noise, latent = _noise_and_latent(sampling, sigma)
    if not noise:
        return None
    low, high = 0.0, sigma
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        its_noise, its_latent = _noise_and_latent(sampling, middle)
        low, high = (middle, high) if factor * its_noise * latent < noise * its_latent else (low, middle)
    return high, factor * _noise_and_latent(sampling, high)[0] / noise


def _noise_and_latent(sampling, sigma: float) -> tuple[float, float]:
    """How much of each the model's family mixes at a sigma."""
    one, zero, sigmas = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
    return float(sampling.noise_scaling(sigmas, one, zero)), float(sampling.noise_scaling(sigmas, zero, one))


def _small_entries(entries: Sequence[dict], rect: Rect, factor: int) -> list[dict]:
    """The conditionings of what is seen, as they are for a picture that is smaller; what says nothing costs nothing."""
    found = [_small_entry(entry, rect, factor) for entry in entries]
    return [entry for entry in found if "mask" not in entry or bool(entry["mask"].any())]


def _small_entry(entry: dict, rect: Rect, factor: int) -> dict:
    # What is on is known by the sampler's sigma, which is another one than the model is told.
    found = {key: value for key, value in entry.items() if key not in ("timestep_start", "timestep_end")}
    found |= {"uuid": uuid.uuid5(entry["uuid"], f"small {factor}"), "model_conds": {key: _small_cond(cond, rect, factor) for key, cond in entry["model_conds"].items()}}
    if "mask" in entry:
        found["mask"] = _means(entry["mask"], factor)
    if "area" in entry:
        dims = len(entry["area"]) // 2
        lengths, starts = entry["area"][:dims], entry["area"][dims:]
        found["area"] = (
            *lengths[:-2], *(max(length // factor, 1) for length in lengths[-2:]), *starts[:-2], *(start // factor for start in starts[-2:]))
    return found


def _small_cond(cond, rect: Rect, factor: int):
    """What covers the picture, smaller; anything else whole."""
    value = getattr(cond, "cond", None)
    small = [_small_value(part, rect, factor) for part in value] if isinstance(value, list) else _small_value(value, rect, factor)
    return cond if small is value else cond._copy_with(small)


def _small_value(value, rect: Rect, factor: int):
    covers = torch.is_tensor(value) and value.ndim >= 4 and tuple(value.shape[-2:]) == (rect.height, rect.width)
    return _means(value, factor) if covers else value

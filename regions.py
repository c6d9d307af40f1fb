"""Which parts of a picture get a prompt of their own, and what is said of each? In pixels.

Regions are squares of one side on a grid from the picture's corner that hold something with a strength above 0, numbered
from 1 in reading order. Their masks overlap softly and add up to 1.
"""
from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from .placement import strength_raster
from .quadtree import Quadtree
from .utils import Rect

# What `lines` looks like: "3: a lighthouse", "2-5: wet stones", "1, 7: sky".
_LINE = re.compile(r"\s*(\d+(?:\s*-\s*\d+)?(?:\s*,\s*\d+(?:\s*-\s*\d+)?)*)\s*:(.*)")

# So many digits are more than there are regions, however many of them are zeros.
LONGEST_NUMBER = 100

log = logging.getLogger(__name__)


def plan_regions(tree: Quadtree, height: int, width: int, region_size: int) -> list[Rect]:
    """The regions of a height x width picture of the tree's aspect, without their overlap.

    region_size: side in px; those at the right and lower border are half to one and a half times as long.
    """
    if region_size < 1:
        raise ValueError(f"region_size: expected 1 px or more, got {region_size}.")
    active = strength_raster(tree, height, width) > 0
    rows, cols = _edges(height, region_size), _edges(width, region_size)
    rects = [Rect(top, left, bottom, right) for top, bottom in zip(rows, rows[1:]) for left, right in zip(cols, cols[1:])]
    return [rect for rect in rects if bool(active[rect.top:rect.bottom, rect.left:rect.right].any())]


def region_masks(regions: Sequence[Rect], height: int, width: int, overlap: int) -> list[torch.Tensor]:
    """How much of each pixel belongs to each region, (1, height, width) each; they add up to 1 wherever any is above 0.

    overlap: how far in px a region reaches into its neighbours. Without regions one mask that is 0 everywhere.
    """
    if overlap < 0:
        raise ValueError(f"overlap: expected 0 px or more, got {overlap}.")
    total = torch.zeros(height, width)
    for rect in regions:
        total += _weight(rect, height, width, overlap)
    total[total == 0] = 1
    return [(_weight(rect, height, width, overlap) / total)[None] for rect in regions] or [torch.zeros(1, height, width)]


def region_images(image: torch.Tensor, regions: Sequence[Rect], overlap: int) -> list[torch.Tensor]:
    """What is to be captioned: each region with its overlap, (B, h, w, C); without regions the whole picture."""
    height, width = image.shape[1:3]
    grown = [Rect(max(rect.top - overlap, 0), max(rect.left - overlap, 0), min(rect.bottom + overlap, height), min(rect.right + overlap, width)) for rect in regions]
    return [image[:, rect.top:rect.bottom, rect.left:rect.right] for rect in grown] or [image]


def numbered_picture(image: torch.Tensor, regions: Sequence[Rect]) -> torch.Tensor:
    """The first picture with the regions' borders and numbers, (1, H, W, 3)."""
    pixels = (image[0, ..., :3].expand(-1, -1, 3).float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    thickness = max(max(picture.size) // 512, 1)
    for number, rect in enumerate(regions, 1):
        draw.rectangle((rect.left, rect.top, rect.right - 1, rect.bottom - 1), outline="white", width=thickness)
        font = ImageFont.load_default(max(min(rect.height, rect.width) / 4, 10))
        draw.text(((rect.left + rect.right) / 2, (rect.top + rect.bottom) / 2), str(number), "white", font, "mm", stroke_width=2 * thickness, stroke_fill="black")
    return torch.from_numpy(numpy.asarray(picture).copy()).float()[None] / 255


def read_lines(lines: str, amount: int) -> dict[int, str]:
    """The user's text for each region that has one, by its number.

    lines: "3: a lighthouse" or "2-5: wet stones" or "1, 7: sky" on a line each; empty lines and lines that begin with #
    say nothing. Several lines for a region are joined. Raises ValueError for any other line and for regions above `amount`.
    """
    found: dict[int, list[str]] = {}
    for line in lines.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise ValueError(f"lines: expected a region's number, a colon and its text, like '3: a lighthouse' or '2-5: wet stones', got {line.strip()[:80]!r}.")
        for number in _numbers(parts[1], amount, line.strip()):
            found.setdefault(number, []).append(parts[2].strip())
    twice = sorted(number for number, texts in found.items() if len(texts) > 1)
    if twice:
        log.info("lines: %s more than one line, which are joined", _named(twice, "has", "have"))
    return {number: ", ".join(filter(None, texts)) for number, texts in found.items()}


def region_texts(amount: int, text: str, lines: str, captions: Sequence[str] = ()) -> list[str]:
    """The prompt of each region: what all share, then the user's line or, without one, the caption.

    captions: none, or one for each region. Raises ValueError for another number of them.
    """
    if captions and len(captions) != amount:
        raise ValueError(f"captions: expected one for each of {amount} regions, got {len(captions)}. Caption the images of Quadtree Regions, all of them and nothing else.")
    wrong = [number for number, caption in enumerate(captions, 1) if not isinstance(caption, str)]
    if wrong:
        raise ValueError(f"captions: expected a text for each region, got {type(captions[wrong[0] - 1]).__name__} for region {wrong[0]}. Look at what the captioner gives for its picture.")
    own = read_lines(lines, amount)
    silent = [number for number in range(1, amount + 1) if number not in own and not (captions and captions[number - 1].strip())]
    if silent:
        log.info("lines: %s no line and no caption, only what all share", _named(silent, "has", "have"))
    texts = [own.get(number, captions[number - 1].strip() if captions else "") for number in range(1, amount + 1)]
    return [", ".join(part for part in (text.strip().rstrip(","), said) if part) for said in texts]


def _edges(length: int, side: int) -> list[int]:
    """Where regions begin along one axis, and its end: whole sides, the last one with what is left."""
    amount = max(int(length / side + 0.5), 1)
    return [side * index for index in range(amount)] + [length]


def _weight(rect: Rect, height: int, width: int, overlap: int) -> torch.Tensor:
    """1 inside a region, falling evenly from `overlap` inside its border to `overlap` outside; not at the picture's."""
    down, across = (
        _ramp(start, end, length, overlap) for start, end, length in ((rect.top, rect.bottom, height), (rect.left, rect.right, width)))
    return down[:, None] * across


def _ramp(start: int, end: int, length: int, overlap: int) -> torch.Tensor:
    centres = torch.arange(length) + 0.5
    before = torch.full_like(centres, float("inf")) if start == 0 else centres - start
    after = torch.full_like(centres, float("inf")) if end == length else end - centres
    inside = torch.minimum(before, after)
    return ((inside + overlap) / (2 * overlap)).clamp(0, 1) if overlap else (inside > 0).float()


def _numbers(text: str, amount: int, line: str) -> list[int]:
    """The regions that the part before the colon names."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        first, last = _number(first), _number(last or first)
        if not 1 <= first <= last <= amount:
            raise ValueError(f"lines: expected regions from 1 to {amount}, got {part.strip()[:80]} in {line[:80]!r}. The picture `numbered` of Quadtree Regions shows which there are.")
        found += range(first, last + 1)
    return found


def _number(digits: str) -> int | float:
    """A number of any length, which Python reads up to 4300 digits of."""
    digits = digits.strip()
    return int(digits) if len(digits) <= LONGEST_NUMBER else math.inf


def _named(numbers: Sequence[int], one: str, several: str) -> str:
    return f"region {numbers[0]} {one}" if len(numbers) == 1 else f"regions {', '.join(map(str, numbers))} {several}"

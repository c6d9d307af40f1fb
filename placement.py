"""How does a tree lie over a picture or a latent of another size? In pixels, unless said otherwise.

Any scale may lie between two pictures, and the host crops a picture, centred, to whole cells before it encodes it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .quadtree import Quadtree, grids_of

# Sides of the cells, in px, to which the host's VAEs crop a picture, centred, before they encode it.
CELL_SIDES = (2, 4, 8, 16, 32)

# The side of the mask that the host's Load Image gives where nothing was painted.
UNPAINTED_PX = 64


@dataclass(frozen=True, slots=True)
class Span:
    """How one picture lies along another, in one direction: px of the other = (px + shift) / scale."""

    scale: float
    shift: float

    def px(self, positions):
        return (positions + self.shift) / self.scale

    def px_back(self, positions):
        return positions * self.scale - self.shift


def find_placement(size: tuple[int, int], part: tuple[int, int], cell_px: int = 1) -> tuple[Span, Span] | None:
    """How a picture of the size `part` lies over one of `size`, both (height, width) in px: along rows and columns.

    Any scale may lie between them, and one may be what the host's crop to whole cells has left of the other.
    cell_px: px per cell, where `part` is what a latent covers. None: no scale and crop leads from one to the other.
    """
    for scale in simple_scales(size, part):
        shift = crop_shift(size, part, scale, [cell for cell in CELL_SIDES if cell % cell_px == 0] or [cell_px])
        if shift is not None:
            return tuple(Span(scale, amount) for amount in shift)
    stretched = tuple(Span(px / side, 0.0) for side, px in zip(size, part))
    if _scale_between(size, part, -1, 1) is not None:
        return stretched
    # In px the cell is not known: it divides what the crop has left, and is small beside it.
    cell = cell_px if cell_px > 1 else max((cell for cell in CELL_SIDES if part[0] % cell == part[1] % cell == 0 and cell * 32 <= min(part)), default=1)
    spans = _crop_at_any_scale(size, part, cell) or _crop_of_a_crop(size, part, cell)
    if spans is None and _scale_between(size, part, -cell_px, cell_px) is not None:
        return stretched
    return spans


def strength_raster(tree: Quadtree, height: int, width: int, cell_px: int = 1) -> torch.Tensor:
    """Scale the tree to a raster: each cell has the strength of the leaf over its centre.

    Returns (height, width) float32. A quadtree is resolution-free: the raster may be the picture's, its upscale's or, with
    cell_px pixels per cell, that of a latent, which covers the picture but for what the host's centred crop takes off.
    Raises ValueError for another aspect, unless the tree keeps everything.
    """
    spans = placement_of(tree, height * cell_px, width * cell_px, cell_px)
    if spans is None:
        px = f": it is of one of {width * cell_px} x {height * cell_px} px" if cell_px > 1 else ""
        raise ValueError(
            f"quadtree: made for a picture of {tree.width} x {tree.height}, but the latent or picture is {width} x {height}, which is another aspect{px}. {way_to_the_tree(tree)}")
    return strengths_at(tree, *(span.px((torch.arange(cells, dtype=torch.float64) + 0.5) * cell_px) for span, cells in zip(spans, (height, width))))


def sides_in_proportion(tree: Quadtree, height: int, width: int) -> tuple[int, int]:
    """A mask's sides: 0 follows from the other by the tree's aspect, two are the tree's own.

    Raises ValueError for two that are of another aspect.
    """
    if not height and not width:
        return tree.height, tree.width
    if not height:
        return max(round(tree.height * width / tree.width), 1), width
    if not width:
        return height, max(round(tree.width * height / tree.height), 1)
    if placement_of(tree, height, width) is None:
        raise ValueError(
            f"width and height: expected the aspect of the quadtree's picture, {tree.width} x {tree.height} px, got {width} x {height}. "
            "Set one of them to 0, which takes it in proportion.")
    return height, width


def placement_of(tree: Quadtree, height: int, width: int, cell_px: int = 1) -> tuple[Span, Span] | None:
    """How a picture lies over the tree's. A tree that keeps everything fits every picture: an empty mask knows no size."""
    placed = find_placement((tree.height, tree.width), (height, width), cell_px)
    if placed is None and not any(leaf.strength for leaf in tree.leaves):
        return Span(height / tree.height, 0.0), Span(width / tree.width, 0.0)
    return placed


def strengths_at(tree: Quadtree, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The strengths at points in px of the tree; beyond its border those at the border."""
    strength = grids_of(tree)[2].float()
    rows, cols = ((px / tree.min_leaf).floor().long().clamp_(0, cells - 1) for px, cells in zip((rows, cols), strength.shape))
    return strength[rows][:, cols]


def way_to_the_tree(tree: Quadtree) -> str:
    """What to do about a tree of another picture."""
    if (tree.height, tree.width) == (UNPAINTED_PX, UNPAINTED_PX):
        return f"{UNPAINTED_PX} x {UNPAINTED_PX} is the mask that Load Image gives where nothing was painted: paint in its mask editor, or make the quadtree from the picture."
    return "Build the quadtree from the picture that you encode, after any crop or turn."


def simple_scales(size: tuple[int, int], part: tuple[int, int]) -> list[float]:
    """The simplest fractions near the scale from a size to another, whole ones first."""
    about = math.sqrt(part[0] * part[1] / (size[0] * size[1]))
    found = [round(max(about, 1 / about) * divisor) / divisor for divisor in (1, 2, 3, 4)]
    return list(dict.fromkeys(scale if about >= 1 else 1 / scale for scale in found))


def crop_shift(size, part, scale, cells) -> list | None:
    """The shift in px of `part` if at this scale one picture is the host's crop of the other, made before or after scaling."""
    scaled, shrunk = [round(side * scale) for side in size], [round(side / scale) for side in part]
    for inner, outer, factor in ((part, scaled, 1), (shrunk, size, scale), (size, shrunk, -scale), (scaled, part, -1)):
        if any(all(whole - whole % cell == side for side, whole in zip(inner, outer)) for cell in cells):
            return [(whole - side) // 2 * factor for side, whole in zip(inner, outer)]
    return None


def _scale_between(size, part, least: float, most: float) -> float | None:
    """A scale that makes both sides of `size` longer than those of `part` by more than `least` and less than `most` px."""
    low = max((px + least) / side for side, px in zip(size, part))
    high = min((px + most) / side for side, px in zip(size, part))
    return (low + high) / 2 if low < high else None


def _crop_at_any_scale(size, part, cell: int) -> tuple[Span, Span] | None:
    """How `part` lies over `size` if some scale makes it the host's crop to cells of so many px."""
    scale = _scale_between(size, part, -0.5, cell - 0.5)
    return None if scale is None else tuple(Span(scale, (scale * side - px) / 2) for side, px in zip(size, part))


def _crop_of_a_crop(size, part, cell: int) -> tuple[Span, Span] | None:
    """The same where `size` was cropped before it was scaled, too: a second pass over an enlarged latent."""
    inner = [side - side % cell for side in size]
    spans = _crop_at_any_scale(inner, part, cell) if min(inner) else None
    return spans and tuple(Span(span.scale, span.shift + span.scale * ((side - inside) // 2)) for span, side, inside in zip(spans, size, inner))

"""What was painted on a picture, and what becomes of its tree? In pixels."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from .placement import find_placement
from .quadtree import Quadtree, collect_leaves, grids_of, split_uneven
from .utils import Refusal

# Characters and pixels; what can be painted by hand stays below both.
LONGEST_EDITS = 500_000

LARGEST_EDIT = 1_000_000

EDITS_FORM = '{"size": [width, height], "squares": [[left, top, side, strength], ...]}'


@dataclass(frozen=True, slots=True)
class Edit:
    """A square of a picture that was painted. strength None takes back what was painted there before."""

    left: float
    top: float
    side: float
    strength: float | None


@dataclass(frozen=True, slots=True)
class Edits:
    """What was painted on a picture of height x width px, in the order in which it was painted."""

    height: int
    width: int
    squares: tuple[Edit, ...] = ()


def parse_edits(text: str) -> Edits | None:
    """Read what was painted from its JSON, {"size": [width, height], "squares": [[left, top, side, strength], ...]} in px.

    A strength is 0..1, or null. Blank text gives None. Raises Refusal for anything else.
    """
    if not text.strip():
        return None
    try:
        given = json.loads(text) if len(text) <= LONGEST_EDITS else None
        width, height = given["size"]
        squares = tuple(Edit(*square) for square in given["squares"])
        numbers = [value for square in squares for value in (square.left, square.top, square.side, 0 if square.strength is None else square.strength)]
        valid = (
            type(width) is int and type(height) is int and 0 < width <= LARGEST_EDIT and 0 < height <= LARGEST_EDIT
            and all(type(value) in (int, float) and abs(value) <= LARGEST_EDIT for value in numbers)
            and all(square.side > 0 and (square.strength is None or 0 <= square.strength <= 1) for square in squares))
    except (ValueError, TypeError, KeyError, RecursionError):
        valid = False
    if not valid:
        raise Refusal(
            "edits_form", "edits: expected nothing, or {form} with sizes in pixels and strengths from 0 to 1 or null, got {got!r}. "
            "Make `edits` empty (Clear, below the picture on the node) to go on without them.", form=EDITS_FORM, got=text[:80])
    return Edits(height, width, squares)


def painted_cells(tree: Quadtree, edits: Edits | None) -> torch.Tensor:
    """The painted strength of each smallest cell, (rows, cols); NaN where nothing is painted.

    Edits of a picture of another size are scaled to the tree's, and laid where the host's crop has left them. Raises
    Refusal if that is of another aspect.
    """
    painted = torch.full((math.ceil(tree.height / tree.min_leaf), math.ceil(tree.width / tree.min_leaf)), math.nan, dtype=torch.float64)
    if edits is None:
        return painted
    spans = find_placement((tree.height, tree.width), (edits.height, edits.width))
    if spans is None:
        raise Refusal(
            "edits_aspect", "edits: painted on a picture of {painted}, but this one is {here}, which is another aspect. "
            "Make `edits` empty (Clear, below the picture on the node), or connect the picture that they were painted on.",
            painted=f"{edits.width} x {edits.height}", here=f"{tree.width} x {tree.height}")
    for square in edits.squares:
        rows, cols = (
            _cells_under(span.px(start) / tree.min_leaf, span.px(start + square.side) / tree.min_leaf) for span, start in zip(spans, (square.top, square.left)))
        painted[rows, cols] = math.nan if square.strength is None else square.strength
    return painted


def edit_quadtree(tree: Quadtree, edits: Edits | None) -> Quadtree:
    """Give the painted squares their strengths; leaves that reach beyond a square are split at its border."""
    if edits is None or not edits.squares:
        return tree
    level, detail, strength = grids_of(tree)
    painted = painted_cells(tree, edits)
    level = split_uneven(tree, level, painted.nan_to_num(-1.0), 0.0)
    return collect_leaves(tree.height, tree.width, tree.min_leaf, tree.max_leaf, level, detail, torch.where(painted.isnan(), strength, painted))


def _cells_under(first: float, last: float) -> slice:
    """The cells whose centres lie under a stretch, in cells; one shorter than a cell takes the cell it lies in."""
    if last - first < 1:
        first = math.floor((first + last) / 2)
        return slice(max(first, 0), max(first + 1, 0))
    return slice(max(math.ceil(first - 0.5), 0), max(math.ceil(last - 0.5), 0))

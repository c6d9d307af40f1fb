"""Where is detail in a picture? Everything here is in pixels.

Leaves are aligned squares, so the whole tree comes from one pyramid: sums and sums of squares per
smallest leaf, then 2 x 2 pooling upwards. Finkel and Bentley, "Quad Trees", 1974.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

METRICS = ("variance", "gradient", "combined")

# Pixels that are summed at once: few enough for a processor's cache, enough to keep its threads busy.
BAND_PIXELS = 1 << 20

# Sides of the cells, in px, to which the host's VAEs crop a picture, centred, before they encode it.
CELL_SIDES = (2, 4, 8, 16, 32)

# What becomes of a leaf of the smallest size that holds black and other pixels of a mask.
MASK_EDGES = ("keep black", "mean")

# Of a mask: below half a level of 8 bits.
BLACK = 0.5 / 255

# The side of the mask that the host's Load Image gives where nothing was painted.
UNPAINTED_PX = 64

# One level of an 8-bit picture: a smaller deviation is rounding, not detail.
VISIBLE = 1.0

# Strengths of masks are whole parts of this: it holds every hundredth that is typed and every level of an 8-bit mask.
MASK_GRID = 5100

# Characters and pixels; what can be painted by hand stays below both.
LONGEST_EDITS = 500_000
LARGEST_EDIT = 1_000_000
EDITS_FORM = '{"size": [width, height], "squares": [[left, top, side, strength], ...]}'

# The colour map viridis (CC0) at eleven even steps: even to the eye, and safe for colour-blind readers.
VIRIDIS = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140),
    (34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)


class Refusal(ValueError):
    """A setting that cannot be, in English and in a form that the browser can say in other languages.

    text: the message, with the names of the values in braces. code: names the text in locales/*/main.json.
    """

    def __init__(self, code: str, text: str, **values):
        super().__init__(text.format(**values))
        self.code, self.values = code, values


@dataclass(frozen=True, slots=True)
class Rect:
    """A half-open rectangle; the owner says whether in pixels or in cells."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


@dataclass(frozen=True, slots=True)
class Leaf:
    """A square of the picture, clipped at its border.

    side: px before clipping. detail: in the metric's unit, 0..255 scale. strength: 0 keep .. 1 redraw.
    """

    rect: Rect
    side: int
    detail: float
    strength: float


@dataclass(frozen=True, slots=True)
class Quadtree:
    """Leaves that cover each pixel of a height x width picture once, in order of (top, left)."""

    height: int
    width: int
    min_leaf: int
    max_leaf: int
    leaves: tuple[Leaf, ...]

    @property
    def mean_strength(self) -> float:
        """The strength of the average pixel: the share of full sampling that the picture needs."""
        return sum(leaf.strength * leaf.rect.height * leaf.rect.width for leaf in self.leaves) / (self.height * self.width)

    @property
    def kept_share(self) -> float:
        """The share of the pixels whose strength is 0."""
        kept = sum(leaf.rect.height * leaf.rect.width for leaf in self.leaves if leaf.strength == 0)
        return kept / (self.height * self.width)


@dataclass(frozen=True, slots=True)
class Span:
    """How one picture lies along another, in one direction: px of the other = (px + shift) / scale."""

    scale: float
    shift: float

    def px(self, positions):
        return (positions + self.shift) / self.scale

    def px_back(self, positions):
        return positions * self.scale - self.shift


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


@dataclass(frozen=True)
class CellStatistics:
    """What the pyramid is made of, per cell of cell_px x cell_px pixels.

    area: (rows, cols) pixels. sums, squares: (B, rows, cols, C). gradients: (B, rows, cols) or None.
    """

    height: int
    width: int
    cell_px: int
    area: torch.Tensor
    sums: torch.Tensor
    squares: torch.Tensor
    gradients: torch.Tensor | None


def measure_cells(image: torch.Tensor, cell_px: int, *, with_gradients: bool = True) -> CellStatistics:
    """Sum an image and its squares over square cells, in one pass.

    image: (B, H, W, C) in 0..1; channels after the third (alpha) are left out.
    Raises ValueError for an empty picture and for one with NaN or infinite pixels.
    """
    _check_picture(image, "image")
    sums, squares, gradients = [], [], []
    height = max(BAND_PIXELS // image.shape[2] // cell_px, 1) * cell_px
    for top in range(0, image.shape[1], height):
        band = image[:, top:top + height + 1, :, :3].float()
        if with_gradients:
            gradients.append(_blocks(_gradient_energy(band, height), cell_px, 1).sum(-1))
        band = band[:, :height]
        sums.append(_blocks(band, cell_px, 1))
        squares.append(_blocks(band.square(), cell_px, 1))
    # From here on the grids are small: the CPU is quicker, and has the float64 that Apple's GPUs lack.
    fold = lambda rows: _blocks(torch.cat(rows, 1).cpu().double(), cell_px, 2)
    rows, cols = (_blocks(torch.ones(length, dtype=torch.float64), cell_px, 0) for length in image.shape[1:3])
    found = CellStatistics(image.shape[1], image.shape[2], cell_px, rows[:, None] * cols, fold(sums), fold(squares), fold(gradients) if gradients else None)
    if not bool(torch.isfinite(found.squares).all()):
        raise ValueError("image: expected pixels between 0 and 1, got NaN or infinite ones. Look for the node before this one that made them (a VAE in half precision often does).")
    return found


def coarsen(cells: CellStatistics, factor: int) -> CellStatistics:
    """Join factor x factor cells into one; the last row and column may be smaller."""
    pool = lambda values, dim: _blocks(_blocks(values, factor, dim), factor, dim + 1)
    gradients = None if cells.gradients is None else pool(cells.gradients, 1)
    return CellStatistics(cells.height, cells.width, cells.cell_px * factor, pool(cells.area, 0), pool(cells.sums, 1), pool(cells.squares, 1), gradients)


def build_quadtree(
    image: torch.Tensor, *, detail_budget: float = 0.4, content_threshold: float = 25.0, min_leaf: int = 64,
    max_leaf: int = 1024, min_denoise: float = 0.0, max_denoise: float = 1.0, metric: str = "variance",
) -> Quadtree:
    """Build one tree for all images of a batch; a leaf's content is the maximum over them.

    image: (B, H, W, C) in 0..1. The other arguments are those of grow_quadtree.
    """
    check_leaves(min_leaf, max_leaf)
    cells = measure_cells(image, min_leaf, with_gradients=metric != "variance")
    return grow_quadtree(
        cells, detail_budget=detail_budget, content_threshold=content_threshold, max_leaf=max_leaf,
        min_denoise=min_denoise, max_denoise=max_denoise, metric=metric)


def grow_quadtree(
    cells: CellStatistics, *, detail_budget: float, content_threshold: float, max_leaf: int,
    min_denoise: float, max_denoise: float, metric: str,
) -> Quadtree:
    """Split while the content exceeds a threshold, and give every leaf its strength.

    cells: one per smallest leaf. detail_budget: share of the picture to redraw, 0..1; 0 takes content_threshold
    (0..255 scale) as it is. A leaf's strength runs from min_denoise at max_leaf to max_denoise at the
    smallest leaf, in log2 of the side.
    """
    check_leaves(cells.cell_px, max_leaf)
    _check_share("detail_budget", detail_budget)
    check_strengths(min_denoise, max_denoise)
    if content_threshold < 0:
        raise Refusal("not_negative", "{name}: expected 0 or more, got {got}.", name="content_threshold", got=content_threshold)
    contents, areas = _content_levels(cells, max_leaf, metric)
    effective = _least_of_ancestors(contents)
    threshold = _threshold_for_budget(effective, areas, detail_budget) if detail_budget > 0 else content_threshold
    level = _leaf_level([values > threshold for values in effective])
    top_level = len(contents) - 1
    scale = 1.0 - level / top_level if top_level else torch.ones_like(contents[0])
    strength = min_denoise + (max_denoise - min_denoise) * scale
    return _collect_leaves(cells.height, cells.width, cells.cell_px, max_leaf, level, _at_level(contents, level), strength)


def quadtree_from_mask(mask: torch.Tensor, *, min_leaf: int = 64, max_leaf: int = 1024, edges: str = "keep black") -> Quadtree:
    """Build a tree whose strengths are a mask's: leaves are as large as the mask is even.

    mask: (B, H, W) or (H, W) in 0..1, white = 1 = redraw; of several the maximum counts.
    A leaf on an edge of the mask, min_leaf large, gets the mean, to a hundredth or an 8-bit level and parts between; with
    edges "keep black" one that holds any black gets 0, so that all that is black is kept.
    """
    check_leaves(min_leaf, max_leaf)
    if edges not in MASK_EDGES:
        raise ValueError(f"edges: expected one of {', '.join(MASK_EDGES)}, got {edges!r}.")
    mask = _flat_mask(mask, "mask")
    levels = _levels_between(min_leaf, max_leaf)
    area = _pool(torch.ones_like(mask), min_leaf, torch.sum)
    mean, low, high = (_pool(mask, min_leaf, how) for how in (torch.sum, torch.amin, torch.amax))
    means, lows, uneven = [mean / area], [low], [high - low > 1 / 255]
    for _ in range(levels):
        area, mean = (_pool(values, 2, torch.sum) for values in (area, mean))
        low, high = _pool(low, 2, torch.amin), _pool(high, 2, torch.amax)
        means.append(mean / area)
        lows.append(low)
        uneven.append(high - low > 1 / 255)
    level = _leaf_level(uneven)
    strength = (_at_level(means, level).double() * MASK_GRID).round() / MASK_GRID
    if edges == "keep black":
        strength[_at_level(lows, level) < BLACK] = 0
    return _collect_leaves(*mask.shape, min_leaf, max_leaf, level, strength * 255, strength)


def adjust_quadtree(
    tree: Quadtree, *, min_denoise: float = 0.0, max_denoise: float = 1.0, gamma: float = 1.0, invert: bool = False,
    protect: torch.Tensor | None = None,
) -> Quadtree:
    """Remap every strength s to min + (max - min) * s ** gamma, and keep what a mask protects.

    invert: takes 1 - s first. protect: (B, H, W) or (H, W) of the tree's picture in any size, or before or after the host's
    crop; white = keep exactly, leaves on its edge are split down to min_leaf. A mask of one value may have any aspect.
    """
    check_strengths(min_denoise, max_denoise)
    if gamma <= 0:
        raise ValueError(f"gamma: expected a number above 0, got {gamma}. 1 changes nothing, 2 spares middle strengths, 0.5 favours them.")
    level, detail, strength = _grids(tree)
    strength = min_denoise + (max_denoise - min_denoise) * (1 - strength if invert else strength) ** gamma
    if protect is not None:
        level, strength = _protected(tree, level, strength, _flat_mask(protect, "protect"))
    return _collect_leaves(tree.height, tree.width, tree.min_leaf, tree.max_leaf, level, detail, strength)


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
    level, detail, strength = _grids(tree)
    painted = painted_cells(tree, edits)
    level = _split_uneven(tree, level, painted.nan_to_num(-1.0), 0.0)
    return _collect_leaves(tree.height, tree.width, tree.min_leaf, tree.max_leaf, level, detail, torch.where(painted.isnan(), strength, painted))


def find_placement(size: tuple[int, int], part: tuple[int, int], cell_px: int = 1) -> tuple[Span, Span] | None:
    """How a picture of the size `part` lies over one of `size`, both (height, width) in px: along rows and columns.

    Any scale may lie between them, and one may be what the host's crop to whole cells has left of the other.
    cell_px: px per cell, where `part` is what a latent covers. None: no scale and crop leads from one to the other.
    """
    for scale in _simple_scales(size, part):
        shift = _crop_shift(size, part, scale, [cell for cell in CELL_SIDES if cell % cell_px == 0] or [cell_px])
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
    spans = _placement_of(tree, height * cell_px, width * cell_px, cell_px)
    if spans is None:
        px = f": it is of one of {width * cell_px} x {height * cell_px} px" if cell_px > 1 else ""
        raise ValueError(
            f"quadtree: made for a picture of {tree.width} x {tree.height}, but the latent or picture is {width} x {height}, which is another aspect{px}. {way_to_the_tree(tree)}")
    return _raster(tree, *(span.px((torch.arange(cells, dtype=torch.float64) + 0.5) * cell_px) for span, cells in zip(spans, (height, width))))


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
    if _placement_of(tree, height, width) is None:
        raise ValueError(
            f"width and height: expected the aspect of the quadtree's picture, {tree.width} x {tree.height} px, got {width} x {height}. "
            "Set one of them to 0, which takes it in proportion.")
    return height, width


def draw_quadtree(image: torch.Tensor, tree: Quadtree, *, opacity: float = 0.45) -> torch.Tensor:
    """Lay the leaves' strengths (as colours) and borders over a picture of the tree's size.

    image: (B, H, W, C). Returns (B, H, W, 3) in 0..1.
    """
    if image.shape[1:3] != (tree.height, tree.width):
        raise ValueError(f"image: expected the picture that the quadtree was made from, {tree.width} x {tree.height} px, got {image.shape[2]} x {image.shape[1]}.")
    leaf_ids, strength = _leaf_ids(tree), _grids(tree)[2]
    tint = (strength_colour(strength).to(image.device) * opacity).repeat_interleave(tree.min_leaf, 1)[:, :tree.width]  # (rows, width, 3)
    out = torch.empty(*image.shape[:3], 3, device=image.device)
    whole = tree.height // tree.min_leaf * tree.min_leaf
    for colours, part in ((tint[:whole // tree.min_leaf, None], slice(0, whole)), (tint[-1:, None], slice(whole, tree.height))):
        shape = (len(colours), -1)
        if part.start < part.stop:
            torch.add(colours, image[:, part, :, :3].unflatten(1, shape), alpha=1 - opacity, out=out[:, part].unflatten(1, shape))
    _draw_borders(out, leaf_ids, tree.min_leaf)
    return out


def strength_colour(strength: torch.Tensor) -> torch.Tensor:
    """The colour of each strength, (..., 3) in 0..1: dark violet is kept, yellow is redrawn."""
    table = torch.tensor(VIRIDIS, dtype=torch.float32) / 255
    position = strength.float().cpu().clamp(0, 1) * (len(VIRIDIS) - 1)
    below = position.floor().long().clamp(max=len(VIRIDIS) - 2)
    return torch.lerp(table[below], table[below + 1], (position - below).unsqueeze(-1))


def composite(original: torch.Tensor, image: torch.Tensor, tree: Quadtree, *, feather: int = 32) -> torch.Tensor:
    """Put the original's pixels back where the strength is 0, bit for bit.

    original, image: (B, H, W, C). image may be what the host's crop to whole cells has left: it is laid where it was taken
    from, and what was cropped off stays the original's. Returns a picture of the original's size for each image; originals
    are repeated or cut to their number. Of two numbers of channels the greater counts; alpha that only one has is taken as
    it is. feather: width in px of the ramp between the two; it lies inside what changed, and is narrowed to half the
    smallest leaf. Raises ValueError for sizes and trees that do not belong together.
    """
    for name, picture in (("original", original), ("image", image)):
        _check_picture(picture, name)
    shift = _shift_of_result(original, image)
    original, laid = _laid_over(original, image, shift)
    spans = _placement_of_pictures(tree, original, image, shift)
    strength = _raster(tree, *(span.px(torch.arange(side, dtype=torch.float64) + 0.5) for span, side in zip(spans, original.shape[1:3])))
    changed = torch.zeros_like(strength)
    inside, _ = _common_parts(original, image, shift)
    changed[inside] = (strength[inside] > 0).float()
    radius = min(feather // 2, int(tree.min_leaf * min(span.scale for span in spans)) // 4)
    alpha = _inner_ramp(changed, radius).to(laid.device)[None, :, :, None]
    return torch.where(alpha == 0, original, torch.lerp(original, laid, alpha.to(laid.dtype)))


def check_leaves(min_leaf: int, max_leaf: int) -> None:
    """Raise Refusal unless max_leaf is min_leaf doubled a whole number of times."""
    if min_leaf < 1 or max_leaf < min_leaf:
        raise Refusal(
            "min_leaf_at_most", "min_leaf: expected 1 px or more and at most max_leaf ({max_leaf}), got {min_leaf}. Make min_leaf smaller or max_leaf larger.",
            min_leaf=min_leaf, max_leaf=max_leaf)
    if min_leaf << _levels_between(min_leaf, max_leaf) != max_leaf:
        below = min_leaf << _levels_between(min_leaf, max_leaf)
        raise Refusal(
            "max_leaf_doubled", "max_leaf: expected min_leaf ({min_leaf}) doubled some times, got {max_leaf}. The nearest are {below} and {above}.",
            min_leaf=min_leaf, max_leaf=max_leaf, below=below, above=below * 2)


def check_strengths(min_denoise: float, max_denoise: float) -> None:
    """Raise Refusal unless both are strengths and the first is no larger than the second."""
    _check_share("min_denoise", min_denoise)
    _check_share("max_denoise", max_denoise)
    if min_denoise > max_denoise:
        raise Refusal(
            "min_denoise_at_most",
            "min_denoise: expected at most max_denoise ({max_denoise}), got {min_denoise}. To redraw flat parts instead, use Quadtree Adjust with invert.",
            min_denoise=min_denoise, max_denoise=max_denoise)


def _placement_of(tree: Quadtree, height: int, width: int, cell_px: int = 1) -> tuple[Span, Span] | None:
    """How a picture lies over the tree's. A tree that keeps everything fits every picture: an empty mask knows no size."""
    placed = find_placement((tree.height, tree.width), (height, width), cell_px)
    if placed is None and not any(leaf.strength for leaf in tree.leaves):
        return Span(height / tree.height, 0.0), Span(width / tree.width, 0.0)
    return placed


def way_to_the_tree(tree: Quadtree) -> str:
    """What to do about a tree of another picture."""
    if (tree.height, tree.width) == (UNPAINTED_PX, UNPAINTED_PX):
        return f"{UNPAINTED_PX} x {UNPAINTED_PX} is the mask that Load Image gives where nothing was painted: paint in its mask editor, or make the quadtree from the picture."
    return "Build the quadtree from the picture that you encode, after any crop or turn."


def _simple_scales(size: tuple[int, int], part: tuple[int, int]) -> list[float]:
    """The simplest fractions near the scale from a size to another, whole ones first."""
    about = math.sqrt(part[0] * part[1] / (size[0] * size[1]))
    found = [round(max(about, 1 / about) * divisor) / divisor for divisor in (1, 2, 3, 4)]
    return list(dict.fromkeys(scale if about >= 1 else 1 / scale for scale in found))


def _crop_shift(size, part, scale, cells) -> list | None:
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


def _raster(tree: Quadtree, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The strengths at points in px of the tree; beyond its border those at the border."""
    strength = _grids(tree)[2].float()
    rows, cols = ((px / tree.min_leaf).floor().long().clamp_(0, cells - 1) for px, cells in zip((rows, cols), strength.shape))
    return strength[rows][:, cols]


def _shift_of_result(original: torch.Tensor, image: torch.Tensor) -> list[int]:
    """Where in the original the result begins, in px. Raises ValueError unless one is the other or its centred crop."""
    size, part = tuple(original.shape[1:3]), tuple(image.shape[1:3])
    shift = [0, 0] if size == part else _crop_shift(size, part, 1, CELL_SIDES)
    if shift is None:
        raise ValueError(
            f"original: expected the size of image, {part[1]} x {part[0]} px, or that before the VAE's crop, less than a cell larger, got {size[1]} x {size[0]} px. "
            + _way_to_the_original(size, part))
    return shift


def _way_to_the_original(size: tuple[int, int], part: tuple[int, int]) -> str:
    """What to do about an original of another size than the result's, `part`."""
    if find_placement(size, part) is None:
        return "That is another aspect: connect the picture that went into VAE Encode, after any crop."
    scale = _simple_scales(size, part)[0]
    what = f"{scale:g} times as large" if scale > 1 else f"{1 / scale:g} times smaller" if scale < 1 else "of another scale"
    return f"The result is {what}: connect the picture that went into VAE Encode, after all scaling. Only pixels of its scale can be kept exactly."


def _common_parts(original: torch.Tensor, image: torch.Tensor, shift) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """What the two pictures share: in the original and in the image."""
    spans = [(max(start, 0), min(start + part, side), start) for start, part, side in zip(shift, image.shape[1:3], original.shape[1:3])]
    return tuple(slice(first, last) for first, last, _ in spans), tuple(slice(first - start, last - start) for first, last, start in spans)


def _laid_over(original: torch.Tensor, image: torch.Tensor, shift) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with one number, size, kind and device: the originals, and the originals with the images laid on them."""
    dtype = torch.promote_types(original.dtype, image.dtype)
    original, image = original.to(image.device, dtype), image.to(dtype)
    if len(original) != len(image):
        original = original[torch.arange(len(image), device=image.device) % len(original)]
    only = _only_alpha(original, image)
    original, image = _equal_channels(original, image)
    laid = image
    if original.shape != image.shape:
        there, here = _common_parts(original, image, shift)
        laid = original.clone()
        laid[:, there[0], there[1]] = image[:, here[0], here[1]]
    if only == "original":
        laid[..., -1] = original[..., -1]
    elif only == "image":
        original[..., -1] = laid[..., -1]
    return original, laid


def _only_alpha(original: torch.Tensor, image: torch.Tensor) -> str | None:
    """Which of two pictures alone has an alpha channel."""
    has = {name: picture.shape[-1] in (2, 4) for name, picture in (("original", original), ("image", image))}
    return None if has["original"] == has["image"] else "original" if has["original"] else "image"


def _equal_channels(original: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with as many channels: grey becomes colour, and who has no alpha becomes opaque."""
    counts = [picture.shape[-1] for picture in (original, image)]
    if counts[0] == counts[1]:
        return original, image
    if max(counts) > 4:
        raise ValueError(f"original: expected the channels of image, {counts[1]}, or 1 to 4 in both, got {counts[0]}. Connect pictures in grey or colours.")
    colours = max(count - (count + 1) % 2 for count in counts)
    equal = []
    for picture, count in zip((original, image), counts):
        parts = [picture[..., :count - (count + 1) % 2].expand(*picture.shape[:-1], colours)]
        if any(other in (2, 4) for other in counts):
            parts.append(picture[..., -1:] if count in (2, 4) else torch.ones_like(picture[..., :1]))
        equal.append(torch.cat(parts, -1))
    return equal[0], equal[1]


def _placement_of_pictures(tree: Quadtree, original: torch.Tensor, image: torch.Tensor, shift) -> tuple[Span, Span]:
    """How the original lies over the tree, which may have been made from it or from what the crop has left of it."""
    sizes = [tuple(picture.shape[1:3]) for picture in (original, image)]
    spans = find_placement((tree.height, tree.width), sizes[0])
    if spans is None:
        spans = _placement_of(tree, *sizes[1])
        spans = spans and tuple(Span(span.scale, span.shift - start) for span, start in zip(spans, shift))
    if spans is None:
        raise ValueError(
            f"quadtree: made for a picture of {tree.width} x {tree.height} px, but image is {sizes[1][1]} x {sizes[1][0]} and original {sizes[0][1]} x {sizes[0][0]}, "
            f"which is another aspect. Connect the quadtree that was sampled with. {way_to_the_tree(tree)}")
    return spans


def _cells_under(first: float, last: float) -> slice:
    """The cells whose centres lie under a stretch, in cells; one shorter than a cell takes the cell it lies in."""
    if last - first < 1:
        first = math.floor((first + last) / 2)
        return slice(max(first, 0), max(first + 1, 0))
    return slice(max(math.ceil(first - 0.5), 0), max(math.ceil(last - 0.5), 0))


def _levels_between(min_leaf: int, max_leaf: int) -> int:
    return (max_leaf // min_leaf).bit_length() - 1


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise Refusal("share", "{name}: expected a number from 0 to 1, got {got}.", name=name, got=value)


def _check_picture(image: torch.Tensor, name: str) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"{name}: expected a picture of shape (batch, height, width, channels), got {tuple(image.shape)}. Connect an IMAGE that is not empty.")


def _flat_mask(mask: torch.Tensor, name: str) -> torch.Tensor:
    """One (H, W) mask in 0..1 from a batch: the maximum."""
    mask = mask.float()
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"{name}: expected a MASK of shape (batch, height, width), got {tuple(mask.shape)}.")
    if not bool(torch.isfinite(mask).all()):
        raise ValueError(f"{name}: expected values between 0 and 1, got NaN or infinite ones.")
    return (mask.amax(0) if mask.ndim == 3 else mask).clamp(0, 1)


def _blocks(values: torch.Tensor, side: int, dim: int, how=torch.sum) -> torch.Tensor:
    """Reduce runs of `side` along a dimension; the last run may be shorter."""
    length = values.shape[dim]
    whole = length - length % side
    parts = []
    if whole:
        parts.append(how(values.narrow(dim, 0, whole).unflatten(dim, (whole // side, side)), dim=dim + 1))
    if whole < length:
        parts.append(how(values.narrow(dim, whole, length - whole), dim=dim, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _pool(values: torch.Tensor, side: int, how) -> torch.Tensor:
    """Reduce side x side blocks of a (rows, cols) grid."""
    return _blocks(_blocks(values, side, 0, how), side, 1, how)


def _gradient_energy(band: torch.Tensor, rows: int) -> torch.Tensor:
    """Squared differences to the right and lower neighbour, per channel: (B, rows, W, C)."""
    energy = F.pad((band[:, :, 1:] - band[:, :, :-1]).square_(), (0, 0, 0, 1))
    energy[:, :band.shape[1] - 1] += (band[:, 1:] - band[:, :-1]).square_()
    return energy[:, :rows]


def _content(cells: CellStatistics, metric: str) -> torch.Tensor:
    """Content on the 0..255 scale: sqrt(var R + var G + var B), the RMS gradient, or their quadratic mean."""
    area = cells.area[None, :, :, None]
    variance = (cells.squares / area - (cells.sums / area).square()).clamp_min(0).sum(-1)
    if metric == "variance":
        return 255 * variance.amax(0).sqrt()
    gradient = cells.gradients / cells.area
    if metric == "gradient":
        return 255 * gradient.amax(0).sqrt()
    if metric == "combined":
        return 255 * ((variance + gradient) / 2).amax(0).sqrt()
    raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}.")


def _content_levels(cells: CellStatistics, max_leaf: int, metric: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Contents and areas per level, smallest leaves first."""
    contents, areas = [], []
    for level in range(_levels_between(cells.cell_px, max_leaf) + 1):
        cells = coarsen(cells, 2) if level else cells
        contents.append(_content(cells, metric))
        areas.append(cells.area)
    return contents, areas


def _double(grid: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Each node's value for its four quarters, cut to the finer grid's shape."""
    return grid.repeat_interleave(2, 0).repeat_interleave(2, 1)[:like.shape[0], :like.shape[1]]


def _least_of_ancestors(contents: list[torch.Tensor]) -> list[torch.Tensor]:
    """A node is split when it and all above it exceed the threshold: when the least of them does."""
    least = [contents[-1]]
    for content in reversed(contents[:-1]):
        least.append(torch.minimum(content, _double(least[-1], content)))
    return least[::-1]


def _threshold_for_budget(effective: list[torch.Tensor], areas: list[torch.Tensor], budget: float) -> float:
    """The threshold whose area-mean strength comes nearest to the budget.

    Splitting a node adds its share of the area over the number of levels, so the mean strength is a
    cumulated sum over nodes in order of their content.
    """
    levels = len(effective) - 1
    if levels == 0:
        return VISIBLE
    values, order = torch.cat([grid.flatten() for grid in effective[1:]]).sort(descending=True)
    gains = torch.cat([grid.flatten() for grid in areas[1:]])[order] / (areas[0].sum() * levels)
    reached = F.pad(gains.cumsum(0), (1, 0))  # the mean strength after 0, 1, 2, ... splits
    wanted = min(int(torch.searchsorted(reached, budget)), len(values)) - 1
    # Nodes of one content are split together or not at all.
    fewer, more = int((values > values[wanted]).sum()), int((values >= values[wanted]).sum())
    splits = more if reached[more] - budget < budget - reached[fewer] else fewer
    return max(float(values[splits]) if splits < len(values) else 0.0, VISIBLE)


def _leaf_level(split: list[torch.Tensor]) -> torch.Tensor:
    """The level of the leaf over each smallest cell: the top level less the splits above the cell."""
    level = torch.zeros_like(split[-1], dtype=torch.long)
    for finer, here in zip(reversed(split[:-1]), reversed(split[1:])):
        level = _double(level + ~here, finer)
    return level


def _at_level(grids: list[torch.Tensor], level: torch.Tensor) -> torch.Tensor:
    """For each smallest cell the value of the leaf over it."""
    out = grids[-1]
    for depth in range(len(grids) - 2, -1, -1):
        out = torch.where(level[::1 << depth, ::1 << depth] > depth, _double(out, grids[depth]), grids[depth])
    return out


def _collect_leaves(height, width, min_leaf, max_leaf, level, detail, strength) -> Quadtree:
    """Make the leaves from three grids of smallest cells, each constant over a leaf."""
    found = []
    for depth in range(_levels_between(min_leaf, max_leaf) + 1):
        step, side = 1 << depth, min_leaf << depth
        here = level[::step, ::step] == depth
        rows, cols = here.nonzero(as_tuple=True)
        values = zip((rows * side).tolist(), (cols * side).tolist(), detail[::step, ::step][here].tolist(), strength[::step, ::step][here].tolist())
        found += [Leaf(Rect(top, left, min(top + side, height), min(left + side, width)), side, content, amount) for top, left, content, amount in values]
    found.sort(key=lambda leaf: (leaf.rect.top, leaf.rect.left))
    return Quadtree(height, width, min_leaf, max_leaf, tuple(found))


def _grids(tree: Quadtree) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Level, detail and strength of the leaf over each smallest cell."""
    rows, cols = math.ceil(tree.height / tree.min_leaf), math.ceil(tree.width / tree.min_leaf)
    leaves = torch.tensor([(leaf.rect.top, leaf.rect.left, leaf.side, leaf.detail, leaf.strength) for leaf in tree.leaves], dtype=torch.float64)
    grids = torch.zeros(3, rows, cols, dtype=torch.float64)
    for depth in range(_levels_between(tree.min_leaf, tree.max_leaf) + 1):
        step, side = 1 << depth, tree.min_leaf << depth
        mine = leaves[leaves[:, 2] == side]
        coarse = torch.zeros(4, math.ceil(rows / step), math.ceil(cols / step), dtype=torch.float64)
        values = torch.stack([torch.full_like(mine[:, 2], depth), mine[:, 3], mine[:, 4], torch.ones_like(mine[:, 2])])
        coarse[:, (mine[:, 0] // side).long(), (mine[:, 1] // side).long()] = values
        fine = coarse.repeat_interleave(step, 1).repeat_interleave(step, 2)[:, :rows, :cols]
        grids += fine[:3] * fine[3]
    return grids[0].long(), grids[1], grids[2]


def _protected(tree: Quadtree, level: torch.Tensor, strength: torch.Tensor, protect: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split leaves where the protection is uneven, and weaken each by the most that it is protected."""
    if bool((protect == protect[0, 0]).all()):
        # As good at any size; Load Image gives a small black mask where nothing was painted.
        return level, strength * (1 - protect[0, 0].item())
    spans = find_placement((tree.height, tree.width), tuple(protect.shape))
    if spans is None:
        raise ValueError(
            f"protect: expected a mask of the quadtree's picture, {tree.width} x {tree.height} px or of that aspect, got {protect.shape[1]} x {protect.shape[0]}. "
            "Crop and scale the mask together with the picture, or take it from the picture that the quadtree was made from.")
    protected = protect.cpu()
    for dim, (span, side) in enumerate(zip(spans, (tree.height, tree.width))):
        protected = _most_under(protected, span, side, tree.min_leaf, dim)
    return _split_uneven(tree, level, protected, 1 / 255), strength * (1 - protected)


def _most_under(mask: torch.Tensor, span: Span, side: int, cell_px: int, dim: int) -> torch.Tensor:
    """The greatest value of a mask under each of the cells that cover a side of the tree's picture."""
    borders = torch.arange(0, side + cell_px, cell_px, dtype=torch.float64).clamp_(max=side)
    positions = span.px_back(borders)
    # What arithmetic leaves of a whole number is no pixel more.
    first = (positions[:-1] + 1e-6).floor().long().clamp_(0, mask.shape[dim] - 1).tolist()
    last = (positions[1:] - 1e-6).ceil().long().clamp_(1, mask.shape[dim]).tolist()
    return torch.stack([mask.narrow(dim, start, max(end - start, 1)).amax(dim) for start, end in zip(first, last)], dim)


def _split_uneven(tree: Quadtree, level: torch.Tensor, values: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Split leaves, given by the level over each smallest cell, until the cells' values differ by no more than the tolerance in any."""
    split = [torch.zeros_like(level, dtype=torch.bool)]
    finest, low, high = level, values, values
    for depth in range(1, _levels_between(tree.min_leaf, tree.max_leaf) + 1):
        finest, low, high = _pool(finest, 2, torch.amin), _pool(low, 2, torch.amin), _pool(high, 2, torch.amax)
        split.append((finest < depth) | (high - low > tolerance))
    return _leaf_level(split)


def _leaf_ids(tree: Quadtree) -> torch.Tensor:
    """A number per leaf, over each smallest cell: its top left cell's."""
    level = _grids(tree)[0]
    rows, cols = torch.arange(level.shape[0])[:, None], torch.arange(level.shape[1])
    return (rows >> level << level) * level.shape[1] + (cols >> level << level)


def _draw_borders(out: torch.Tensor, leaf_ids: torch.Tensor, cell_px: int) -> None:
    """Draw a light line, in place, wherever two neighbouring cells belong to different leaves."""
    height, width = out.shape[1:3]
    thickness = max(1, min(cell_px // 8, round(max(height, width) / 1024)))
    below = (leaf_ids[1:] != leaf_ids[:-1]).repeat_interleave(cell_px, 1)[:, :width]
    beside = (leaf_ids[:, 1:] != leaf_ids[:, :-1]).repeat_interleave(cell_px, 0)[:height]
    for offset in range(thickness):
        lines = out[:, cell_px + offset::cell_px]
        lines[:, below[:lines.shape[1]].to(out.device)] = 0.9
        lines = out[:, :, cell_px + offset::cell_px]
        lines[:, beside[:, :lines.shape[2]].to(out.device)] = 0.9


def _inner_ramp(changed: torch.Tensor, radius: int) -> torch.Tensor:
    """From 0 on every kept pixel to 1 at 2 * radius px inside the changed ones: shrink, then blur as far."""
    if radius < 1:
        return changed
    side = 2 * radius + 1
    ramp = changed[None, None]
    for kernel, padding in (((side, 1), (radius, 0)), ((1, side), (0, radius))):
        ramp = -F.max_pool2d(-ramp, kernel, 1, padding)
    for kernel, padding in (((side, 1), (radius, 0)), ((1, side), (0, radius))):
        ramp = F.avg_pool2d(ramp, kernel, 1, padding, count_include_pad=False)
    return ramp[0, 0] * changed

"""Where is detail in a picture? Everything here is in pixels.

Leaves are aligned squares, so the whole tree comes from one pyramid: sums and sums of squares per
smallest leaf, then 2 x 2 pooling upwards. Finkel and Bentley, "Quad Trees", 1974.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .utils import Rect, Refusal, blocks, check_picture, check_share, double, pool

METRICS = ("variance", "gradient", "combined")

# Pixels that are summed at once: few enough for a processor's cache, enough to keep its threads busy.
BAND_PIXELS = 1 << 20

# One level of an 8-bit picture: a smaller deviation is rounding, not detail.
VISIBLE = 1.0

# Contents are compared to this part of a level.
PRICE_STEPS = 256
# Above every content, for squares that are split first.
FIRST_PRICE = 1e300


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
    check_picture(image, "image")
    sums, squares, gradients = [], [], []
    height = max(BAND_PIXELS // (image.shape[0] * image.shape[2]) // cell_px, 1) * cell_px
    for top in range(0, image.shape[1], height):
        band = image[:, top:top + height + 1, :, :3].float()
        if with_gradients:
            gradients.append(blocks(_gradient_energy(band, height), cell_px, 1).sum(-1))
        band = band[:, :height]
        sums.append(blocks(band, cell_px, 1))
        squares.append(blocks(band.square(), cell_px, 1))
    # From here on the grids are small: the CPU is quicker, and has the float64 that Apple's GPUs lack.
    fold = lambda rows: blocks(torch.cat(rows, 1).cpu().double(), cell_px, 2)
    rows, cols = (blocks(torch.ones(length, dtype=torch.float64), cell_px, 0) for length in image.shape[1:3])
    found = CellStatistics(image.shape[1], image.shape[2], cell_px, rows[:, None] * cols, fold(sums), fold(squares), fold(gradients) if gradients else None)
    if not bool(torch.isfinite(found.squares).all()):
        raise ValueError("image: expected pixels between 0 and 1, got NaN or infinite ones. Look for the node before this one that made them (a VAE in half precision often does).")
    return found


def coarsen(cells: CellStatistics, factor: int) -> CellStatistics:
    """Join factor x factor cells into one; the last row and column may be smaller."""
    pool = lambda values, dim: blocks(blocks(values, factor, dim), factor, dim + 1)
    gradients = None if cells.gradients is None else pool(cells.gradients, 1)
    return CellStatistics(cells.height, cells.width, cells.cell_px * factor, pool(cells.area, 0), pool(cells.sums, 1), pool(cells.squares, 1), gradients)


def build_quadtree(
    image: torch.Tensor, *, detail_budget: float = 0.4, content_threshold: float = 25.0, min_leaf: int = 64,
    max_leaf: int = 0, min_denoise: float = 0.0, max_denoise: float = 1.0, metric: str = "variance",
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
    """Build the tree that redraws the most content for a budget, or the one of a threshold, and give every leaf its strength.

    cells: one per smallest leaf. detail_budget: share of the picture to redraw, 0..1, of which more never redraws less
    anywhere; 0 splits squares while their content (0..255 scale) exceeds content_threshold. max_leaf: 0 fits the picture,
    see largest_leaf. A leaf's strength runs from min_denoise at max_leaf to max_denoise at the smallest leaf, in log2 of
    the side.
    """
    check_leaves(cells.cell_px, max_leaf)
    max_leaf = largest_leaf(cells.cell_px, max_leaf, cells.height, cells.width)
    check_share("detail_budget", detail_budget)
    check_strengths(min_denoise, max_denoise)
    if content_threshold < 0:
        raise Refusal("not_negative", "{name}: expected 0 or more, got {got}.", name="content_threshold", got=content_threshold)
    contents, areas = _content_levels(cells, max_leaf, metric)
    if detail_budget > 0:
        split = _best_splits(contents[0], areas, detail_budget)
    else:
        split = [values > content_threshold for values in _least_of_ancestors(contents)]
    level = leaf_level(split)
    top_level = len(contents) - 1
    scale = 1.0 - level / top_level if top_level else torch.ones_like(contents[0])
    strength = min_denoise + (max_denoise - min_denoise) * scale
    return collect_leaves(cells.height, cells.width, cells.cell_px, max_leaf, level, at_level(contents, level), strength)


def largest_leaf(min_leaf: int, max_leaf: int, height: int, width: int) -> int:
    """The side of the largest leaves: max_leaf, or for 0 what fits a height x width picture.

    That is min_leaf doubled to about a quarter of the longer side, and once at least: at a budget of 0.4, photos of 1 to 16
    megapixels then keep a third to a half of themselves exactly (benchmarks/RESULTS.md).
    """
    if max_leaf:
        return max_leaf
    return min_leaf << max(round(math.log2(max(height, width) / 4 / min_leaf)), 1)


def check_leaves(min_leaf: int, max_leaf: int) -> None:
    """Raise Refusal unless max_leaf is min_leaf doubled a whole number of times, or 0 for what fits the picture."""
    if min_leaf >= 1 and max_leaf == 0:
        return
    if min_leaf < 1 or max_leaf < min_leaf:
        raise Refusal(
            "min_leaf_at_most", "min_leaf: expected 1 px or more and at most max_leaf ({max_leaf}), got {min_leaf}. Make min_leaf smaller or max_leaf larger.",
            min_leaf=min_leaf, max_leaf=max_leaf)
    if min_leaf << levels_between(min_leaf, max_leaf) != max_leaf:
        below = min_leaf << levels_between(min_leaf, max_leaf)
        raise Refusal(
            "max_leaf_doubled", "max_leaf: expected min_leaf ({min_leaf}) doubled some times, got {max_leaf}. The nearest are {below} and {above}.",
            min_leaf=min_leaf, max_leaf=max_leaf, below=below, above=below * 2)


def check_strengths(min_denoise: float, max_denoise: float) -> None:
    """Raise Refusal unless both are strengths and the first is no larger than the second."""
    check_share("min_denoise", min_denoise)
    check_share("max_denoise", max_denoise)
    if min_denoise > max_denoise:
        raise Refusal(
            "min_denoise_at_most",
            "min_denoise: expected at most max_denoise ({max_denoise}), got {min_denoise}. To redraw flat parts instead, use Quadtree Adjust with invert.",
            min_denoise=min_denoise, max_denoise=max_denoise)


def levels_between(min_leaf: int, max_leaf: int) -> int:
    return (max_leaf // min_leaf).bit_length() - 1


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
    for level in range(levels_between(cells.cell_px, max_leaf) + 1):
        cells = coarsen(cells, 2) if level else cells
        contents.append(_content(cells, metric))
        areas.append(cells.area)
    return contents, areas


def _least_of_ancestors(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """A square is split when it and all above it exceed a threshold: when the least of them does."""
    least = [values[-1]]
    for grid in reversed(values[:-1]):
        least.append(torch.minimum(grid, double(least[-1], grid)))
    return least[::-1]


def _best_splits(content: torch.Tensor, areas: list[torch.Tensor], budget: float) -> list[torch.Tensor]:
    """The squares to split, per level, for the tree that redraws the most content at a mean strength as near to the budget as can be.

    content: of the smallest cells. Splitting a square redraws all of it by one step of strength more, so a tree's worth
    at a price for redrawn area is a sum over its split squares, and the best trees for falling prices grow out of each
    other (cost-complexity pruning: Breiman, Friedman, Olshen, Stone 1984). Where one step is large, since a flat square
    pays only together with the busy ones in it, these follow it one by one.
    """
    prices = _prices(content, areas)
    wanted = budget * float(areas[0].sum()) * (len(areas) - 1)
    while prices is not None:
        values = _least_of_ancestors(prices)
        price, is_over, is_nearer = _price_at(values, areas, wanted)
        prices = _with_first_split(prices, values, price) if is_over else None
    return [grid >= price if is_nearer else grid > price for grid in values]


def _prices(content: torch.Tensor, areas: list[torch.Tensor]) -> list[torch.Tensor]:
    """For each square, the highest mean content of what it and any squares in it redraw when they are split together.

    That is isotonic regression over the tree, by pooling adjacent violators: a square takes in those blocks of split
    squares below it whose mean is above its own. blocks: (content and area, rows, cols, blocks) per square.
    """
    # In whole parts of a level: sums of whole numbers are exact, and so what is equal stays equal.
    content = torch.where(content < VISIBLE, 0, (content * PRICE_STEPS).round())
    own, prices = torch.stack([content * areas[0], areas[0]]), [torch.zeros_like(content)]
    blocks = own.new_zeros(*own.shape, 0)
    for _ in areas[1:]:
        own, blocks = torch.stack([pool(grid, 2, torch.sum) for grid in own]), _of_quarters(blocks)
        order = _mean_content(blocks).argsort(-1, descending=True)
        blocks = blocks.gather(-1, order.expand_as(blocks))
        joined = torch.cat([own[..., None], blocks], -1).cumsum(-1)
        price, taken = _mean_content(joined).max(-1, keepdim=True)
        left = torch.arange(blocks.shape[-1]) >= taken
        blocks = torch.cat([joined.gather(-1, taken.expand(2, *taken.shape)), blocks * left], -1)
        prices.append(price[..., 0])
    return prices


def _mean_content(blocks: torch.Tensor) -> torch.Tensor:
    """Content over area; 0 where there is nothing."""
    return blocks[0] / blocks[1].clamp(min=1)


def _of_quarters(blocks: torch.Tensor) -> torch.Tensor:
    """The blocks of each 2 x 2 squares together: (2, rows, cols, n) to (2, rows / 2, cols / 2, 4 n)."""
    blocks = F.pad(blocks, (0, 0, 0, blocks.shape[2] % 2, 0, blocks.shape[1] % 2))
    _, rows, cols, count = blocks.shape
    return blocks.view(2, rows // 2, 2, cols // 2, 2, count).transpose(2, 3).reshape(2, rows // 2, cols // 2, 4 * count)


def _price_at(values: list[torch.Tensor], areas: list[torch.Tensor], wanted: float) -> tuple[float, bool, bool]:
    """The value of the squares with which the split area passes what is wanted; whether it does; whether it is nearer with them.

    Squares of one value are split together or not at all, those of value 0 never.
    """
    ordered, order = torch.cat([grid.flatten() for grid in values]).sort(descending=True)
    reached = F.pad(torch.cat([grid.flatten() for grid in areas])[order].cumsum(0), (1, 0))
    place = min(int(torch.searchsorted(reached, wanted)), int((ordered > 0).sum())) - 1
    if place < 0:
        return 0.0, False, False
    price = ordered[place]
    fewer, more = float(reached[(ordered > price).sum()]), float(reached[(ordered >= price).sum()])
    return float(price), more > wanted, more - wanted < wanted - fewer


def _with_first_split(prices: list[torch.Tensor], values: list[torch.Tensor], price: float) -> list[torch.Tensor] | None:
    """The prices once the uppermost squares of a value are split without what is in them; None if nothing in them is worth more."""
    above = [double(grid, finer) > price for grid, finer in zip(values[1:], values)] + [torch.ones_like(values[-1], dtype=torch.bool)]
    first = [(grid == price) & open_above for grid, open_above in zip(values, above)]
    prices = [
        torch.where(value > price, math.inf, torch.where(is_first, FIRST_PRICE, grid)) for grid, value, is_first in zip(prices, values, first)]
    worth_more = any(bool(((grid > price) & (grid < FIRST_PRICE)).any()) for grid in _least_of_ancestors(prices))
    return prices if worth_more else None


def leaf_level(split: list[torch.Tensor]) -> torch.Tensor:
    """The level of the leaf over each smallest cell: the top level less the splits above the cell."""
    level = torch.zeros_like(split[-1], dtype=torch.long)
    for finer, here in zip(reversed(split[:-1]), reversed(split[1:])):
        level = double(level + ~here, finer)
    return level


def at_level(grids: list[torch.Tensor], level: torch.Tensor) -> torch.Tensor:
    """For each smallest cell the value of the leaf over it."""
    out = grids[-1]
    for depth in range(len(grids) - 2, -1, -1):
        out = torch.where(level[::1 << depth, ::1 << depth] > depth, double(out, grids[depth]), grids[depth])
    return out


def collect_leaves(height, width, min_leaf, max_leaf, level, detail, strength) -> Quadtree:
    """Make the leaves from three grids of smallest cells, each constant over a leaf."""
    found = []
    for depth in range(levels_between(min_leaf, max_leaf) + 1):
        step, side = 1 << depth, min_leaf << depth
        here = level[::step, ::step] == depth
        rows, cols = here.nonzero(as_tuple=True)
        values = zip((rows * side).tolist(), (cols * side).tolist(), detail[::step, ::step][here].tolist(), strength[::step, ::step][here].tolist())
        found += [Leaf(Rect(top, left, min(top + side, height), min(left + side, width)), side, content, amount) for top, left, content, amount in values]
    found.sort(key=lambda leaf: (leaf.rect.top, leaf.rect.left))
    return Quadtree(height, width, min_leaf, max_leaf, tuple(found))


def grids_of(tree: Quadtree) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Level, detail and strength of the leaf over each smallest cell."""
    rows, cols = math.ceil(tree.height / tree.min_leaf), math.ceil(tree.width / tree.min_leaf)
    leaves = torch.tensor([(leaf.rect.top, leaf.rect.left, leaf.side, leaf.detail, leaf.strength) for leaf in tree.leaves], dtype=torch.float64)
    grids = torch.zeros(3, rows, cols, dtype=torch.float64)
    for depth in range(levels_between(tree.min_leaf, tree.max_leaf) + 1):
        step, side = 1 << depth, tree.min_leaf << depth
        mine = leaves[leaves[:, 2] == side]
        coarse = torch.zeros(4, math.ceil(rows / step), math.ceil(cols / step), dtype=torch.float64)
        values = torch.stack([torch.full_like(mine[:, 2], depth), mine[:, 3], mine[:, 4], torch.ones_like(mine[:, 2])])
        coarse[:, (mine[:, 0] // side).long(), (mine[:, 1] // side).long()] = values
        fine = coarse.repeat_interleave(step, 1).repeat_interleave(step, 2)[:, :rows, :cols]
        grids += fine[:3] * fine[3]
    return grids[0].long(), grids[1], grids[2]


def split_uneven(tree: Quadtree, level: torch.Tensor, values: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Split leaves, given by the level over each smallest cell, until the cells' values differ by no more than the tolerance in any."""
    split = [torch.zeros_like(level, dtype=torch.bool)]
    finest, low, high = level, values, values
    for depth in range(1, levels_between(tree.min_leaf, tree.max_leaf) + 1):
        finest, low, high = pool(finest, 2, torch.amin), pool(low, 2, torch.amin), pool(high, 2, torch.amax)
        split.append((finest < depth) | (high - low > tolerance))
    return leaf_level(split)

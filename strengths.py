"""Which strengths do a mask and a remapping give? In pixels."""
from __future__ import annotations

import torch

from .placement import Span, find_placement
from .quadtree import Quadtree, at_level, check_leaves, check_strengths, collect_leaves, grids_of, largest_leaf, leaf_level, levels_between, split_uneven
from .utils import pool

# What becomes of a leaf of the smallest size that holds black and other pixels of a mask.
MASK_EDGES = ("keep black", "mean")

# Of a mask: below half a level of 8 bits.
BLACK = 0.5 / 255

# Strengths of masks are whole parts of this: it holds every hundredth that is typed and every level of an 8-bit mask.
MASK_GRID = 5100


def quadtree_from_mask(mask: torch.Tensor, *, min_leaf: int = 64, max_leaf: int = 0, edges: str = "keep black") -> Quadtree:
    """Build a tree whose strengths are a mask's: leaves are as large as the mask is even.

    mask: (B, H, W) or (H, W) in 0..1, white = 1 = redraw; of several the maximum counts.
    A leaf on an edge of the mask, min_leaf large, gets the mean, to a hundredth or an 8-bit level and parts between; with
    edges "keep black" one that holds any black gets 0, so that all that is black is kept.
    """
    check_leaves(min_leaf, max_leaf)
    if edges not in MASK_EDGES:
        raise ValueError(f"edges: expected one of {', '.join(MASK_EDGES)}, got {edges!r}.")
    mask = _flat_mask(mask, "mask")
    max_leaf = largest_leaf(min_leaf, max_leaf, *mask.shape)
    levels = levels_between(min_leaf, max_leaf)
    area = pool(torch.ones_like(mask), min_leaf, torch.sum)
    mean, low, high = (pool(mask, min_leaf, how) for how in (torch.sum, torch.amin, torch.amax))
    means, lows, uneven = [mean / area], [low], [high - low > 1 / 255]
    for _ in range(levels):
        area, mean = (pool(values, 2, torch.sum) for values in (area, mean))
        low, high = pool(low, 2, torch.amin), pool(high, 2, torch.amax)
        means.append(mean / area)
        lows.append(low)
        uneven.append(high - low > 1 / 255)
    level = leaf_level(uneven)
    strength = (at_level(means, level).double() * MASK_GRID).round() / MASK_GRID
    if edges == "keep black":
        strength[at_level(lows, level) < BLACK] = 0
    return collect_leaves(*mask.shape, min_leaf, max_leaf, level, strength * 255, strength)


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
    level, detail, strength = grids_of(tree)
    strength = min_denoise + (max_denoise - min_denoise) * (1 - strength if invert else strength) ** gamma
    if protect is not None:
        level, strength = _protected(tree, level, strength, _flat_mask(protect, "protect"))
    return collect_leaves(tree.height, tree.width, tree.min_leaf, tree.max_leaf, level, detail, strength)


def _flat_mask(mask: torch.Tensor, name: str) -> torch.Tensor:
    """One (H, W) mask in 0..1 from a batch: the maximum."""
    mask = mask.float()
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"{name}: expected a MASK of shape (batch, height, width), got {tuple(mask.shape)}.")
    if not bool(torch.isfinite(mask).all()):
        raise ValueError(f"{name}: expected values between 0 and 1, got NaN or infinite ones.")
    return (mask.amax(0) if mask.ndim == 3 else mask).clamp(0, 1)


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
    return split_uneven(tree, level, protected, 1 / 255), strength * (1 - protected)


def _most_under(mask: torch.Tensor, span: Span, side: int, cell_px: int, dim: int) -> torch.Tensor:
    """The greatest value of a mask under each of the cells that cover a side of the tree's picture."""
    borders = torch.arange(0, side + cell_px, cell_px, dtype=torch.float64).clamp_(max=side)
    positions = span.px_back(borders)
    # What arithmetic leaves of a whole number is no pixel more.
    first = (positions[:-1] + 1e-6).floor().long().clamp_(0, mask.shape[dim] - 1).tolist()
    last = (positions[1:] - 1e-6).ceil().long().clamp_(1, mask.shape[dim]).tolist()
    return torch.stack([mask.narrow(dim, start, max(end - start, 1)).amax(dim) for start, end in zip(first, last)], dim)

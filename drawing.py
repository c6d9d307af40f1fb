"""How does a tree look, laid over its picture?"""
from __future__ import annotations

import torch

from .quadtree import Quadtree, grids_of

# The colour map viridis (CC0) at eleven even steps: even to the eye, and safe for colour-blind readers.
VIRIDIS = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140),
    (34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)


def draw_quadtree(image: torch.Tensor, tree: Quadtree, *, opacity: float = 0.45) -> torch.Tensor:
    """Lay the leaves' strengths (as colours) and borders over a picture of the tree's size.

    image: (B, H, W, C). Returns (B, H, W, 3) in 0..1.
    """
    if image.shape[1:3] != (tree.height, tree.width):
        raise ValueError(f"image: expected the picture that the quadtree was made from, {tree.width} x {tree.height} px, got {image.shape[2]} x {image.shape[1]}.")
    leaf_ids, strength = _leaf_ids(tree), grids_of(tree)[2]
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


def _leaf_ids(tree: Quadtree) -> torch.Tensor:
    """A number per leaf, over each smallest cell: its top left cell's."""
    level = grids_of(tree)[0]
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

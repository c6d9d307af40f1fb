"""What does the tree for a budget redraw, against one threshold, and what does a run by it cost? Counts only."""
from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from measuring import table
from qtd_pack.quadtree import CellStatistics

from plans import PHOTOS, Redrawn, at_cost, pairs, photo_cells, photo_tree, redrawn, smallest_cells, threshold_tree

RULES = {"one threshold": threshold_tree, "best tree": photo_tree}


def most_content(cells: CellStatistics, max_leaf: int, strength: float) -> float:
    """What no tree of this mean strength can exceed: the least, over prices of redrawn area, of the best worth and the price paid.

    Found without building a tree: strengths are steps of a leaf's size, whatever the rule that sizes follow.
    """
    content, area = (values.view(cells.area.shape) for values in smallest_cells(cells))
    levels, least = (max_leaf // cells.cell_px).bit_length() - 1, float("inf")
    for price in torch.linspace(0, float(content.max()), 1000):
        gain, worth = (content - price) * area, torch.zeros_like(area)
        for _ in range(levels):
            gain, worth = (four_together(grid) for grid in (gain, worth))
            worth = (worth + gain).clamp(min=0)
        least = min(least, float(worth.sum()) / levels + float(price) * strength * float(area.sum()))
    return least / float((content * area).sum())


def four_together(grid: torch.Tensor) -> torch.Tensor:
    padded = F.pad(grid, (0, grid.shape[1] % 2, 0, grid.shape[0] % 2))
    return padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]


def rule_row(rule: str, photos, side: int, budget: float, max_leaf: int) -> tuple:
    """One row of the table: the mean over the photos."""
    min_leaf, largest = 64 * side // 2048, max_leaf * side // 2048
    cells = [photo_cells(name, side, min_leaf) for name in photos]
    found = [redrawn(RULES[rule](name, side, budget, min_leaf, largest), one) for name, one in zip(photos, cells)]
    mean = Redrawn(*(statistics.mean(getattr(one, name) for one in found) for name in Redrawn.__slots__))
    bound = statistics.mean(most_content(one, largest, tree.strength) for one, tree in zip(cells, found))
    return max_leaf, budget, rule, *(f"{value:.3f}" for value in (mean.content, bound, mean.busiest, mean.busiest_kept, mean.kept, mean.strength))


def trees_part(tiny: bool) -> tuple[str, dict]:
    """The table of rules and the curves of both pairs."""
    photos, side = (PHOTOS[:1], 512) if tiny else (PHOTOS, 2048)
    rows = [rule_row(rule, photos, side, budget, max_leaf) for max_leaf, budget in ((512, 0.25), (512, 0.4), (512, 0.6), (1024, 0.25), (1024, 0.4)) for rule in RULES]
    text = "## The tree for a budget\n\n" + table(
        ("max_leaf", "budget", "rule", "content redrawn", "at most", "strength of the busiest tenth", "of it kept", "kept exactly", "mean strength"), rows)
    text += (
        "\nEight photos at 2048 px, smallest leaves of 64 px, means; largest leaves of 512 px are what fits these photos by itself. One threshold: the old rule, which split a square while its content exceeded one threshold. "
        "Content redrawn: of the smallest cells' content, strength for strength. At most: what no tree of that mean strength can exceed as long as a leaf's "
        "strength follows from its size (a bound, by prices). The busiest tenth: of the smallest cells.\n\n")
    found = pairs(photos, side)
    (old_name, old), (new_name, new) = found.items()
    rows = [(f"{cost:.2f}", f"{content:.3f}", f"{at_cost(new, cost):.3f}", f"{at_cost(new, cost) / content:.2f}") for cost, content in old]
    return text + table(("cost, of the full grid", f"content redrawn: {old_name}", new_name, "ratio"), rows) + (
        "\nAt equal cost, largest leaves of 512 px: windows of 256 to 1024 px, overlap 64 px, 20 steps, tokens as FLUX.1-dev counts them. Between budgets the curve of the new pair is a line, and flat beyond its last, 0.9.\n"), found

"""Do windows as tight as what is active look as good as squares at the same cost?

Photos by their detail, with squares and with tight windows, each at several overlaps: what an overlap costs, it gives back
in agreement with the same tree in one window. The two curves are compared where they cost the same.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from quality import Bench, added_by_leaves, held_out, in_windows, mean, one_window, psnr, seam_sums, strength_raster, table, whole_cost, worst_ratio
from qtd_pack.quadtree import Quadtree, build_quadtree
from qtd_pack.tiled_diffusion import TiledDiffusion

PICTURE_PX = 512
BUDGETS = (0.25, 0.4)
OVERLAPS_PX = (16, 32, 48, 64)
SHAPES = ("square", "tight")
LEAVES = dict(min_leaf=64, max_leaf=256)
WINDOWS = dict(min_window=96, max_window=192)


@dataclass(frozen=True)
class Point:
    """One way to sample, mean of the photos. cost: of the whole canvas. agreement: with one window, where something changes, in dB."""

    cost: float
    agreement: float
    seams: float
    leaves: float


def tree_of(bench: Bench, name: str, budget: float) -> Quadtree:
    return build_quadtree(bench.pictures[name], detail_budget=budget, **LEAVES)


def measure(bench: Bench, name: str, budget: float, settings: TiledDiffusion) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """Cost and agreement of one photo, and what windows' borders and leaves' borders add with the level beside them."""
    whole = bench.once(("by detail", name, budget), lambda: bench.paint(name, one_window(settings)).picture)
    painting = bench.paint(name, settings)
    changed = strength_raster(settings.tree, *whole.shape[1:3]) > 0
    leaves = added_by_leaves(painting.picture, settings.tree, {leaf.strength: bench.img2img(name, leaf.strength) for leaf in settings.tree.leaves})
    cost = painting.run.ledger.cost / whole_cost(painting.run)
    return cost, psnr(painting.picture[0][changed], whole[0][changed]), seam_sums(painting, whole), torch.tensor(leaves)


def point(bench: Bench, budget: float, shapes: str, overlap: int) -> Point:
    found = [
        measure(bench, name, budget, in_windows(tree_of(bench, name, budget), tile_overlap=overlap, window_shapes=shapes, **WINDOWS)) for name in bench.pictures]
    costs, agreements, seams, leaves = zip(*found)
    added, level = sum(leaves).tolist()
    return Point(mean(costs), mean(agreements), worst_ratio(sum(seams)), 1 + added / level)


def points(bench: Bench) -> dict[tuple[float, str], list[Point]]:
    """Growing overlaps for each budget and shape."""
    return {(budget, shapes): [point(bench, budget, shapes, overlap) for overlap in OVERLAPS_PX] for budget, shapes in itertools.product(BUDGETS, SHAPES)}


def squares_at(cost: float, squares: list[Point]) -> float | None:
    """The best agreement of squares at a cost, between those that were measured; None below and beyond them."""
    squares = sorted(squares, key=lambda square: square.cost)
    costs, best = [square.cost for square in squares], itertools.accumulate((square.agreement for square in squares), max)
    return float(numpy.interp(cost, costs, list(best))) if costs[0] <= cost <= costs[-1] else None


def agreement_rows(found: dict[tuple[float, str], list[Point]]) -> list[list]:
    rows = []
    for (budget, shapes), line in found.items():
        for overlap, here in zip(OVERLAPS_PX, line):
            same = squares_at(here.cost, found[budget, "square"]) if shapes == "tight" else None
            rows.append([
                f"{shapes}, budget {budget}", overlap, f"{here.cost:.2f}", f"{here.agreement:.1f}", "" if same is None else f"{same:.1f}",
                f"{here.seams:.3f}", f"{here.leaves:.3f}"])
    return rows


def draw(found: dict[tuple[float, str], list[Point]], file: Path) -> None:
    """Agreement over cost, a colour for each budget."""
    from plots import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (budget, shapes), line in found.items():
        axes.plot(
            [here.cost for here in line], [here.agreement for here in line], marker="o", markersize=4, color=f"C{BUDGETS.index(budget)}",
            linestyle="-" if shapes == "tight" else "--", label=f"{shapes}, budget {budget}")
    axes.set(xlabel="cost, share of the whole canvas", ylabel="PSNR to one window, dB", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


COLUMNS = "windows | overlap, px | cost | PSNR to one window, dB | squares at that cost | seams, all | leaf borders"


def agreement_text(bench: Bench, file: Path) -> str:
    """What stands in QUALITY.md; the plot is written to the file."""
    found = points(replace(bench, pictures=held_out(PICTURE_PX), cache={}))
    draw(found, file)
    return "\n\n".join((
        f"By detail, photos of {PICTURE_PX} px, leaves of {LEAVES['min_leaf']} to {LEAVES['max_leaf']} px, windows of {WINDOWS['min_window']} to {WINDOWS['max_window']} px. Cost is relative to the whole canvas, agreement is "
        "that with the same tree in one window, where anything changes. The overlap is what both spend on agreement: squares at that cost are read between the rows above.",
        table(COLUMNS, agreement_rows(found)), f"![Agreement over cost]({file.name})"))

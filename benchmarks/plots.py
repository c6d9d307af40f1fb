"""The plots beside RESULTS.md."""
from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def tree_plot(found: list[dict], file: Path) -> str:
    """Seconds over sides, both on logarithmic axes."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for key, label in (("recursion", "recursion, node after node"), ("node", "QuadtreeFromImage: tree and overlay"), ("tree", "tree"), ("one pass", "one pass of sums")):
        points = [(row["side"], row[key]) for row in found if key in row]
        axes.plot(*zip(*points), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="side of the picture, px", ylabel="seconds", xticks=[row["side"] for row in found])
    axes.set_xticks([row["side"] for row in found], [str(row["side"]) for row in found])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return f"\n![Seconds over the side of the picture]({file.name})\n"


def budget_plot(found: list[dict], file: Path) -> str:
    """Planned cost and measured time over the detail budget, one point per photo, and their means."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    budgets = sorted({row["budget"] for row in found})
    for key, label, colour, shift in (("planned", "planned cost", "tab:blue", -0.006), ("time", "measured time", "tab:orange", 0.006)):
        axes.scatter([row["budget"] + shift for row in found], [row[key] for row in found], s=12, alpha=0.5, color=colour)
        means = [sum(row[key] for row in found if row["budget"] == budget) / sum(row["budget"] == budget for row in found) for budget in budgets]
        axes.plot(budgets, means, marker="o", label=f"{label}, mean", color=colour)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", label="mean strength")
    axes.set(xlabel="detail budget", ylabel="share of the full grid", xlim=(0, 1), ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return f"\n![Cost over budget]({file.name})\n"


def pairs_plot(found: dict, file: Path) -> str:
    """Content redrawn over cost, a curve for each pair of tree and windows."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, points in found.items():
        axes.plot(*zip((0.0, 0.0), *points), marker="o", markersize=4, label=label)
    axes.set(xlabel="cost, share of the full grid", ylabel="content redrawn", xlim=(0, 1.05), ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return f"\n![Content redrawn over cost]({file.name})\n"

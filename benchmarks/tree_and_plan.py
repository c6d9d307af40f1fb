"""What do the tree and the plan cost, beside the model? Parts that need no sampling."""
from __future__ import annotations

import math

import torch
from measuring import medians, milliseconds, table
from qtd_pack.nodes import QuadtreeFromImage
from qtd_pack.quadtree import Leaf, Quadtree, build_quadtree
from qtd_pack.utils import Rect
from qtd_pack.sampling_run import strengths_in_cells
from qtd_pack.blending import plan_blend
from qtd_pack.windows import full_grid, plan_windows, window_sizes

from plans import FLUX_DEV, load_photo

SIDES = (1024, 2048, 4096, 8192, 16384)
RECURSION_UP_TO = 4096
THRESHOLD = 25.0


def enlarged(side: int) -> torch.Tensor:
    """The astronaut, (1, side, side, 3): filled band by band, as the whole takes 3 GB at 16384 px."""
    photo = load_photo("astronaut", 1024)
    image = torch.empty(1, side, side, 3)
    scale = side // 1024
    for top in range(0, 1024, 64):
        image[:, top * scale:(top + 64) * scale] = photo[:, top:top + 64].repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return image


def recursive_leaves(image: torch.Tensor, top: int, left: int, side: int, min_leaf: int) -> int:
    """The number of leaves, as a builder finds it that visits node after node."""
    part = image[top:top + side, left:left + side]
    content = 255 * float(part.var((0, 1), correction=0).sum().sqrt())
    if side == min_leaf or content <= THRESHOLD:
        return 1
    half = side // 2
    return sum(recursive_leaves(image, top + down, left + right, half, min_leaf) for down in (0, half) for right in (0, half))


def recursion(image: torch.Tensor, min_leaf: int = 64, max_leaf: int = 1024) -> int:
    side = image.shape[1]
    return sum(recursive_leaves(image[0], top, left, max_leaf, min_leaf) for top in range(0, side, max_leaf) for left in range(0, side, max_leaf))


def node(image: torch.Tensor) -> None:
    """QuadtreeFromImage as a user runs it: the tree, the overlay, and the finer statistics that its live dial needs."""
    settings = dict(detail_budget=0.4, content_threshold=25.0, min_leaf=64, max_leaf=1024, min_denoise=0.0, max_denoise=1.0, metric="variance")
    QuadtreeFromImage.execute(image, **settings)


def one_pass(image: torch.Tensor) -> None:
    image.sum()
    image.square().sum()


def measure_side(side: int) -> dict:
    image = enlarged(side)
    actions = {"one pass": lambda: one_pass(image), "tree": lambda: build_quadtree(image), "node": lambda: node(image)}
    if side <= RECURSION_UP_TO:
        actions["recursion"] = lambda: recursion(image)
        by_threshold = build_quadtree(image, detail_budget=0.0, content_threshold=THRESHOLD)
        if recursion(image) != len(by_threshold.leaves):
            raise AssertionError(f"recursion finds {recursion(image)} leaves, the pyramid {len(by_threshold.leaves)}")
    found = medians(actions, 7 if side <= 2048 else 5 if side <= 4096 else 3 if side <= 8192 else 1)
    return {"side": side, "leaves": len(build_quadtree(image).leaves), **found}


def tree_part(tiny: bool) -> tuple[str, list[dict]]:
    """Part a."""
    found = [measure_side(side) for side in (SIDES[:2] if tiny else SIDES)]
    rows = [
        (
            row["side"], row["leaves"], milliseconds(row["one pass"]), milliseconds(row["tree"]), f"{row['tree'] / row['one pass']:.1f}",
            milliseconds(row["node"]), f"{row['node'] / row['one pass']:.1f}", milliseconds(row["recursion"]) if "recursion" in row else "-",
            f"{row['node'] / row['side'] ** 2 * 1e9:.1f}")
        for row in found
    ]
    text = "## a. Building the tree\n\n" + table(
        ("side, px", "leaves", "one pass, ms", "tree, ms", "in passes", "node with overlay, ms", "in passes", "recursion, ms", "node, ns per px"), rows)
    return text + (
        "\nOne pass is `image.sum()` and `image.square().sum()` of the same picture. The node is `QuadtreeFromImage`: tree and overlay, the limit "
        "at 4096 px is 6 passes. Recursion visits node after node and takes each one's variance; it finds the same leaves.\n"), found


def even_leaves(count: int, leaf: int = 64) -> Quadtree:
    """A square of `count` leaves of five strengths in turn."""
    side = math.isqrt(count)
    leaves = tuple(
        Leaf(Rect(row * leaf, col * leaf, (row + 1) * leaf, (col + 1) * leaf), leaf, 0.0, (row * 7 + col * 3) % 5 / 4)
        for row in range(side) for col in range(side))
    return Quadtree(side * leaf, side * leaf, leaf, leaf, leaves)


def plan_once(tree: Quadtree, sizes) -> tuple:
    """All that the first step of a run takes to know its windows."""
    height, width = tree.height // 8, tree.width // 8
    strengths = strengths_in_cells(tree, height, width)
    plan = plan_windows(strengths >= 0.5, sizes, FLUX_DEV)
    plan_blend("Mixture of Diffusers", plan, sizes.overlap, torch.device("cpu"))
    return plan, full_grid(height, width, sizes, FLUX_DEV)


def planning_part(tiny: bool) -> str:
    """Parts b and f."""
    sizes, rows = window_sizes(32, 128, 8, 2, step=8), []
    for count in (64, 256) if tiny else (64, 256, 1024, 4096, 16384, 65536):
        tree = even_leaves(count)
        seconds = medians({"plan": lambda: plan_once(tree, sizes)}, 9 if count <= 4096 else 3)["plan"]
        plan, grid = plan_once(tree, sizes)
        rows.append((count, f"{tree.height} x {tree.width}", milliseconds(seconds), len(plan.windows), f"{plan.cost:.0f}", f"{plan.cost / tree.height / tree.width * 1e6:.0f}",
                     f"{plan.cost / grid.cost:.2f}"))
    text = "## b. Planning\n\n" + table(("leaves", "picture, px", "plan, ms", "windows", "cost, tokens", "per million px", "of the full grid"), rows)
    return text + "\nFrom the tree to windows and weights, the full grid's included; windows of 256 to 1024 px. A run plans once for each set of active leaves. The limit for 4096 leaves is 50 ms.\n"

"""Trees and plans of all kinds, without a model: what has to hold for each."""
from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from fuzzing import hold, pick, refused, some_length
from pictures import photo

from qtd_pack.blending import METHODS, SHIFTS, plan_blend, shift_offsets
from qtd_pack.compositing import composite
from qtd_pack.denoise_schedule import EASE_CELLS, SCHEDULES, eased, on_steps, share_at
from qtd_pack.drawing import draw_quadtree
from qtd_pack.painting import Edit, Edits, edit_quadtree, painted_cells
from qtd_pack.quadtree import METRICS, CellStatistics, build_quadtree, grids_of, grow_quadtree
from qtd_pack.refusals import check_canvas
from qtd_pack.sampling_run import strengths_in_cells
from qtd_pack.settings import STEP_PX, check_windows
from qtd_pack.strengths import adjust_quadtree, quadtree_from_mask
from qtd_pack.utils import pieces, slices
from qtd_pack.windows import WINDOW_SHAPES, WRAPS, WindowCost, full_grid, plan_windows, window_sizes

PHOTO = functools.cache(lambda: photo().movedim(-1, 1))

# Of pictures whose pixels are made; larger ones are made of the sums that a tree needs.
LARGEST_PIXELS = 1 << 18


@dataclass(frozen=True)
class PlanCase:
    """Sizes in px. source: of the tree. scale: of what is sampled against the tree's picture. wrong: what must be refused."""

    seed: int = 0
    source: str = "flat"
    height: int = 64
    width: int = 64
    images: int = 1
    min_leaf: int = 8
    max_leaf: int = 0
    budget: float = 0.4
    threshold: float = 25.0
    min_denoise: float = 0.0
    max_denoise: float = 1.0
    metric: str = "variance"
    edges: str = "keep black"
    edits: tuple = ()
    gamma: float = 1.0
    invert: bool = False
    protect: bool = False
    feather: int = 0
    cell_px: int = 8
    patch: int = 1
    scale: float = 1.0
    min_window: int = 64
    max_window: int = 64
    overlap: int = 0
    shapes: str = "square"
    wrap: str = "none"
    method: str = "MultiDiffusion"
    shift: str = "random"
    text: int = 0
    frames: int = 1
    schedule: str = "blend"
    steps: int = 1
    skip: float = 0.0
    wrong: str = ""

    @property
    def has_pixels(self) -> bool:
        return self.height * self.width <= LARGEST_PIXELS

    @property
    def cells(self) -> tuple[int, int]:
        return tuple(max(round(side * self.scale) // self.cell_px, 1) for side in (self.height, self.width))


WRONG = ("", "min_leaf", "max_leaf", "min_denoise", "min_window", "image", "mask", "edits", "quadtree", "detail_budget", "gamma", "protect")


def draw_plan_case(seed: int) -> PlanCase:
    draw = random.Random(seed)
    cell_px = pick(draw, 1, 4, 8, 8, 8, 16, 32)
    most = draw.choices((256, 1024, 4096, 16384), (70, 20, 8, 2))[0]
    height, width = (max(some_length(draw, 8, most), cell_px) for _ in range(2))
    if most > 1024 and cell_px < 8:
        cell_px = 8
    min_leaf = pick(draw, 8, 8, 16, 24, 64, 100)
    while max(height, width) > 128 * min_leaf:
        min_leaf *= 2
    max_window = draw.randint(1, 64) * 64
    least = draw.uniform(0, 0.8) * pick(draw, 0, 1)
    return PlanCase(
        seed, pick(draw, "flat", "noise", "photo", "corner", "mask", "grey mask", "tiny"), height, width, pick(draw, 1, 1, 1, 3), min_leaf,
        pick(draw, 0, min_leaf << draw.randint(0, 6)), pick(draw, 0.0, draw.random(), 1.0), draw.uniform(0, 60), least, pick(draw, 1.0, draw.uniform(least, 1)),
        pick(draw, *METRICS), pick(draw, "keep black", "mean"), _drawn_edits(draw, height, width), pick(draw, 1.0, draw.uniform(0.1, 10)), pick(draw, False, True),
        pick(draw, False, False, True), pick(draw, 0, 1, 32, 200), cell_px, pick(draw, 1, 2, 2, 4, 8, 16), pick(draw, 1.0, 1.0, 2.0, 1.5, 4 / 3, draw.uniform(1, 3)),
        max(pick(draw, 64, max_window, draw.randint(1, max_window // 64) * 64), 64), max_window, 8 * pick(draw, 0, 1, 8, draw.randint(0, 64)),
        pick(draw, *WINDOW_SHAPES), pick(draw, "none", *WRAPS), pick(draw, *METHODS), pick(draw, *SHIFTS), pick(draw, 0, 77, 512), pick(draw, 1, 1, 5, 21),
        pick(draw, *SCHEDULES), pick(draw, 1, 2, 4, 20, 50), pick(draw, 0.0, 0.0, draw.random()), draw.choices(WRONG, [90] + [1] * (len(WRONG) - 1))[0])


def _drawn_edits(draw: random.Random, height: int, width: int) -> tuple:
    """Squares as they are painted, over the border, too: (left, top, side, strength)."""
    if draw.random() < 0.6:
        return ()
    longest = max(height, width)
    return tuple(
        (draw.uniform(-0.2, 1) * width, draw.uniform(-0.2, 1) * height, draw.uniform(0.01, 0.7) * longest, pick(draw, None, 0.0, 1.0, draw.random()))
        for _ in range(draw.randint(1, 5)))


def picture_of(case: PlanCase) -> torch.Tensor:
    """(B, H, W, 3) in 0..1."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = case.images, case.height, case.width, 3
    if case.source == "noise":
        return torch.rand(shape, generator=generator)
    image = torch.full(shape, 0.3)
    if case.source == "photo":
        return F.interpolate(PHOTO(), shape[1:3], mode="bilinear").movedim(1, -1).repeat(case.images, 1, 1, 1)
    if case.source == "corner":
        part = image[:, :case.height // 3 + 1, :case.width // 3 + 1]
        part.copy_(torch.rand(part.shape, generator=generator).round())
    return image


def mask_of(case: PlanCase, seed: int) -> torch.Tensor:
    """(B, H, W): blobs of black and white, or of every grey."""
    small = torch.rand(case.images, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(small, (case.height, case.width), mode="bilinear")[:, 0]
    return smooth if case.source == "grey mask" else (smooth > 0.5).float()


def large_tree(case: PlanCase, budget: float):
    """A tree from the sums over its smallest cells alone, as they are summed from pixels."""
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [torch.tensor([min(case.min_leaf, side - start) for start in range(0, side, case.min_leaf)], dtype=torch.float64) for side in (case.height, case.width)]
    area = lengths[0][:, None] * lengths[1]
    mean = torch.rand(case.images, *area.shape, 3, generator=generator, dtype=torch.float64)
    spread = torch.rand(case.images, *area.shape, 3, generator=generator, dtype=torch.float64) ** 6
    weight = area[None, :, :, None]
    cells = CellStatistics(case.height, case.width, case.min_leaf, area, mean * weight, (mean.square() + spread) * weight, spread.sum(-1) * area)
    return grow_quadtree(
        cells, detail_budget=budget, content_threshold=case.threshold, max_leaf=case.max_leaf, min_denoise=case.min_denoise, max_denoise=case.max_denoise,
        metric=case.metric)


def detail_tree(case: PlanCase, budget: float):
    if not case.has_pixels:
        return large_tree(case, budget)
    return build_quadtree(
        picture_of(case), detail_budget=budget, content_threshold=case.threshold, min_leaf=case.min_leaf, max_leaf=case.max_leaf,
        min_denoise=case.min_denoise, max_denoise=case.max_denoise, metric=case.metric)


def tree_of(case: PlanCase):
    """The tree of a case before edits."""
    if "mask" in case.source and case.has_pixels:
        return quadtree_from_mask(mask_of(case, case.seed), min_leaf=case.min_leaf, max_leaf=case.max_leaf, edges=case.edges)
    return detail_tree(case, case.budget)


def check_plan_case(case: PlanCase) -> None:
    """Raise for whatever does not hold."""
    if case.wrong:
        check_refusal(case)
        return
    tree = tree_of(case)
    check_cover(tree)
    check_strengths_of(case, tree)
    edited = check_edits(case, tree)
    adjusted = check_adjusted(case, edited)
    if case.has_pixels:
        check_pictures(case, adjusted)
    check_windows_of(case, adjusted)


def check_refusal(case: PlanCase) -> None:
    """What must be refused, by the name of the input."""
    tree, sound = quadtree_from_mask(torch.ones(64, 64), min_leaf=8), replace(case, height=64, width=64, min_leaf=8, max_leaf=0)
    nan = torch.full((1, 64, 64, 3), math.nan)
    actions = {
        "min_leaf": lambda: tree_of(replace(sound, min_leaf=case.seed % 9 - 8)),
        "max_leaf": lambda: tree_of(replace(sound, max_leaf=24)),
        "min_denoise": lambda: detail_tree(replace(sound, min_denoise=0.6, max_denoise=0.5), 0.4),
        "min_window": lambda: check_windows(case.max_window + 64, case.max_window),
        "image": lambda: build_quadtree(nan if case.seed % 2 else nan[:, :0]),
        "mask": lambda: quadtree_from_mask(nan[..., 0]),
        "edits": lambda: edit_quadtree(tree, Edits(64, 128, (Edit(0, 0, 8, 0.5),))),
        "quadtree": lambda: check_canvas(tree, torch.zeros(1, 4, 13 + case.seed % 9, 8), 8),
        "detail_budget": lambda: detail_tree(sound, 1.5),
        "gamma": lambda: adjust_quadtree(tree, gamma=-case.gamma),
        "protect": lambda: adjust_quadtree(tree, protect=torch.eye(64)[:40]),
    }
    refused(actions[case.wrong], case.wrong, case.wrong)


def check_cover(tree) -> None:
    """Leaves are aligned squares, clipped at the border, that cover each smallest cell once, with strengths from 0 to 1."""
    count = torch.zeros(-(-tree.height // tree.min_leaf), -(-tree.width // tree.min_leaf))
    for leaf in tree.leaves:
        rect, side = leaf.rect, leaf.side
        hold(rect.top % side == 0 and rect.left % side == 0 and tree.min_leaf <= side <= tree.max_leaf, "leaves are aligned")
        hold((rect.bottom, rect.right) == (min(rect.top + side, tree.height), min(rect.left + side, tree.width)), "leaves are clipped at the border")
        hold(0 <= leaf.strength <= 1, "strengths lie in 0..1")
        count[rect.top // tree.min_leaf:(rect.top + side) // tree.min_leaf, rect.left // tree.min_leaf:(rect.left + side) // tree.min_leaf] += 1
    hold((count == 1).all(), "leaves cover each cell once")


def check_strengths_of(case: PlanCase, tree) -> None:
    if "mask" in case.source and case.has_pixels:
        black = mask_of(case, case.seed).amax(0) == 0
        strengths = strength_of_pixels(tree)
        hold(case.edges == "mean" or not strengths[black].any(), "what is black is kept")
        return
    strengths = grids_of(tree)[2]
    low, high = case.min_denoise, case.max_denoise
    # Strengths are made in float32.
    hold(((strengths >= low - 1e-7) & (strengths <= high + 1e-7)).all(), "strengths lie between min_denoise and max_denoise")
    if case.budget > 0:
        more = grids_of(detail_tree(case, min(case.budget + 0.1, 1.0)))[2]
        hold((more >= strengths - 1e-9).all(), "more budget never redraws less")


def strength_of_pixels(tree) -> torch.Tensor:
    """The strength over each pixel, from the smallest cells."""
    fine = grids_of(tree)[2].repeat_interleave(tree.min_leaf, 0).repeat_interleave(tree.min_leaf, 1)
    return fine[:tree.height, :tree.width]


def check_edits(case: PlanCase, tree):
    edits = Edits(case.height, case.width, tuple(Edit(*square) for square in case.edits)) if case.edits else None
    edited = edit_quadtree(tree, edits)
    check_cover(edited)
    painted, strengths = painted_cells(tree, edits), grids_of(edited)[2]
    free = painted.isnan()
    hold(torch.equal(strengths[~free], painted[~free]), "what is painted has its strength")
    hold(torch.equal(strengths[free], grids_of(tree)[2][free]), "what is not painted stays as it was")
    return edited


def check_adjusted(case: PlanCase, tree):
    hold(adjust_quadtree(tree) == tree, "Adjust at its defaults gives its tree back")
    protect = mask_of(case, case.seed + 1) if case.protect and case.has_pixels else None
    adjusted = adjust_quadtree(tree, gamma=case.gamma, invert=case.invert, protect=protect)
    check_cover(adjusted)
    if protect is not None:
        # Half an 8-bit level is what a mask may be off.
        hold(not strength_of_pixels(adjusted)[protect.amax(0) == 1].any(), "what is protected is kept")
    return adjusted


def check_pictures(case: PlanCase, tree) -> None:
    image = picture_of(case)[:1]
    other = 1 - image
    hold(torch.equal(composite(image, image, tree, feather=case.feather), image), "compositing a picture with itself gives it back")
    joined, kept = composite(image, other, tree, feather=case.feather), strength_of_pixels(tree) == 0
    hold(torch.equal(joined[:, kept], image[:, kept]), "kept pixels are exact")
    drawn = draw_quadtree(image, tree)
    hold(drawn.shape == image.shape and drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1, "the drawn tree is a picture")


def check_windows_of(case: PlanCase, tree) -> None:
    """The rasters, and the plans of a few steps."""
    height, width = case.cells
    if min(case.height, case.width) * case.scale < case.cell_px:
        return
    check_canvas(tree, torch.empty(1, 1, height, width, device="meta"), case.cell_px)
    strengths = on_steps(case.schedule, strengths_in_cells(tree, height, width, case.skip, case.cell_px), case.steps)
    hold(((strengths >= 0) & (strengths <= 1)).all() and (tree.kept_share < 1 or not strengths.any()), "the raster has the tree's strengths")
    soft = eased(strengths, EASE_CELLS, WRAPS[case.wrap])
    hold(((soft <= strengths) & (soft >= 0)).all() and not soft[strengths == 0].any(), "easing raises nothing, and leaves 0 at 0")
    for step in sorted({0, case.steps // 2, case.steps - 1}):
        share = share_at(case.schedule, strengths, step / case.steps)
        hold(((share >= 0) & (share <= 1)).all() and not share[strengths == 0].any() and (share[strengths == 1] == 1).all(), "0 is never sampled, 1 always")
        check_plan(case, share > 0, step)


def check_plan(case: PlanCase, active: torch.Tensor, step: int) -> None:
    cost = WindowCost(case.patch, case.frames, case.text, 3072)
    without = case.method == "SpotDiffusion"
    overlap = 0 if without else math.ceil(case.overlap / case.cell_px)
    squares = window_sizes(case.min_window // case.cell_px, case.max_window // case.cell_px, overlap, case.patch, WRAPS[case.wrap])
    sizes = squares if case.shapes == "square" else window_sizes(
        case.min_window // case.cell_px, case.max_window // case.cell_px, overlap, case.patch, WRAPS[case.wrap], math.ceil(STEP_PX / case.cell_px))
    offset = shift_offsets(case.shift, case.steps, sizes.sides[-1], case.patch, case.seed)[step] if without else None
    plan = plan_windows(active, sizes, cost, offset)
    hold(plan.cost <= plan_windows(active, squares, cost, offset).cost * (1 + 1e-9), "no plan costs more than squares")
    if offset is None:
        hold(plan.cost <= full_grid(*active.shape, sizes, cost).cost * (1 + 1e-9), "no plan costs more than the full grid")
    hold(math.isclose(plan.cost, sum(cost.of(window.rect.height, window.rect.width) for window in plan.windows), rel_tol=1e-9), "the cost is that of the windows")
    check_places(active, plan, sizes)
    check_weights(case, active, plan, sizes)


def check_places(active: torch.Tensor, plan, sizes) -> None:
    """Cores hold every active cell once, windows hold their cores and lie in the latent, or over its border where it is a ring."""
    seen = torch.zeros(active.shape)
    for window in plan.windows:
        rect, core = window.rect, window.core
        for first, last, start, end, length, ring in (
            (core.top, core.bottom, rect.top, rect.bottom, plan.height, sizes.wraps[0]), (core.left, core.right, rect.left, rect.right, plan.width, sizes.wraps[1]),
        ):
            hold(start <= first < last <= end and end - start <= length, "cores lie in their windows")
            hold((-length < start < length if ring else start >= 0) and 0 < end <= length, "windows lie in the latent")
            hold(end - start in sizes.lengths(length), "windows have the lengths that they may have")
        for here, _ in pieces(core, plan.height, plan.width):
            seen[slices(here)] += 1
    hold((seen[active] == 1).all() and seen.max() <= 1 if plan.windows else not active.any(), "every active cell is in one core")


def check_weights(case: PlanCase, active: torch.Tensor, plan, sizes) -> None:
    blend, like = plan_blend(case.method, plan, sizes.overlap, torch.device("cpu")), torch.zeros(1)
    total = torch.zeros(active.shape)
    for window in plan.windows:
        weight = blend.weight_of(window, like)
        hold(weight.min() >= 0, "weights are not negative")
        for here, there in pieces(window.rect, plan.height, plan.width):
            total[slices(here)] += weight[slices(there)]
    hold(((total - 1).abs() < 1e-5)[active].all(), "weights sum to 1")

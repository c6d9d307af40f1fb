"""Which windows does the model see? Layouts as tables, in cells; the planner against all quadtree covers there are."""
from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from qtd_pack.utils import Rect, slices
from qtd_pack.blending import METHODS, SHIFTS, blend_weight, plan_blend, shift_offsets
from qtd_pack.windows import TilePlan, Window, WindowCost, WindowSizes, full_grid, group_windows, plan_windows, window_sizes

SMALL = WindowSizes((4, 8), 2)
TIGHT = WindowSizes((4, 8), 2, step=2)
COSTS = {"no text": WindowCost(2, 1, 0, 64), "much text": WindowCost(2, 1, 40, 64), "attention": WindowCost(2, 1, 0, 1), "video": WindowCost(1, 5, 9, 64)}


def boxed(*boxes, height=16, width=16) -> torch.Tensor:
    """Active cells: the given (top, left, bottom, right)."""
    active = torch.zeros(height, width, dtype=torch.bool)
    for box in boxes:
        active[slices(Rect(*box))] = True
    return active


def speckled(seed: int, height: int, width: int, share: float, cell: int = 2) -> torch.Tensor:
    """Active cells in random blocks."""
    blocks = torch.rand(math.ceil(height / cell), math.ceil(width / cell), generator=torch.Generator().manual_seed(seed)) < share
    return blocks.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:height, :width]


def rects(plan: TilePlan) -> list[tuple[int, int, int, int]]:
    return sorted((rect.top, rect.left, rect.bottom, rect.right) for rect in (window.rect for window in plan.windows))


GRIDS = {
    # name: (height, width, side, overlap) and the windows
    "one window": ((8, 8, 8, 2), [(0, 0, 8, 8)]),
    "smaller than a window": ((5, 7, 8, 2), [(0, 0, 5, 7)]),
    "as large as a window with its overlap": ((12, 12, 8, 2), [(0, 0, 12, 12)]),
    "no overlap": ((16, 16, 8, 0), [(0, 0, 8, 8), (0, 8, 8, 16), (8, 0, 16, 8), (8, 8, 16, 16)]),
    "exact multiples": ((16, 24, 8, 2), [(0, 0, 12, 12), (0, 6, 12, 18), (0, 12, 12, 24), (4, 0, 16, 12), (4, 6, 16, 18), (4, 12, 16, 24)]),
    "a remainder within the overlap": ((18, 8, 8, 2), [(0, 0, 12, 8), (6, 0, 18, 8)]),
    "a remainder beyond the overlap": ((19, 8, 8, 2), [(0, 0, 12, 8), (6, 0, 18, 8), (7, 0, 19, 8)]),
    "a strip": ((3, 24, 8, 2), [(0, 0, 3, 12), (0, 6, 3, 18), (0, 12, 3, 24)]),
    "a strip of one cell": ((1, 13, 8, 2), [(0, 0, 1, 12), (0, 1, 1, 13)]),
}


@pytest.mark.parametrize("layout, expected", GRIDS.values(), ids=GRIDS.keys())
def test_the_full_grid_is(layout, expected):
    height, width, side, overlap = layout
    assert rects(full_grid(height, width, WindowSizes((side,), overlap), WindowCost())) == expected


COVERS = {
    # name: (active boxes, sizes), and the windows of a 16 x 16 latent
    "nothing": ((), SMALL, []),
    "one patch in the middle": (((6, 6, 8, 8),), SMALL, [(2, 2, 10, 10)]),
    "one cell, as a whole patch": (((7, 7, 8, 8),), SMALL, [(2, 2, 10, 10)]),
    "a corner": (((0, 0, 2, 2),), SMALL, [(0, 0, 8, 8)]),
    "the last corner": (((15, 15, 16, 16),), SMALL, [(8, 8, 16, 16)]),
    "two small squares that touch, off the grid": (((6, 6, 10, 10),), SMALL, [(4, 4, 12, 12)]),
    "what the border's window holds without an overlap beyond it": (((0, 0, 6, 6),), SMALL, [(0, 0, 8, 8)]),
    "two corners": (((0, 0, 2, 2), (14, 14, 16, 16)), SMALL, [(0, 0, 8, 8), (8, 8, 16, 16)]),
    "one large window where small ones cost more": (((0, 0, 8, 8),), SMALL, [(0, 0, 12, 12)]),
    "large beside small": (((0, 0, 8, 8), (12, 12, 14, 14)), SMALL, [(0, 0, 12, 12), (8, 8, 16, 16)]),
    "no overlap": (((0, 0, 4, 4), (0, 12, 4, 16)), WindowSizes((4, 8), 0), [(0, 0, 4, 4), (0, 12, 4, 16)]),
}


@pytest.mark.parametrize("boxes, sizes, expected", COVERS.values(), ids=COVERS.keys())
def test_the_cheapest_windows_for(boxes, sizes, expected):
    assert rects(plan_windows(boxed(*boxes), sizes, WindowCost(2, 1, 4, 64))) == expected


@pytest.mark.parametrize("offset, expected", [
    ((0, 0), [(0, 0, 8, 8), (0, 8, 8, 16), (8, 0, 16, 8), (8, 8, 16, 16)]),
    ((4, 0), [(0, 0, 8, 8), (0, 8, 8, 16), (4, 0, 12, 8), (4, 8, 12, 16), (8, 0, 16, 8), (8, 8, 16, 16)]),
    ((8, 8), [(0, 0, 8, 8), (0, 8, 8, 16), (8, 0, 16, 8), (8, 8, 16, 16)]),
    ((6, 2), [(0, 0, 8, 8), (0, 6, 8, 14), (0, 8, 8, 16), (2, 0, 10, 8), (2, 6, 10, 14), (2, 8, 10, 16), (8, 0, 16, 8), (8, 6, 16, 14), (8, 8, 16, 16)]),
])
def test_an_offset_moves_the_cores_up_and_left(offset, expected):
    plan = plan_windows(boxed((0, 0, 16, 16)), WindowSizes((8,), 0), WindowCost(), offset)
    assert rects(plan) == expected
    tops = sorted({window.core.top for window in plan.windows})
    assert tops == [0, *(top for top in range(8 - offset[0], 16, 8) if top > 0)]


@pytest.mark.parametrize("min_window, max_window, overlap, patch, sides, expected_overlap", [
    (64, 128, 8, 2, (64, 128), 8),
    (32, 128, 8, 2, (32, 64, 128), 8),
    (128, 128, 0, 2, (128,), 0),
    (100, 128, 8, 2, (128,), 8),
    (1, 24, 3, 8, (24,), 8),
    (8, 64, 5, 8, (8, 16, 32, 64), 8),
    (3, 21, 1, 2, (10, 20), 2),
    (1, 1, 1, 16, (16,), 16),
])
def test_sides_and_overlap_are_multiples_of_the_patch(min_window, max_window, overlap, patch, sides, expected_overlap):
    assert window_sizes(min_window, max_window, overlap, patch) == WindowSizes(sides, expected_overlap)


CASES = [
    (height, width, sizes, share, offset)
    for height, width in ((16, 16), (23, 37), (64, 48), (9, 5), (2, 50))
    for sizes in (SMALL, WindowSizes((4, 8, 16), 2), WindowSizes((8,), 4), WindowSizes((6, 12), 0), TIGHT, WindowSizes((8,), 4, step=4), WindowSizes((6, 12), 0, step=6))
    for share, offset in ((0.05, None), (0.4, None), (1.0, None), (0.4, (2, 4)), (1.0, (6, 0)))
]


@pytest.mark.parametrize("height, width, sizes, share, offset", CASES)
def test_every_active_cell_lies_in_one_core_each_core_in_its_window_and_each_window_in_the_latent(height, width, sizes, share, offset):
    active = speckled(3, height, width, share)
    plan = plan_windows(active, sizes, COSTS["no text"], offset)
    seen = torch.zeros(height, width)
    for window in plan.windows:
        core, rect = window.core, window.rect
        assert 0 <= rect.top <= core.top < core.bottom <= rect.bottom <= height
        assert 0 <= rect.left <= core.left < core.right <= rect.right <= width
        seen[slices(core)] += 1
    assert seen.max() <= 1
    assert bool((seen[active] == 1).all())


@pytest.mark.parametrize("height, width, sizes, share, offset", CASES)
def test_a_window_shows_the_overlap_around_its_core_wherever_the_latent_has_it(height, width, sizes, share, offset):
    for window in plan_windows(speckled(4, height, width, share), sizes, COSTS["no text"], offset).windows:
        core, rect = window.core, window.rect
        assert rect.top <= max(core.top - sizes.overlap, 0) and rect.bottom >= min(core.bottom + sizes.overlap, height)
        assert rect.left <= max(core.left - sizes.overlap, 0) and rect.right >= min(core.right + sizes.overlap, width)


@pytest.mark.parametrize("height, width, sizes, share, offset", CASES)
def test_squares_have_at_most_as_many_shapes_as_sides_and_rectangles_as_there_are_lengths(height, width, sizes, share, offset):
    plan = plan_windows(speckled(5, height, width, share), sizes, COSTS["no text"], offset)
    shapes = {(window.rect.height, window.rect.width) for window in plan.windows}
    if sizes.step:
        assert shapes <= set(itertools.product(sizes.lengths(height), sizes.lengths(width)))
    else:
        assert shapes <= {sizes.shape(side, height, width) for side in sizes.sides}


@pytest.mark.parametrize("sizes, length, expected", [
    (WindowSizes((32, 64), 8), 200, (48, 80)),
    (WindowSizes((32, 64), 8, step=8), 200, (32, 40, 48, 56, 64, 72, 80)),
    (WindowSizes((32, 64), 8, step=8), 50, (32, 40, 48, 50)),
    (WindowSizes((32, 64), 8, step=8), 20, (20,)),
    (WindowSizes((10, 20), 2, step=8), 200, (14, 16, 24)),
    (WindowSizes((64, 128), 8, step=8), 512, (64, 72, 80, 88, 96, 104, 112, 120, 128, 136, 144)),
])
def test_windows_may_be_as_long_as(sizes, length, expected):
    assert sizes.lengths(length) == expected


RECTANGLES = {
    # name: (active boxes, sizes), and the windows of a 16 x 16 latent
    "nothing": ((), TIGHT, []),
    "a core is never shorter than the smallest side": (((7, 7, 9, 9),), TIGHT, [(4, 4, 12, 12)]),
    "a corner needs an overlap on two sides only": (((0, 0, 2, 2),), TIGHT, [(0, 0, 6, 6)]),
    "the last corner": (((14, 14, 16, 16),), TIGHT, [(10, 10, 16, 16)]),
    "a line that lies": (((6, 2, 8, 10),), TIGHT, [(2, 0, 10, 12)]),
    "a line that stands": (((2, 6, 10, 8),), TIGHT, [(0, 2, 12, 10)]),
    "a line over the whole latent, in the steps there are": (((0, 0, 2, 16),), WindowSizes((4, 16), 2, step=4), [(0, 0, 8, 16)]),
    "lines that are far apart": (((0, 0, 2, 8), (14, 8, 16, 16)), TIGHT, [(0, 0, 6, 12), (10, 4, 16, 16)]),
    "what is a cell short of the largest side at the border": (((0, 0, 2, 6),), TIGHT, [(0, 0, 6, 8)]),
    "no overlap": (((0, 0, 4, 8), (8, 8, 16, 12)), WindowSizes((4, 8), 0, step=2), [(0, 0, 4, 8), (8, 8, 16, 12)]),
}


@pytest.mark.parametrize("boxes, sizes, expected", RECTANGLES.values(), ids=RECTANGLES.keys())
def test_the_cheapest_rectangles_for(boxes, sizes, expected):
    assert rects(plan_windows(boxed(*boxes), sizes, WindowCost(2, 1, 4, 64))) == expected


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("overlap", [0, 2, 4])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 1.0])
def test_rectangles_never_cost_more_than_squares(share, overlap, cost):
    for seed, (height, width) in enumerate([(16, 16), (33, 24), (96, 70)]):
        active = speckled(seed, height, width, share)
        squares, tight = (plan_windows(active, WindowSizes((4, 8, 16), overlap, step=step), cost).cost for step in (0, 2))
        assert tight <= squares * (1 + 1e-9)


def cheapest_cuts(active, lengths, sizes, cost) -> float:
    """The least over all ways to cut squares of the smallest side in two again and again, by trying them all."""
    cells = active.nonzero().tolist()

    @functools.lru_cache(maxsize=None)
    def least(top, left, bottom, right):
        inside = [(row, col) for row, col in cells if top <= row < bottom and left <= col < right]
        if not inside:
            return 0.0
        fits = []
        for places, length in zip(zip(*inside), active.shape):
            first, last = min(places) // cost.patch * cost.patch, -(-(max(places) + 1) // cost.patch) * cost.patch
            needed = min(last + sizes.overlap, length) - max(first - sizes.overlap, 0) + max(sizes.sides[0] - (last - first), 0)
            needed = max(needed, lengths[-1]) if last - first >= lengths[-1] - 2 * sizes.overlap else needed
            fits.append(next((size for size in lengths if size >= needed), lengths[-1] if last - first < sizes.sides[0] else None))
        options = [cost.of(*fits)] if None not in fits else []
        options += [least(top, left, row, right) + least(row, left, bottom, right) for row in range(top + 4, bottom, 4)]
        options += [least(top, left, bottom, col) + least(top, col, bottom, right) for col in range(left + 4, right, 4)]
        return min(options)

    return least(0, 0, *active.shape)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("share", [0.03, 0.2, 0.6])
def test_no_way_to_cut_is_cheaper(share, cost):
    sizes = WindowSizes((4, 8), 2, step=2)
    for seed in range(3):
        active = speckled(seed, 24, 24, share)
        assert plan_windows(active, sizes, cost).cost <= cheapest_cuts(active, sizes.lengths(24), sizes, cost) * (1 + 1e-9)


@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16])
def test_windows_are_whole_patches_at_whole_patches(patch):
    sizes = window_sizes(32, 64, 5, patch)
    for window in plan_windows(speckled(6, 256, 320, 0.02, cell=1), sizes, WindowCost(patch)).windows:
        assert [value % patch for value in (window.rect.top, window.rect.left, window.rect.height, window.rect.width)] == [0, 0, 0, 0]


def cheapest_cover(active, sizes, cost, top, left, side) -> float:
    """The least over all covers of one square by windows of its own and of its quarters, and so on, by trying them all."""
    height, width = active.shape
    cells = [(row, col) for row, col in active.nonzero().tolist() if top <= row < top + side and left <= col < left + side]
    if not cells:
        return 0.0
    needed = []
    for places, length in zip(zip(*cells), active.shape):
        first, last = min(places) // cost.patch * cost.patch, -(-(max(places) + 1) // cost.patch) * cost.patch
        needed.append(min(last + sizes.overlap, length) - max(first - sizes.overlap, 0))
    shapes = (sizes.shape(window, height, width) for window in sizes.sides)
    options = [cost.of(*shape) for shape in shapes if all(need <= size for need, size in zip(needed, shape))]
    if side > sizes.sides[0]:
        half = side // 2
        options.append(sum(cheapest_cover(active, sizes, cost, top + down, left + right, half) for down in (0, half) for right in (0, half)))
    return min(options)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("sizes", [SMALL, WindowSizes((4, 8, 16), 2), WindowSizes((4, 8), 0)])
@pytest.mark.parametrize("share", [0.03, 0.2, 0.6])
def test_no_quadtree_cover_is_cheaper(cost, sizes, share):
    for seed, (height, width) in enumerate([(16, 16), (32, 24), (12, 32)]):
        active = speckled(seed, height, width, share)
        shifts = range(0, sizes.sides[-1], sizes.sides[0])
        least = min(cheapest_cover(active, sizes, cost, -down, -right, 64) for down, right in itertools.product(shifts, shifts))
        assert plan_windows(active, sizes, cost).cost == pytest.approx(least)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("height, width, sizes, share, offset", [case for case in CASES if case[-1] is None])
def test_no_plan_costs_more_than_the_full_grid(height, width, sizes, share, offset, cost):
    plan = plan_windows(speckled(7, height, width, share), sizes, cost)
    assert plan.cost <= full_grid(height, width, sizes, cost).cost * (1 + 1e-9)


def test_a_plan_costs_what_its_windows_cost():
    cost = COSTS["video"]
    plan = plan_windows(speckled(8, 64, 64, 0.3), SMALL, cost)
    assert plan.cost == pytest.approx(sum(cost.of(window.rect.height, window.rect.width) for window in plan.windows))
    assert len(plan.windows) > 3


@pytest.mark.parametrize("cost, height, width, expected", [
    (WindowCost(2, 1, 0, 1000), 16, 16, 64 + 64 * 64 / 6000),
    (WindowCost(2, 1, 36, 1000), 16, 16, 100 + 100 * 100 / 6000),
    (WindowCost(2, 3, 8, 1000), 15, 16, 200 + 200 * 200 / 6000),
    (WindowCost(1, 1, 0, 1000), 16, 16, 256 + 256 * 256 / 6000),
    (WindowCost(1, 1, 0, 1000, 7.5), 16, 16, 256 + 256 * 256 / 7500),
    (WindowCost(2, 1, 36, 1000, 6.0, 0.5), 16, 16, 64 + 18 + 100 * 100 / 6000),
    (WindowCost(2, 3, 8, 1000, 5.0, 0.25, False), 15, 16, 192 + 2 + 192 * 192 / 5000),
])
def test_a_window_costs_its_tokens_the_text_and_the_pairs_of_them(cost, height, width, expected):
    assert cost.of(height, width) == pytest.approx(expected)


def test_windows_of_one_shape_and_kind_are_grouped_in_their_order():
    windows = [Window(Rect(0, left, size, left + size), Rect(0, left, 1, left + 1)) for left, size in ((0, 8), (8, 4), (12, 8), (20, 4), (24, 8))]
    groups = group_windows(windows, lambda window: window.rect.left >= 24)
    assert [[window.rect.left for window in group] for group in groups] == [[0, 12], [8, 20], [24]]


@pytest.mark.parametrize("height, width", [(8, 8), (48, 128), (144, 6), (1, 1)])
def test_weights_are_positive_and_mirror_images_of_themselves(height, width):
    for method in ("Mixture of Diffusers", "MultiDiffusion"):
        weight = blend_weight(method, height, width, 4)
        assert weight.shape == (height, width)
        assert weight.min() > 0
        assert torch.allclose(weight, weight.flip(0)) and torch.allclose(weight, weight.flip(1))


def test_mixture_of_diffusers_trusts_the_middle_along_each_axis_by_itself():
    weight = blend_weight("Mixture of Diffusers", 4, 100, 16)
    assert weight[1, 32:68].tolist() == [weight[1, 50]] * 36
    # Of a ramp of 32 cells, cell 8 is 8.5 cells deep.
    assert weight[1, 8] / weight[1, 50] == pytest.approx(math.sin(math.pi / 2 * 8.5 / 32) ** 2, rel=1e-3)
    assert weight[0, 50] / weight[1, 50] == pytest.approx((math.sin(math.pi / 4 / 32) / math.sin(math.pi / 4 * 3 / 32)) ** 2, rel=1e-5)


def test_neighbours_hand_over_evenly():
    first = blend_weight("Mixture of Diffusers", 48, 48, 8)[24]
    assert torch.allclose(first[-16:] + first[:16], torch.ones(16))


def test_a_method_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="method: expected one of Mixture of Diffusers, MultiDiffusion, SpotDiffusion, got 'Poisson'"):
        blend_weight("Poisson", 8, 8, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("height, width, sizes, share, offset", CASES)
def test_weights_of_all_windows_sum_to_1_on_every_active_cell(height, width, sizes, share, offset, method):
    active = speckled(9, height, width, share)
    plan = plan_windows(active, sizes, COSTS["no text"], offset)
    blend = plan_blend(method, plan, sizes.overlap, torch.device("cpu"))
    total = torch.zeros(height, width)
    for window in plan.windows:
        total[slices(window.rect)] += blend.weight_of(window, total)
    assert torch.allclose(total[active], torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_constant_stays_constant_in_every_precision(method, dtype):
    active = speckled(10, 64, 48, 0.5)
    plan = plan_windows(active, SMALL, COSTS["no text"])
    blend = plan_blend(method, plan, SMALL.overlap, torch.device("cpu"))
    total = torch.zeros(1, 3, 64, 48, dtype=dtype)
    for window in plan.windows:
        part = torch.full((1, 3, window.rect.height, window.rect.width), 2.0, dtype=dtype)
        total[slices(window.rect)].addcmul_(part, blend.weight_of(window, part))
    assert (total[..., active].float() - 2).abs().max() < 8 * torch.finfo(dtype).eps


def test_weights_are_kept_once_per_shape():
    plan = plan_windows(torch.ones(512, 512, dtype=torch.bool), WindowSizes((32, 64), 4), WindowCost())
    blend = plan_blend("Mixture of Diffusers", plan, 4, torch.device("cpu"))
    assert len(plan.windows) == 64
    assert {shape: tuple(weight.shape) for shape, weight in blend.weights.items()} == {(72, 72): (72, 72)}


@pytest.mark.parametrize("method", SHIFTS)
@pytest.mark.parametrize("side, patch, stride", [(128, 2, 16), (24, 8, 8), (4, 2, 2), (20, 2, 2)])
def test_shifts_are_multiples_of_an_eighth_of_the_side_and_of_the_patch(method, side, patch, stride):
    offsets = shift_offsets(method, 50, side, patch, seed=7)
    assert len(offsets) == 50
    assert len(set(offsets)) > 2
    assert all(0 <= shift < side and shift % stride == 0 and shift % patch == 0 for offset in offsets for shift in offset)


@pytest.mark.parametrize("method", SHIFTS)
def test_a_seed_gives_its_shifts_again(method):
    assert shift_offsets(method, 20, 128, 2, seed=3) == shift_offsets(method, 20, 128, 2, seed=3)
    assert shift_offsets(method, 20, 128, 2, seed=3) != shift_offsets(method, 20, 128, 2, seed=4)


def test_sorted_shifts_grow():
    offsets = shift_offsets("sorted", 20, 128, 2, seed=3)
    assert [list(axis) for axis in zip(*offsets)] == [sorted(axis) for axis in zip(*offsets)]


def test_fibonacci_shifts_spread_over_all_places():
    places = {down for down, _ in shift_offsets("fibonacci", 16, 128, 2, seed=3)}
    assert places == set(range(0, 128, 16))


def test_a_shift_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="shift_method: expected one of random, sorted, fibonacci, got 'spiral'"):
        shift_offsets("spiral", 4, 128, 2, 0)

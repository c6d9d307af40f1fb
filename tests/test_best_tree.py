"""The tree for a budget: it redraws the most content, grows with the budget, and treats equals alike."""
from __future__ import annotations

import itertools
import statistics

import pytest
import skimage.data
import torch
from conftest import ROOT, load_module

from qtd_pack.quadtree import Quadtree, build_quadtree

plans = load_module("qtd_plans", ROOT / "benchmarks" / "plans.py")

FLAT = 0.5


def flat(height: int, width: int) -> torch.Tensor:
    return torch.full((1, height, width, 3), FLAT)


def checkered(height: int, width: int, amplitude: float = 0.4) -> torch.Tensor:
    """Pixels in turn above and below the flat grey: every square of it has the same content."""
    signs = (torch.arange(height)[:, None] + torch.arange(width)) % 2 * 2 - 1
    return flat(height, width) + amplitude * signs[None, :, :, None]


def with_busy(image: torch.Tensor, *cells: tuple[int, int, float], side: int = 64) -> torch.Tensor:
    """The image with busy cells at (row, column), each of its amplitude."""
    image = image.clone()
    for row, col, amplitude in cells:
        image[:, row * side:(row + 1) * side, col * side:(col + 1) * side] = checkered(side, side, amplitude)
    return image


def uneven(height: int, width: int, cell: int, seed: int, contrast: float = 2.0) -> torch.Tensor:
    """Noise whose amplitude differs from cell to cell, (1, height, width, 3)."""
    draw = torch.Generator().manual_seed(seed)
    amplitude = torch.rand(-(-height // cell), -(-width // cell), generator=draw).pow(contrast)
    amplitude = amplitude.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:height, :width]
    return FLAT + amplitude[None, :, :, None] * (torch.rand(1, height, width, 3, generator=draw) - 0.5)


def astronaut(side: int = 512) -> torch.Tensor:
    return torch.from_numpy(skimage.data.astronaut()).float()[None, :side, :side] / 255


def layout(tree: Quadtree) -> list[tuple]:
    return [(leaf.rect.top, leaf.rect.left, leaf.side, leaf.strength) for leaf in tree.leaves]


def strengths(tree: Quadtree) -> torch.Tensor:
    return plans.cell_strengths(tree)


def contents(image: torch.Tensor, min_leaf: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Content and area of the smallest cells, (rows, cols); content below one level of 255 counts nothing."""
    leaves = build_quadtree(image, min_leaf=min_leaf, max_leaf=min_leaf).leaves
    shape = -(-image.shape[1] // min_leaf), -(-image.shape[2] // min_leaf)
    content = torch.tensor([leaf.detail if leaf.detail >= 1 else 0.0 for leaf in leaves], dtype=torch.float64).view(shape)
    return content, torch.tensor([leaf.rect.height * leaf.rect.width for leaf in leaves], dtype=torch.float64).view(shape)


# One busy cell, in the corner of a root of 4 x 4: splitting the root alone makes the mean strength 0.5, splitting the
# quarter that holds the cell, too, 0.5 + 0.25 / 2.
@pytest.mark.parametrize("budget, leaves", [
    (0.2, [(0, 0, 256, 0.0)]),
    (0.3, [(0, 0, 128, 0.5), (0, 128, 128, 0.5), (128, 0, 128, 0.5), (128, 128, 128, 0.5)]),
    (0.6, [
        (0, 0, 64, 1.0), (0, 64, 64, 1.0), (0, 128, 128, 0.5), (64, 0, 64, 1.0), (64, 64, 64, 1.0), (128, 0, 128, 0.5), (128, 128, 128, 0.5)]),
    (1.0, [
        (0, 0, 64, 1.0), (0, 64, 64, 1.0), (0, 128, 128, 0.5), (64, 0, 64, 1.0), (64, 64, 64, 1.0), (128, 0, 128, 0.5), (128, 128, 128, 0.5)]),
])
def test_a_small_busy_thing_in_a_flat_square_is_reached(budget, leaves):
    assert layout(build_quadtree(with_busy(flat(256, 256), (0, 0, 0.3)), detail_budget=budget, max_leaf=256)) == leaves


# Two roots beside each other. The left one holds a faint texture all over, which the threshold rule takes first as its
# whole is busier; the right one a single cell that is sixteen times as busy. Each split of a root adds 0.25 to the mean
# strength, each of a quarter 0.0625. Content per redrawn area: the right cell's quarter and root (c + c) / (16 + 4) = c / 10,
# the left c / 16.
def test_a_single_busy_cell_goes_before_a_faint_texture_of_as_much_content():
    image = with_busy(torch.cat([checkered(256, 256, 0.02), flat(256, 256)], 2), (3, 7, 0.32))
    tree = build_quadtree(image, detail_budget=0.3, max_leaf=256)
    assert [leaf for leaf in layout(tree) if leaf[3] == 0] == [(0, 0, 256, 0.0)]
    assert [leaf[:2] for leaf in layout(tree) if leaf[3] == 1] == [(128, 384), (128, 448), (192, 384), (192, 448)]
    assert tree.mean_strength == 0.3125


def most(trees) -> dict[float, float]:
    """Of trees that redraw (area, content) the one with the most content for each area."""
    best: dict[float, float] = {}
    for area, content in trees:
        best[area] = max(content, best.get(area, -1.0))
    return best


def together(parts) -> dict[float, float]:
    """All that trees side by side can redraw."""
    return most((sum(area for area, _ in choice), sum(content for _, content in choice)) for choice in itertools.product(*(part.items() for part in parts)))


def all_trees(content: torch.Tensor, area: torch.Tensor, levels: int) -> dict[float, float]:
    """What every tree below one square redraws: its split squares' areas and contents, added up."""
    if levels == 0 or not area.numel():
        return {0.0: 0.0}
    half = 1 << levels - 1
    quarters = [all_trees(content[rows, cols], area[rows, cols], levels - 1) for rows in (slice(half), slice(half, None)) for cols in (slice(half), slice(half, None))]
    own = float(area.sum()), float((content * area).sum())
    return most([(0.0, 0.0)] + [(own[0] + more, own[1] + gain) for more, gain in together(quarters).items()])


def best_for_each_price(content: torch.Tensor, area: torch.Tensor, levels: int) -> list[tuple[float, float]]:
    """The area and the content that are redrawn by the best tree of each price, found among all trees there are."""
    side = 1 << levels
    found = together([
        all_trees(content[row:row + side, col:col + side], area[row:row + side, col:col + side], levels)
        for row in range(0, content.shape[0], side) for col in range(0, content.shape[1], side)])
    corners = [(0.0, 0.0)]
    while later := [tree for tree in found.items() if tree[1] > corners[-1][1] + 1e-6]:
        slope = lambda tree: (tree[1] - corners[-1][1]) / (tree[0] - corners[-1][0])
        corners.append(max(later, key=lambda tree: (round(slope(tree), 9), tree[0])))
    return corners[1:]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("height, width, max_leaf", [(32, 32, 32), (30, 45, 32), (16, 32, 16), (27, 16, 32)])
def test_no_tree_redraws_more_for_any_price(seed, height, width, max_leaf):
    image = uneven(height, width, 8, seed, contrast=1 + seed % 4)
    content, area = contents(image, 8)
    levels = (max_leaf // 8).bit_length() - 1
    best = best_for_each_price(content, area, levels)
    assert best
    for paid, gain in best:
        budget = paid / (float(area.sum()) * levels)
        tree = build_quadtree(image, detail_budget=budget, min_leaf=8, max_leaf=max_leaf)
        assert tree.mean_strength == pytest.approx(budget)
        assert float((strengths(tree) * content * area).sum()) == pytest.approx(gain / levels, rel=1e-4)


BUDGETS = [step / 20 for step in range(1, 21)]


@pytest.mark.parametrize("image, sizes", [
    (uneven(256, 256, 8, 0), dict(min_leaf=8, max_leaf=64)),
    (uneven(200, 330, 8, 1, contrast=6), dict(min_leaf=8, max_leaf=256)),
    (uneven(64, 64, 4, 2, contrast=0.5), dict(min_leaf=4, max_leaf=64)),
    (with_busy(flat(512, 512), (0, 0, 0.2), (1, 6, 0.2), (5, 5, 0.2), (7, 0, 0.1)), dict(min_leaf=64, max_leaf=512)),
    (astronaut(), dict(min_leaf=8, max_leaf=128)),
    (astronaut(), dict(min_leaf=16, max_leaf=512, metric="gradient")),
    (torch.cat([uneven(96, 160, 8, 3), uneven(96, 160, 8, 4)]), dict(min_leaf=8, max_leaf=64, metric="combined")),
], ids=["noise", "one busy root", "fine", "equal cells far apart", "photo", "photo in one root", "batch"])
def test_more_budget_redraws_no_part_less(image, sizes):
    grids = [strengths(build_quadtree(image, detail_budget=budget, **sizes)) for budget in BUDGETS]
    assert all(bool((more >= less).all()) for less, more in zip(grids, grids[1:]))
    assert float(grids[0].mean()) < float(grids[-1].mean())


@pytest.mark.parametrize("image, sizes, roots", [
    (uneven(256, 256, 8, 0), dict(min_leaf=8, max_leaf=64), 16), (uneven(128, 128, 8, 1, contrast=6), dict(min_leaf=8, max_leaf=128), 1),
    (astronaut(), dict(min_leaf=8, max_leaf=128), 16), (astronaut(), dict(min_leaf=16, max_leaf=512, metric="gradient"), 1),
], ids=["noise", "one busy root", "photo", "photo in one root"])
def test_the_budget_is_met_to_half_a_step_of_the_largest_square(image, sizes, roots):
    steps = (sizes["max_leaf"] // sizes["min_leaf"]).bit_length() - 1
    most_of_all = build_quadtree(image, detail_budget=1.0, **sizes).mean_strength
    for budget in BUDGETS:
        tree = build_quadtree(image, detail_budget=budget, **sizes)
        assert abs(tree.mean_strength - min(budget, most_of_all)) <= 0.5 / (roots * steps) + 1e-9


@pytest.mark.parametrize("image, sizes", [
    (checkered(512, 512), dict(max_leaf=512)), (checkered(512, 512), dict(max_leaf=128)), (checkered(300, 450), dict(max_leaf=256)),
    (torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)).repeat(1, 6, 5, 1), dict(max_leaf=256)),
    (torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 90, 70, 1), dict(min_leaf=8, max_leaf=64)),
], ids=["one root", "many roots", "clipped", "repeated noise", "fine and clipped"])
def test_an_equally_busy_picture_is_redrawn_wholly_or_not_at_all(image, sizes):
    found = {budget: {leaf.strength for leaf in build_quadtree(image, detail_budget=budget, **sizes).leaves} for budget in (0.05, 0.4, 0.49, 0.51, 0.75, 1.0)}
    assert found == {budget: {float(budget > 0.5)} for budget in found}


@pytest.mark.parametrize("cells", [[(0, 0), (7, 15)], [(0, 0), (7, 7), (0, 8), (7, 15)], [(1, 0), (1, 1), (6, 14), (6, 15)]])
def test_equally_busy_cells_far_apart_are_treated_alike(cells):
    image = with_busy(flat(512, 1024), *((*cell, 0.2) for cell in cells))
    found = [strengths(build_quadtree(image, detail_budget=budget, max_leaf=512)) for budget in BUDGETS]
    assert {len({float(grid[cell]) for cell in cells}) for grid in found} == {1}
    assert len({float(grid[cells[0]]) for grid in found}) == 4


def test_building_twice_gives_the_same_tree():
    assert build_quadtree(astronaut(), detail_budget=0.3, min_leaf=16) == build_quadtree(astronaut(), detail_budget=0.3, min_leaf=16)


@pytest.mark.parametrize("image", [flat(512, 512), FLAT + 0.9 / 255 / 3 ** 0.5 * (checkered(512, 512, 1.0) - FLAT)], ids=["flat", "below one level"])
@pytest.mark.parametrize("budget", [0.01, 0.4, 1.0])
def test_what_nobody_sees_is_no_detail(image, budget):
    assert layout(build_quadtree(image, detail_budget=budget, max_leaf=256)) == [(top, left, 256, 0.0) for top in (0, 256) for left in (0, 256)]


def test_a_picture_cut_at_its_border_pays_for_the_part_that_is_there():
    # The lower root is 64 of 256 px high: its splits cost a quarter, so of equal cells its own goes first.
    image = with_busy(flat(320, 256), (0, 0, 0.2), (4, 0, 0.2))
    assert layout(build_quadtree(image, detail_budget=0.15, max_leaf=256)) == [
        (0, 0, 256, 0.0), (256, 0, 64, 1.0), (256, 64, 64, 1.0), (256, 128, 128, 0.5)]


def test_of_several_images_each_cell_counts_as_in_the_busiest():
    left, right = (with_busy(flat(512, 512), cell) for cell in ((0, 0, 0.2), (7, 7, 0.2)))
    both = with_busy(flat(512, 512), (0, 0, 0.2), (7, 7, 0.2))
    assert layout(build_quadtree(torch.cat([left, right]), max_leaf=256)) == layout(build_quadtree(both, max_leaf=256))


def mean_of_photos(tree_of, budget: float) -> plans.Redrawn:
    found = [plans.redrawn(tree_of(name, 2048, budget, 64, 0), plans.photo_cells(name, 2048, 64)) for name in plans.PHOTOS]
    return plans.Redrawn(*(statistics.mean(getattr(one, name) for one in found) for name in plans.Redrawn.__slots__))


@pytest.mark.parametrize("budget, content, busiest, kept", [(0.25, 0.41, 0.62, 0.6), (0.4, 0.6, 0.83, 0.41)])
def test_eight_photos_are_redrawn_where_they_are_busy(budget, content, busiest, kept):
    old, new = (mean_of_photos(tree_of, budget) for tree_of in (plans.threshold_tree, plans.photo_tree))
    assert new.content >= content > 1.04 * old.content
    assert new.busiest >= busiest > old.busiest
    assert new.kept >= kept > old.kept
    assert new.strength == pytest.approx(budget, abs=0.01)


@pytest.mark.parametrize("name", plans.PHOTOS)
def test_no_photo_is_redrawn_less_for_its_mean_strength_than_a_threshold_would(name):
    cells = plans.photo_cells(name, 2048, 64)
    found = sorted((one.strength, one.content) for one in (plans.redrawn(plans.photo_tree(name, 2048, budget), cells) for budget in BUDGETS))
    for budget in (0.1, 0.25, 0.4, 0.6, 0.8):
        old = plans.redrawn(plans.threshold_tree(name, 2048, budget), cells)
        (low, less), (high, more) = next((pair for pair in itertools.pairwise([(0.0, 0.0), *found]) if pair[0][0] <= old.strength <= pair[1][0]))
        assert old.content <= (less + (more - less) * (old.strength - low) / (high - low) if high > low else more) + 0.02

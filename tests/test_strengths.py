"""Trees from masks, and changed strengths."""
from __future__ import annotations

import pytest
import torch
from pictures import CROPPED_SIZES, crop_start, cropped, layout, photo, scattered, strengths_of_pixels

from qtd_pack.compositing import composite
from qtd_pack.placement import strength_raster
from qtd_pack.quadtree import Leaf, Quadtree, build_quadtree
from qtd_pack.strengths import adjust_quadtree, quadtree_from_mask
from qtd_pack.utils import Rect


def test_a_mask_becomes_leaves_as_large_as_it_is_even():
    mask = torch.zeros(1, 256, 256)
    mask[:, :128, :128] = 1
    mask[:, 128:160, 128:192] = 0.5
    tree = quadtree_from_mask(mask, min_leaf=64, max_leaf=256)
    assert layout(tree) == [
        (0, 0, 128, 128, 1.0), (0, 128, 128, 256, 0.0), (128, 0, 256, 128, 0.0),
        (128, 128, 192, 192, 0.0), (128, 192, 192, 256, 0.0), (192, 128, 256, 192, 0.0), (192, 192, 256, 256, 0.0)]


@pytest.mark.parametrize("height, width", [(1000, 776), (40, 512)])
def test_a_mask_at_the_leafs_grid_comes_back_as_it_was(height, width):
    coarse = torch.rand(-(-height // 8), -(-width // 8)).round()
    mask = coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width]
    assert torch.equal(strength_raster(quadtree_from_mask(mask, min_leaf=8, max_leaf=256), height, width), mask)


def test_adjusting_remaps_strengths():
    tree = build_quadtree(photo(), min_leaf=32, max_leaf=256)
    raster = strength_raster(tree, 512, 512)
    adjusted = adjust_quadtree(tree, min_denoise=0.1, max_denoise=0.6, gamma=2.0, invert=True)
    assert torch.allclose(strength_raster(adjusted, 512, 512), 0.1 + 0.5 * (1 - raster) ** 2)
    assert adjust_quadtree(tree) == tree


def test_what_a_mask_protects_is_kept_and_nothing_else():
    tree = Quadtree(256, 256, 32, 256, (Leaf(Rect(0, 0, 256, 256), 256, 9.0, 0.8),))
    protect = torch.zeros(1, 256, 256)
    protect[:, 40:50, 200:210] = 1
    expected = torch.full((256, 256), 0.8)
    expected[32:64, 192:224] = 0
    assert torch.allclose(strength_raster(adjust_quadtree(tree, protect=protect), 256, 256), expected)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("height, width", [(64, 64), (7, 300)])
def test_a_mask_of_one_value_protects_as_much_whatever_its_size(value, height, width):
    tree = scattered(383, 501)
    adjusted = adjust_quadtree(tree, protect=torch.full((1, height, width), value))
    assert torch.allclose(strengths_of_pixels(adjusted), (1 - value) * strengths_of_pixels(tree))


def test_an_empty_mask_makes_a_tree_that_keeps_any_picture():
    tree = quadtree_from_mask(torch.zeros(1, 64, 64))
    assert torch.equal(strength_raster(tree, 47, 62, 8), torch.zeros(47, 62))
    original = torch.rand(1, 383, 501, 3)
    assert torch.equal(composite(original, torch.rand(1, 376, 496, 3), tree), original)


@pytest.mark.parametrize("width, height, cell_px", [CROPPED_SIZES[0], *CROPPED_SIZES[4:]])
def test_a_mask_protects_before_and_after_the_crop(width, height, cell_px):
    whole = (torch.rand(height, width) > 0.997).float()
    part = cropped(whole[None], cell_px)[0]
    top, left = crop_start(height, cell_px), crop_start(width, cell_px)
    for tree_of, mask, shift in ((part, whole, (0, 0)), (whole, part, (top, left)), (whole, whole, (0, 0)), (part, part, (0, 0))):
        tree = Quadtree(*tree_of.shape, 8, 8, tuple(
            Leaf(Rect(row, col, min(row + 8, tree_of.shape[0]), min(col + 8, tree_of.shape[1])), 8, 0.0, 1.0)
            for row in range(0, tree_of.shape[0], 8) for col in range(0, tree_of.shape[1], 8)))
        strength = strengths_of_pixels(adjust_quadtree(tree, protect=mask))
        inside = torch.zeros_like(tree_of)
        inside[shift[0]:shift[0] + part.shape[0], shift[1]:shift[1] + part.shape[1]] = part if tree_of is whole else tree_of
        covered = whole if mask is whole and tree_of is whole else inside
        assert float(strength[covered == 1].max()) == 0
        assert float((strength == 0).float().mean()) < 64 * float(covered.mean()) + 0.01


def test_a_thin_line_in_a_larger_mask_protects():
    tree = Quadtree(64, 64, 8, 8, tuple(Leaf(Rect(row, col, row + 8, col + 8), 8, 0.0, 1.0) for row in range(0, 64, 8) for col in range(0, 64, 8)))
    protect = torch.zeros(256, 256)
    protect[101, :] = 1
    strength = strengths_of_pixels(adjust_quadtree(tree, protect=protect))
    assert [float(strength[row].max()) for row in (23, 24, 31, 32)] == [1, 0, 0, 1]


def disc(height, width, radius):
    rows, cols = torch.arange(height)[:, None] - height / 2, torch.arange(width) - width / 2
    return (rows.square() + cols.square() < radius ** 2).float()


def stroke(height, width):
    """Black, 16 px wide, from corner to corner on white."""
    rows, cols = torch.arange(height)[:, None] / height, torch.arange(width) / width
    return ((rows - cols).abs() * min(height, width) > 8 * 2 ** 0.5).float()


@pytest.mark.parametrize("mask", [disc(192, 256, 60), stroke(192, 256), stroke(383, 501), torch.rand(1, 100, 150).round()[0]], ids=["disc", "stroke", "odd", "noise"])
@pytest.mark.parametrize("min_leaf", [8, 16, 64])
def test_all_that_is_black_is_kept(mask, min_leaf):
    strength = strengths_of_pixels(quadtree_from_mask(mask, min_leaf=min_leaf, max_leaf=min_leaf * 4))
    assert float(strength[mask == 0].max()) == 0
    # And nothing but what shares a smallest leaf with black.
    near = torch.nn.functional.max_pool2d(1 - mask[None, None], 2 * min_leaf - 1, 1, min_leaf - 1)[0, 0]
    assert bool((strength[near == 0] == 1).all())


def test_of_a_soft_mask_only_black_is_kept_and_the_rest_gets_the_mean():
    mask = (torch.arange(256) / 255).clamp(min=0.25).expand(64, 256).clone()
    mask[:, :3] = 0.4 / 255
    tree = quadtree_from_mask(mask, min_leaf=32, max_leaf=32)
    strength = strengths_of_pixels(tree)[0]
    assert float(strength[0]) == 0
    for left in range(32, 256, 32):
        assert float(strength[left]) == pytest.approx(float(mask[0, left:left + 32].mean()), abs=1 / 255)
    assert strengths_of_pixels(quadtree_from_mask(torch.full((64, 64), 1 / 255), min_leaf=32, max_leaf=64)).min() > 0


def test_the_mean_on_a_masks_edges_is_a_choice():
    mask = torch.zeros(64, 128)
    mask[:, 16:] = 1
    keeping, mean = (quadtree_from_mask(mask, min_leaf=64, max_leaf=64, edges=edges) for edges in ("keep black", "mean"))
    assert [leaf.strength for leaf in keeping.leaves] == [0, 1]
    assert [leaf.strength for leaf in mean.leaves] == [pytest.approx(0.75, abs=1 / 255), 1]


def test_leaves_that_do_not_fit_each_other_are_refused_for_masks_too():
    with pytest.raises(ValueError, match=r"max_leaf: expected min_leaf \(64\) doubled some times, got 100"):
        quadtree_from_mask(torch.ones(1, 128, 128), min_leaf=64, max_leaf=100)

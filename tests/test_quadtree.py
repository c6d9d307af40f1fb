"""Where is detail: leaves, strengths, drawing and compositing, in pixels."""
from __future__ import annotations

import json

import pytest
import skimage.data
import torch

from qtd_pack.quadtree import (
    Leaf, Quadtree, Rect, adjust_quadtree, build_quadtree, composite, draw_quadtree, edit_quadtree, measure_cells, parse_edits,
    quadtree_from_mask, strength_colour, strength_raster)


def flat(height, width, value=0.3):
    return torch.full((1, height, width, 3), value)


def busy_corner(height, width, side):
    """Flat but for black and white noise in the top left corner."""
    image = flat(height, width)
    image[:, :side, :side] = torch.rand(1, side, side, 3).round()
    return image


def photo():
    return torch.from_numpy(skimage.data.astronaut()).float()[None] / 255


def layout(tree):
    return [(leaf.rect.top, leaf.rect.left, leaf.rect.bottom, leaf.rect.right, leaf.strength) for leaf in tree.leaves]


def by_threshold(image, threshold=25.0, **sizes):
    return build_quadtree(image, detail_budget=0, content_threshold=threshold, **{"min_leaf": 64, "max_leaf": 256} | sizes)


@pytest.mark.parametrize("image, leaves", [
    (flat(256, 256), [(0, 0, 256, 256, 0.0)]),
    (flat(300, 256), [(0, 0, 256, 256, 0.0), (256, 0, 300, 256, 0.0)]),
    (busy_corner(256, 256, 64), [
        (0, 0, 64, 64, 1.0), (0, 64, 64, 128, 1.0), (0, 128, 128, 256, 0.5), (64, 0, 128, 64, 1.0), (64, 64, 128, 128, 1.0),
        (128, 0, 256, 128, 0.5), (128, 128, 256, 256, 0.5)]),
    (flat(8, 600), [(0, 0, 8, 256, 0.0), (0, 256, 8, 512, 0.0), (0, 512, 8, 600, 0.0)]),
])
def test_squares_are_split_while_their_content_exceeds_the_threshold(image, leaves):
    assert layout(by_threshold(image)) == leaves


@pytest.mark.parametrize("height, width", [(256, 256), (1000, 776), (8, 2048), (65, 63), (1, 1)])
@pytest.mark.parametrize("metric", ["variance", "gradient", "combined"])
def test_leaves_cover_each_pixel_once(height, width, metric):
    tree = build_quadtree(torch.rand(1, height, width, 3), min_leaf=32, max_leaf=256, metric=metric)
    covered = torch.zeros(height, width)
    for leaf in tree.leaves:
        covered[leaf.rect.top:leaf.rect.bottom, leaf.rect.left:leaf.rect.right] += 1
    assert bool((covered == 1).all())


def test_raising_the_threshold_never_adds_leaves():
    counts = [len(by_threshold(photo(), threshold, min_leaf=16).leaves) for threshold in (0, 5, 10, 20, 40, 80, 160)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 10 * counts[-1]


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.4, 0.6, 0.9])
def test_the_budget_is_the_mean_strength(budget):
    tree = build_quadtree(photo(), detail_budget=budget, min_leaf=8, max_leaf=256)
    assert tree.mean_strength == pytest.approx(budget, abs=0.02)


def test_the_budget_counts_before_the_range_of_strengths_is_applied():
    full = build_quadtree(photo(), min_leaf=16, max_leaf=256)
    narrow = build_quadtree(photo(), min_leaf=16, max_leaf=256, min_denoise=0.2, max_denoise=0.6)
    assert [leaf.rect for leaf in full.leaves] == [leaf.rect for leaf in narrow.leaves]
    assert narrow.mean_strength == pytest.approx(0.2 + 0.4 * full.mean_strength)


def test_a_flat_picture_stays_whole_whatever_the_budget():
    assert layout(build_quadtree(flat(512, 512), detail_budget=0.9, max_leaf=512)) == [(0, 0, 512, 512, 0.0)]


def test_strength_runs_over_the_configured_sizes_and_not_over_those_that_occur():
    strengths = {leaf.side: leaf.strength for leaf in build_quadtree(photo(), min_leaf=16, max_leaf=256, min_denoise=0.1, max_denoise=0.9).leaves}
    assert {side: round(amount, 6) for side, amount in strengths.items()} == {16: 0.9, 32: 0.7, 64: 0.5, 128: 0.3, 256: 0.1}


def test_one_size_of_leaf_is_the_smallest():
    assert {leaf.strength for leaf in build_quadtree(photo(), min_leaf=64, max_leaf=64, max_denoise=0.7).leaves} == {0.7}


def test_several_images_share_a_tree_as_fine_as_the_busiest():
    left, right = busy_corner(256, 256, 64), busy_corner(256, 256, 64).flip(2)
    both = by_threshold(torch.cat([left, right]))
    finest = torch.maximum(strength_raster(by_threshold(left), 256, 256), strength_raster(by_threshold(right), 256, 256))
    assert torch.equal(strength_raster(both, 256, 256), finest)


def test_variance_is_the_pictures_own():
    image = torch.rand(1, 64, 64, 3)
    expected = 255 * image[0].reshape(-1, 3).double().var(0, correction=0).sum().sqrt()
    assert by_threshold(image, 1e9, max_leaf=64).leaves[0].detail == pytest.approx(float(expected), rel=1e-5)


def test_gradient_is_the_root_mean_square_of_the_differences():
    ramp = torch.arange(64).float()[None, None, :, None].expand(1, 64, 64, 3) / 255
    tree = build_quadtree(ramp, min_leaf=64, max_leaf=64, metric="gradient")
    assert tree.leaves[0].detail == pytest.approx((3 * 63 / 64) ** 0.5, rel=1e-4)


def test_alpha_does_not_count_as_content():
    image = torch.cat([flat(256, 256), torch.rand(1, 256, 256, 1)], -1)
    assert len(by_threshold(image).leaves) == 1


@pytest.mark.parametrize("scale", [1 / 16, 1 / 8, 1, 2])
def test_a_cell_has_the_strength_of_the_leaf_over_its_centre(scale):
    tree = build_quadtree(photo(), min_leaf=32, max_leaf=256)
    side = int(512 * scale)
    raster = strength_raster(tree, side, side)
    for row, col in [(0, 0), (side // 3, side // 2), (side - 1, side - 1), (side // 7, side - 2)]:
        y, x = (row + 0.5) / scale, (col + 0.5) / scale
        leaf = next(leaf for leaf in tree.leaves if leaf.rect.top <= y < leaf.rect.bottom and leaf.rect.left <= x < leaf.rect.right)
        assert raster[row, col] == pytest.approx(leaf.strength)


@pytest.mark.parametrize("height, width", [(125, 97), (62, 48), (250, 194), (124, 96)])
def test_a_host_that_crops_to_whole_cells_is_no_error(height, width):
    tree = Quadtree(1000, 776, 1024, 1024, (Leaf(Rect(0, 0, 1000, 776), 1024, 0.0, 0.5),))
    assert strength_raster(tree, height, width).shape == (height, width)


@pytest.mark.parametrize("height, width", [(97, 125), (128, 96), (125, 100), (1, 97)])
def test_another_aspect_is_an_error(height, width):
    tree = Quadtree(1000, 776, 1024, 1024, (Leaf(Rect(0, 0, 1000, 776), 1024, 0.0, 0.5),))
    with pytest.raises(ValueError, match=f"quadtree: made for a picture of 776 x 1000, but the latent or picture is {width} x {height}"):
        strength_raster(tree, height, width)


def test_a_mask_becomes_leaves_as_large_as_it_is_even():
    mask = torch.zeros(1, 256, 256)
    mask[:, :128, :128] = 1
    mask[:, 128:160, 128:192] = 0.5
    tree = quadtree_from_mask(mask, min_leaf=64, max_leaf=256)
    assert layout(tree) == [
        (0, 0, 128, 128, 1.0), (0, 128, 128, 256, 0.0), (128, 0, 256, 128, 0.0),
        (128, 128, 192, 192, 64 / 255), (128, 192, 192, 256, 0.0), (192, 128, 256, 192, 0.0), (192, 192, 256, 256, 0.0)]


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


def test_the_colours_get_lighter_with_strength():
    luminance = strength_colour(torch.linspace(0, 1, 101)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert bool((luminance.diff() > 0).all())


def test_the_overlay_shows_strengths_and_borders():
    tree = by_threshold(busy_corner(256, 256, 64))
    image = flat(256, 256)
    overlay = draw_quadtree(image, tree)
    assert overlay.shape == (1, 256, 256, 3)
    assert torch.allclose(overlay[0, 200, 60], 0.55 * image[0, 0, 0] + 0.45 * strength_colour(torch.tensor(0.5)))
    assert torch.equal(overlay[0, 128, :], torch.full((256, 3), 0.9))
    assert torch.equal(overlay[0, :64, 64], torch.full((64, 3), 0.9))


@pytest.mark.parametrize("feather", [0, 8, 32, 200])
def test_compositing_keeps_strength_0_bit_for_bit_and_has_no_step(feather):
    tree = quadtree_from_mask(torch.arange(256).div(128, rounding_mode="floor").float().expand(256, 256), min_leaf=64, max_leaf=256)
    original, image = torch.rand(2, 256, 256, 3), torch.rand(1, 256, 256, 3).expand(2, -1, -1, -1)
    out = composite(original, image, tree, feather=feather)
    assert torch.equal(out[:, :, :128], original[:, :, :128])
    assert torch.equal(out[:, :, 128 + 32:], image[:, :, 128 + 32:])
    ramp = composite(flat(256, 256, 0.0), flat(256, 256, 1.0), tree, feather=feather)[0, 100, :, 0]
    width = {0: 0, 8: 8, 32: 32, 200: 32}[feather]
    assert float(ramp.diff().max()) <= (1.01 / width if width else 1.0)


def test_a_16384_px_picture_is_cut_too():
    image = torch.rand(1, 2048, 1, 3).repeat(1, 8, 1, 1).expand(1, 16384, 16384, 3)
    tree = build_quadtree(image, max_leaf=1024)
    assert sum(leaf.rect.height * leaf.rect.width for leaf in tree.leaves) == 16384 * 16384


@pytest.mark.parametrize("make, message", [
    (lambda: build_quadtree(torch.full((1, 64, 64, 3), torch.nan)), "image: expected pixels between 0 and 1, got NaN or infinite ones"),
    (lambda: build_quadtree(torch.zeros(1, 0, 64, 3)), "image: expected a picture of shape .* got .1, 0, 64, 3."),
    (lambda: build_quadtree(flat(64, 64), min_leaf=128, max_leaf=64), "min_leaf: expected 1 px or more and at most max_leaf .64., got 128"),
    (lambda: build_quadtree(flat(64, 64), min_leaf=64, max_leaf=200), "max_leaf: expected min_leaf .64. doubled some times, got 200. The nearest are 128 and 256"),
    (lambda: build_quadtree(flat(64, 64), detail_budget=1.5), "detail_budget: expected a number from 0 to 1, got 1.5"),
    (lambda: build_quadtree(flat(64, 64), min_denoise=0.8, max_denoise=0.2), "min_denoise: expected at most max_denoise .0.2., got 0.8"),
    (lambda: build_quadtree(flat(64, 64), detail_budget=0, content_threshold=-1), "content_threshold: expected 0 or more, got -1"),
    (lambda: build_quadtree(flat(64, 64), metric="edges"), "metric: expected one of variance, gradient, combined, got 'edges'"),
    (lambda: quadtree_from_mask(torch.zeros(1, 64, 0)), "mask: expected a MASK of shape"),
    (lambda: quadtree_from_mask(torch.full((1, 64, 64), torch.inf)), "mask: expected values between 0 and 1, got NaN or infinite ones"),
    (lambda: adjust_quadtree(build_quadtree(flat(64, 64)), gamma=0), "gamma: expected a number above 0, got 0"),
    (lambda: adjust_quadtree(build_quadtree(flat(64, 64)), protect=torch.zeros(1, 64, 128)), "quadtree: made for a picture of 64 x 64, but the protect mask is 128 x 64"),
    (lambda: composite(flat(64, 64), flat(64, 32), build_quadtree(flat(64, 64))), "original: expected the size of image, 32 x 64 with 3 channels, got 64 x 64 with 3"),
])
def test_bad_input_says_what_was_expected_what_came_and_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_statistics_at_a_fine_grid_give_the_same_tree_as_at_the_leafs():
    from qtd_pack.quadtree import coarsen, grow_quadtree
    settings = dict(detail_budget=0.4, content_threshold=25.0, max_leaf=256, min_denoise=0.0, max_denoise=1.0, metric="combined")
    fine = grow_quadtree(coarsen(measure_cells(photo(), 8), 4), **settings)
    direct = grow_quadtree(measure_cells(photo(), 32), **settings)
    assert layout(fine) == layout(direct)


def edited(tree, squares, size=None):
    width, height = size or (tree.width, tree.height)
    return edit_quadtree(tree, parse_edits(json.dumps({"size": [width, height], "squares": squares})))


def even(side=256, strength=0.5):
    """One leaf of that side over a picture as large, in a tree whose smallest leaves are 64 px."""
    return Quadtree(side, side, 64, side, (Leaf(Rect(0, 0, side, side), side, 7.0, strength),))


def test_a_painted_square_takes_its_strength_and_splits_the_leaf_it_lies_in():
    tree = edited(even(), [[128, 0, 64, 0]])
    assert layout(tree) == [
        (0, 0, 128, 128, 0.5), (0, 128, 64, 192, 0.0), (0, 192, 64, 256, 0.5), (64, 128, 128, 192, 0.5), (64, 192, 128, 256, 0.5),
        (128, 0, 256, 128, 0.5), (128, 128, 256, 256, 0.5)]
    assert {leaf.detail for leaf in tree.leaves} == {7.0}


def test_a_painted_square_takes_in_all_smaller_leaves():
    tree = build_quadtree(busy_corner(256, 256, 256), detail_budget=1.0, min_leaf=64, max_leaf=256)
    assert len(tree.leaves) == 16
    assert [leaf.strength for leaf in edited(tree, [[0, 0, 256, 0.25]]).leaves] == [0.25] * 16


@pytest.mark.parametrize("squares, strength", [
    ([[0, 0, 256, 0], [0, 0, 256, 1]], 1.0),
    ([[0, 0, 256, 0], [0, 0, 256, None]], 0.5),
    ([], 0.5),
])
def test_what_was_painted_last_counts_and_null_takes_it_back(squares, strength):
    assert layout(edited(even(), squares)) == [(0, 0, 256, 256, strength)]


def test_edits_of_a_picture_of_the_same_aspect_are_scaled():
    assert edited(even(256), [[64, 0, 64, 0]], size=(128, 128)) == edited(even(256), [[128, 0, 128, 0]])


def test_a_painted_square_smaller_than_the_leaves_counts_for_the_leaf_it_lies_in():
    assert layout(edited(even(64), [[40, 40, 8, 0]])) == [(0, 0, 64, 64, 0.0)]


def test_a_painted_square_outside_the_picture_changes_nothing():
    assert edited(even(), [[-512, 0, 256, 0], [0, 900, 8, 0]]) == even()


def test_edits_of_another_aspect_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="edits: painted on a picture of 512 x 256, but this one is 256 x 256.*Make `edits` empty"):
        edited(even(), [[0, 0, 64, 0]], size=(512, 256))


@pytest.mark.parametrize("text", ["", "  \n "])
def test_blank_edits_are_none(text):
    assert parse_edits(text) is None


@pytest.mark.parametrize("text", [
    "{", "[]", "null", "7", '"text"', "[" * 100_000, "{}", '{"size": [8, 8]}', '{"size": "ab", "squares": []}', '{"size": [0, 8], "squares": []}',
    '{"size": [8.5, 8], "squares": []}', '{"size": [1e400, 8], "squares": []}', '{"size": [8, 8], "squares": 3}', '{"size": [8, 8], "squares": [[0, 0, 8]]}',
    '{"size": [8, 8], "squares": [[0, 0, 8, 2]]}', '{"size": [8, 8], "squares": [[0, 0, 8, -0.1]]}', '{"size": [8, 8], "squares": [[0, 0, 8, NaN]]}',
    '{"size": [8, 8], "squares": [[0, 0, 8, true]]}', '{"size": [8, 8], "squares": [[0, 0, 8, "1"]]}', '{"size": [8, 8], "squares": [[0, 0, 8, []]]}',
    '{"size": [8, 8], "squares": [[0, 0, 0, 1]]}', '{"size": [8, 8], "squares": [[Infinity, 0, 8, 1]]}', '{"size": [8, 8], "squares": [[0, null, 8, 1]]}',
    '{"size": [' + "9" * 400 + ', 8], "squares": []}', '{"size": [8, 8], "squares": [' + "[0, 0, 8, 1], " * 50_000 + "[0, 0, 8, 1]]}",
])
def test_edits_that_are_not_edits_are_refused_with_the_way_out(text):
    with pytest.raises(ValueError, match="edits: expected nothing, or .* Make `edits` empty"):
        parse_edits(text)

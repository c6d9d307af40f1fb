"""Where is detail: leaves, strengths, drawing and compositing, in pixels."""
from __future__ import annotations

import json
import math

import pytest
import skimage.data
import torch

from qtd_pack.quadtree import (
    Leaf, Quadtree, Rect, adjust_quadtree, build_quadtree, composite, draw_quadtree, edit_quadtree, find_placement, measure_cells, parse_edits,
    quadtree_from_mask, sides_in_proportion, strength_colour, strength_raster)


def flat(height, width, value=0.3):
    return torch.full((1, height, width, 3), value)


def busy_corner(height, width, side):
    """Flat but for black and white noise in the top left corner."""
    image = flat(height, width)
    image[:, :side, :side] = torch.rand(1, side, side, 3).round()
    return image


def photo():
    return torch.from_numpy(skimage.data.astronaut()).float()[None] / 255


def built():
    """A tree of one leaf, of a picture of 776 x 1000 px."""
    return Quadtree(1000, 776, 1024, 1024, (Leaf(Rect(0, 0, 1000, 776), 1024, 0.0, 0.5),))


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
    assert strength_raster(built(), height, width).shape == (height, width)


@pytest.mark.parametrize("height, width", [(97, 125), (128, 96), (125, 100), (1, 97)])
def test_another_aspect_is_an_error(height, width):
    with pytest.raises(ValueError, match=f"quadtree: made for a picture of 776 x 1000, but the latent or picture is {width} x {height}"):
        strength_raster(built(), height, width)


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
    (lambda: quadtree_from_mask(torch.zeros(1, 64, 64), edges="soft"), "edges: expected one of keep black, mean, got 'soft'"),
    (lambda: adjust_quadtree(build_quadtree(flat(64, 64)), protect=torch.eye(64).repeat(1, 2)),
     "protect: expected a mask of the quadtree's picture, 64 x 64 px or of that aspect, got 128 x 64. Crop and scale the mask together with the picture"),
    (lambda: draw_quadtree(flat(64, 32), build_quadtree(flat(64, 64))), "image: expected the picture that the quadtree was made from, 64 x 64 px, got 32 x 64"),
    (lambda: sides_in_proportion(built(), 64, 64), "width and height: expected the aspect of the quadtree's picture, 776 x 1000 px, got 64 x 64. Set one of them to 0"),
    (lambda: strength_raster(built(), 64, 64, 8), "quadtree: made for a picture of 776 x 1000, but the latent or picture is 64 x 64, which is another aspect: it is of one of 512 x 512 px. Build the quadtree from the picture that you encode"),
    (lambda: strength_raster(adjust_quadtree(quadtree_from_mask(torch.zeros(1, 64, 64)), invert=True), 64, 96, 8), "64 x 64 is the mask that Load Image gives where nothing was painted"),
    (lambda: composite(flat(64, 64), flat(64, 32), build_quadtree(flat(64, 64))), "original: expected the size of image, 32 x 64 px.*got 64 x 64 px. That is another aspect: connect the picture that went into VAE Encode, after any crop"),
    (lambda: composite(flat(383, 501), flat(760, 1000), built()), "original: expected the size of image, 1000 x 760 px.*got 501 x 383 px. The result is 2 times as large: connect the picture that went into VAE Encode, after all scaling"),
    (lambda: composite(flat(766, 1002), flat(376, 496), built()), "original: .*got 1002 x 766 px. The result is 2 times smaller: connect the picture that went into VAE Encode, after all scaling"),
    (lambda: composite(flat(64, 96), flat(64, 96), built()), "quadtree: made for a picture of 776 x 1000 px, but image is 96 x 64 and original 96 x 64, which is another aspect. Connect the quadtree that was sampled with"),
    (lambda: composite(flat(64, 64), torch.zeros(1, 64, 64, 5), build_quadtree(flat(64, 64))), "original: expected the channels of image, 5, or 1 to 4 in both, got 3"),
    (lambda: composite(flat(64, 64)[0], flat(64, 64), build_quadtree(flat(64, 64))), "original: expected a picture of shape"),
    (lambda: composite(flat(64, 64), flat(64, 64)[:0], build_quadtree(flat(64, 64))), "image: expected a picture of shape"),
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


# Width, height and px per cell; what the host's VAEs leave of each is cropped_to and begins at crop_start.
CROPPED_SIZES = [
    (501, 383, 8), (1000, 750, 8), (1080, 1350, 8), (1920, 1080, 16), (131, 97, 8), (250, 187, 16), (331, 260, 32), (333, 250, 4)]
SIZES = pytest.mark.parametrize("width, height, cell_px", CROPPED_SIZES)


def cropped_to(side, cell_px):
    return side // cell_px * cell_px


def crop_start(side, cell_px):
    return side % cell_px // 2


def cropped(picture, cell_px):
    """What a VAE of the host sees of a picture, (B, H, W, C) or (B, H, W)."""
    height, width = picture.shape[1:3]
    top, left = crop_start(height, cell_px), crop_start(width, cell_px)
    return picture[:, top:top + cropped_to(height, cell_px), left:left + cropped_to(width, cell_px)]


def scattered(height, width):
    """A tree with strengths of 0, 0.25, ... 1 in no order."""
    min_leaf = 8 * math.ceil(max(height, width) / 512)
    strengths = torch.randint(0, 5, (-(-height // min_leaf), -(-width // min_leaf))) / 4
    mask = strengths.repeat_interleave(min_leaf, 0).repeat_interleave(min_leaf, 1)[:height, :width]
    return quadtree_from_mask(mask, min_leaf=min_leaf, max_leaf=min_leaf * 4)


def strengths_of_pixels(tree):
    """The strength over each pixel of the tree's picture, from its leaves alone."""
    found = torch.full((tree.height, tree.width), torch.nan)
    for leaf in tree.leaves:
        found[leaf.rect.top:leaf.rect.bottom, leaf.rect.left:leaf.rect.right] = leaf.strength
    return found


def at(values, rows, cols):
    """The values under points; beyond the border those at the border."""
    rows, cols = (points.floor().long().clamp(0, length - 1) for points, length in zip((rows, cols), values.shape))
    return values[rows][:, cols]


@SIZES
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_each_cell_of_a_cropped_picture_takes_the_leaf_over_its_true_centre(width, height, cell_px, scale):
    tree = scattered(height, width)
    rows, cols = (
        (crop_start(side * scale, cell_px) + (torch.arange(side * scale // cell_px) + 0.5) * cell_px) / scale for side in (height, width))
    raster = strength_raster(tree, len(rows), len(cols), cell_px)
    assert torch.equal(raster, at(strengths_of_pixels(tree), rows, cols))


@SIZES
def test_a_tree_of_the_cropped_picture_has_its_cells_where_they_are(width, height, cell_px):
    tree = scattered(cropped_to(height, cell_px), cropped_to(width, cell_px))
    rows, cols = ((torch.arange(side // cell_px) + 0.5) * cell_px for side in (height, width))
    assert torch.equal(strength_raster(tree, len(rows), len(cols), cell_px), at(strengths_of_pixels(tree), rows, cols))


@SIZES
@pytest.mark.parametrize("factor", [0.6, 1.024, 1.5, 2.3648, 3.7])
@pytest.mark.parametrize("cropped_first", [False, True])
def test_at_any_scale_a_cell_is_less_than_one_off(width, height, cell_px, factor, cropped_first):
    size = (height, width)
    enlarged = [round((cropped_to(side, cell_px) if cropped_first else side) * factor) for side in size]
    spans = find_placement(size, tuple(cropped_to(side, cell_px) for side in enlarged), cell_px)
    for span, side, large in zip(spans, size, enlarged):
        centres = (torch.arange(large // cell_px) + 0.5) * cell_px
        true = (crop_start(side, cell_px) if cropped_first else 0) + (centres + crop_start(large, cell_px)) / factor
        assert float((span.px(centres) - true).abs().max()) < cell_px / factor + 1


@SIZES
@pytest.mark.parametrize("made_from", ["uncropped", "cropped", "half", "double"])
@pytest.mark.parametrize("original_is", ["uncropped", "cropped", "enlarged"])
def test_a_result_of_a_cropped_picture_is_laid_where_it_was_taken_from(width, height, cell_px, made_from, original_is):
    scale = 2 if original_is == "enlarged" else 1
    photo = torch.rand(1, height * scale, width * scale, 1)
    result = torch.rand_like(cropped(photo, cell_px))
    sides = {
        "uncropped": (height, width), "cropped": (cropped_to(height, cell_px), cropped_to(width, cell_px)),
        "half": (round(height / 2), round(width / 2)), "double": (height * 2, width * 2)}[made_from]
    tree = scattered(*sides)
    original = cropped(photo, cell_px) if original_is == "cropped" else photo
    out = composite(original, result, tree, feather=0)
    assert out.shape == original.shape
    # Where a pixel of the whole photo lies in what the tree was made from.
    rows, cols = ((torch.arange(side * scale) + 0.5) / scale for side in (height, width))
    if made_from == "cropped":
        rows, cols = (points - crop_start(side, cell_px) for points, side in zip((rows, cols), (height, width)))
    else:
        rows, cols = (points * made / side for points, made, side in zip((rows, cols), sides, (height, width)))
    changed = (at(strengths_of_pixels(tree), rows, cols) > 0).float()[None]
    laid = photo.clone()
    cropped(laid, cell_px)[:] = result
    expected = torch.where(changed[..., None] > 0, laid, photo)
    # Half an odd number of pixels is rounded: the leaves' borders are, too.
    blur = 2 if made_from == "half" and (height % 2 or width % 2) else 0
    sure = torch.nn.functional.max_pool2d(changed, 2 * blur + 1, 1, blur) == -torch.nn.functional.max_pool2d(-changed, 2 * blur + 1, 1, blur)
    if original_is == "cropped":
        laid, expected, sure = (cropped(picture, cell_px) for picture in (laid, expected, sure))
    assert float(sure.float().mean()) > 0.5
    assert torch.equal(out[sure], expected[sure])
    assert bool(((out == original) | (out == laid)).all())


def test_the_passage_also_leads_to_what_was_cropped_off():
    original, result = flat(383, 501, 0.0), flat(376, 496, 1.0)
    tree = Quadtree(383, 501, 512, 512, (Leaf(Rect(0, 0, 383, 501), 512, 0.0, 1.0),))
    out = composite(original, result, tree, feather=32)[0, :, :, 0]
    assert float(out[:3].max()) == float(out[379:].max()) == float(out[:, :2].max()) == float(out[:, 498:].max()) == 0
    # Where a step were 1. At the picture's border there are fewer pixels to average.
    assert float(out.diff(dim=0).abs().max()) < 0.06 and float(out.diff(dim=1).abs().max()) < 0.06
    assert float(out[40:-40, 40:-40].min()) == 1


@pytest.mark.parametrize("originals, results, taken", [(2, 4, [0, 1, 0, 1]), (18, 17, list(range(17))), (1, 3, [0, 0, 0]), (3, 1, [0]), (3, 7, [0, 1, 2, 0, 1, 2, 0])])
def test_originals_are_repeated_or_cut_to_the_number_of_results(originals, results, taken):
    original, image = torch.rand(originals, 32, 48, 3), torch.rand(results, 32, 48, 3)
    tree = quadtree_from_mask(torch.arange(48).div(24, rounding_mode="floor").float().expand(32, 48), min_leaf=8, max_leaf=8)
    out = composite(original, image, tree, feather=0)
    assert torch.equal(out[:, :, :24], original[taken][:, :, :24])
    assert torch.equal(out[:, :, 24:], image[:, :, 24:])


@pytest.mark.parametrize("height, width", [(32, 48), (37, 51)])
@pytest.mark.parametrize("original_channels, image_channels, colours, alpha", [
    (4, 3, 3, "original"), (3, 4, 3, "image"), (4, 4, 3, "own"), (1, 3, 3, None), (3, 1, 3, None), (1, 1, 1, None), (1, 4, 3, "image"), (2, 3, 3, "original")])
def test_colours_come_first_and_alpha_is_kept(height, width, original_channels, image_channels, colours, alpha):
    original, image = torch.rand(2, height, width, original_channels), cropped(torch.rand(2, height, width, image_channels), 8)
    tree = quadtree_from_mask(torch.arange(width).div(24, rounding_mode="floor").clamp(max=1).float().expand(height, width), min_leaf=8, max_leaf=8)
    out = composite(original, image, tree, feather=0)
    assert out.shape == (2, height, width, colours + bool(alpha))
    kept, changed = slice(0, 24), slice(24, None)
    colour_of = lambda picture: picture[..., :3 if picture.shape[-1] > 2 else 1].expand(*picture.shape[:-1], colours)
    assert torch.equal(out[:, :, kept, :colours], colour_of(original)[:, :, kept])
    assert torch.equal(cropped(out, 8)[:, :, changed, :colours], colour_of(image)[:, :, changed])
    if alpha == "original":
        assert torch.equal(out[..., -1], original[..., -1])
    if alpha == "image":
        assert torch.equal(cropped(out, 8)[..., -1], image[..., -1])
    if alpha == "own":
        assert torch.equal(out[:, :, kept, -1], original[:, :, kept, -1])


def test_kept_pixels_are_exact_beside_a_result_in_half_precision():
    original, tree = torch.rand(1, 64, 64, 3), quadtree_from_mask(torch.zeros(64, 64), min_leaf=64, max_leaf=64)
    out = composite(original, torch.full((1, 64, 64, 3), torch.nan, dtype=torch.float16), tree)
    assert torch.equal(out, original)


@pytest.mark.parametrize("tree_size, size", [((501, 383), (496, 352)), ((512, 512), (512, 480)), ((640, 427), (512, 512)), ((1000, 750), (750, 1000)), ((1920, 1080), (1920, 1200))])
def test_pictures_of_another_aspect_stay_refused(tree_size, size):
    tree = scattered(*tree_size[::-1])
    with pytest.raises(ValueError, match="quadtree: made for a picture of"):
        composite(flat(*size[::-1]), flat(*size[::-1]), tree)
    with pytest.raises(ValueError, match="quadtree: made for a picture of"):
        strength_raster(tree, size[1] // 8, size[0] // 8, 8)


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


@pytest.mark.parametrize("width, height, expected", [(0, 0, (383, 501)), (1002, 0, (766, 1002)), (0, 766, (766, 1002)), (100, 0, (76, 100)), (1, 0, (1, 1)), (496, 376, (376, 496))])
def test_a_side_of_0_is_in_proportion(width, height, expected):
    assert sides_in_proportion(scattered(383, 501), height, width) == expected


@pytest.mark.parametrize("width, height, cell_px", CROPPED_SIZES[:4])
def test_edits_of_the_uncropped_picture_lie_where_they_were_painted(width, height, cell_px):
    tall, wide = cropped_to(height, cell_px), cropped_to(width, cell_px)
    tree = Quadtree(tall, wide, 1, 2048, (Leaf(Rect(0, 0, tall, wide), 2048, 0.0, 0.5),))
    left, top = 100, 60
    strength = strengths_of_pixels(edited(tree, [[left, top, 64, 0]], size=(width, height)))
    expected = torch.full_like(strength, 0.5)
    top, left = top - crop_start(height, cell_px), left - crop_start(width, cell_px)
    expected[top:top + 64, left:left + 64] = 0
    assert torch.equal(strength, expected)

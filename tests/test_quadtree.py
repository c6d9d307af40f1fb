"""Where is detail: leaves, strengths, drawing and compositing, in pixels."""
from __future__ import annotations

import pytest
import torch
from pictures import built, busy_corner, by_threshold, flat, layout, photo

from qtd_pack.compositing import composite
from qtd_pack.drawing import draw_quadtree
from qtd_pack.placement import sides_in_proportion, strength_raster
from qtd_pack.quadtree import build_quadtree, largest_leaf, measure_cells
from qtd_pack.strengths import adjust_quadtree, quadtree_from_mask


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


@pytest.mark.parametrize("min_leaf, height, width, largest", [
    (64, 1024, 1024, 256), (64, 1024, 1536, 512), (64, 2048, 1365, 512), (64, 4096, 4096, 1024), (32, 1024, 768, 256), (64, 200, 300, 128), (64, 40, 30, 128)])
def test_without_a_size_of_their_own_the_largest_leaves_fit_the_picture(min_leaf, height, width, largest):
    assert largest_leaf(min_leaf, 0, height, width) == largest
    picture = torch.rand(1, height, width, 3)
    assert build_quadtree(picture, min_leaf=min_leaf, max_leaf=0) == build_quadtree(picture, min_leaf=min_leaf, max_leaf=largest)


def test_largest_leaves_by_hand_stay_as_they_are():
    assert largest_leaf(64, 1024, 100, 100) == 1024

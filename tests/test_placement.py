"""Trees over pictures and latents of other sizes."""
from __future__ import annotations

import pytest
import torch
from pictures import SIZES, at, built, crop_start, cropped_to, photo, scattered, strengths_of_pixels

from qtd_pack.placement import find_placement, sides_in_proportion, strength_raster
from qtd_pack.quadtree import build_quadtree


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


@pytest.mark.parametrize("width, height, expected", [(0, 0, (383, 501)), (1002, 0, (766, 1002)), (0, 766, (766, 1002)), (100, 0, (76, 100)), (1, 0, (1, 1)), (496, 376, (376, 496))])
def test_a_side_of_0_is_in_proportion(width, height, expected):
    assert sides_in_proportion(scattered(383, 501), height, width) == expected

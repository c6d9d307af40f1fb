"""What comes back of the original where nothing was to change."""
from __future__ import annotations

import pytest
import torch
from pictures import SIZES, at, crop_start, cropped, cropped_to, flat, scattered, strengths_of_pixels

from qtd_pack.compositing import composite
from qtd_pack.placement import strength_raster
from qtd_pack.quadtree import Leaf, Quadtree
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.utils import Rect


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

"""Regions of a picture: where they are, what their masks add up to, and what is said of each."""
from __future__ import annotations

import logging

import pytest
import torch
from sampling import even_tree, striped_tree

from qtd_pack.quadtree import Leaf, Quadtree
from qtd_pack.regions import numbered_picture, plan_regions, read_lines, region_images, region_masks, region_texts
from qtd_pack.utils import Rect


def test_regions_lie_in_reading_order_wherever_something_is_redrawn():
    """Columns of 128 px: the middle two are redrawn, in part."""
    tree = striped_tree(0.0, 0.5, 1.0, 0.0, height=256)
    assert plan_regions(tree, 256, 512, 128) == [Rect(0, 128, 128, 256), Rect(0, 256, 128, 384), Rect(128, 128, 256, 256), Rect(128, 256, 256, 384)]


def test_the_last_regions_take_what_is_left_and_none_is_a_sliver():
    assert [rect.width for rect in plan_regions(even_tree(1.0, 128, 300), 128, 300, 128)] == [128, 172]
    assert [rect.width for rect in plan_regions(even_tree(1.0, 128, 330), 128, 330, 128)] == [128, 128, 74]


def test_a_picture_smaller_than_a_region_is_one():
    assert plan_regions(even_tree(1.0, 100, 60), 100, 60, 512) == [Rect(0, 0, 100, 60)]


def test_regions_of_an_upscale_are_counted_in_its_pixels():
    assert plan_regions(striped_tree(0.0, 1.0, height=128), 256, 512, 256) == [Rect(0, 256, 256, 512)]


@pytest.mark.parametrize("overlap", [0, 1, 16, 64, 300])
def test_masks_add_up_to_one_in_every_region_and_lie_softly_over_their_neighbours(overlap):
    tree = striped_tree(0.0, 1.0, 1.0, height=256)
    places = plan_regions(tree, 256, 384, 128)
    masks = region_masks(places, 256, 384, overlap)
    assert len(masks) == 4 and all(mask.shape == (1, 256, 384) and mask.min() >= 0 for mask in masks)
    total = sum(masks)[0]
    assert torch.allclose(total[:, 128:], torch.ones(256, 256), atol=1e-6)
    if overlap == 16:
        across = masks[0][0, 40]
        assert across[256 - 17] == 1 and across[256 + 16] == 0
        assert torch.allclose(across[256 - 1:256 + 1], torch.tensor([0.515625, 0.484375]))


def test_where_nothing_is_redrawn_there_is_no_region_and_nothing_breaks():
    picture = torch.rand(1, 64, 96, 3)
    places = plan_regions(even_tree(0.0, 64, 96), 64, 96, 32)
    assert places == []
    assert [tuple(mask.shape) for mask in region_masks(places, 64, 96, 8)] == [(1, 64, 96)] and not region_masks(places, 64, 96, 8)[0].any()
    assert torch.equal(region_images(picture, places, 8)[0], picture)
    assert torch.allclose(numbered_picture(picture, places), picture, atol=0.5 / 255)


def test_the_picture_of_a_region_shows_its_surroundings():
    picture = torch.arange(64 * 64).view(1, 64, 64, 1).expand(2, -1, -1, 3).float()
    images = region_images(picture, [Rect(0, 0, 32, 32), Rect(32, 32, 64, 64)], 8)
    assert [tuple(image.shape) for image in images] == [(2, 40, 40, 3), (2, 40, 40, 3)]
    assert torch.equal(images[1], picture[:, 24:, 24:])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_numbered_picture_is_the_picture_but_for_lines_and_numbers(channels):
    picture = torch.full((2, 128, 128, channels), 0.5)
    numbered = numbered_picture(picture, [Rect(0, 0, 64, 64), Rect(64, 64, 128, 128)])
    assert numbered.shape == (1, 128, 128, 3)
    assert torch.allclose(numbered[0, 10:50, 70:120], torch.tensor(0.5), atol=0.01)
    assert numbered[0, 0, 0].tolist() == [1, 1, 1]
    # The borders are a region's own first and last pixels.
    assert (numbered[0, 63, :64] == 1).all() and (numbered[0, :64, 63] == 1).all()
    assert torch.allclose(numbered[0, 64:, 62:64], torch.tensor(0.5), atol=0.01) and torch.allclose(numbered[0, 62:64, 64:], torch.tensor(0.5), atol=0.01)
    for corner in (0, 64):
        assert (numbered[0, corner + 16:corner + 48, corner + 16:corner + 48] == 1).any(), "a number in the middle"


def test_lines_name_regions_by_number_list_and_range():
    assert read_lines("3: a lighthouse\n\n# the shore\n 4-6, 9 : wet stones: round ones\n1,2:sky", 9) == {
        3: "a lighthouse", 4: "wet stones: round ones", 5: "wet stones: round ones", 6: "wet stones: round ones", 9: "wet stones: round ones", 1: "sky", 2: "sky"}


def test_several_lines_for_a_region_are_joined_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert read_lines("2: a boat\n1-2: fog", 2) == {1: "fog", 2: "a boat, fog"}
    assert "region 2 has more than one line" in caplog.text


@pytest.mark.parametrize("line, message", [
    ("40: a boat", "expected regions from 1 to 12, got 40 in '40: a boat'"),
    ("0: a boat", "expected regions from 1 to 12, got 0"),
    ("10-13: a boat", "expected regions from 1 to 12, got 10-13"),
    ("5-2: a boat", "expected regions from 1 to 12, got 5-2"),
    ("a boat", "expected a region's number, a colon and its text, like '3: a lighthouse' or '2-5: wet stones', got 'a boat'"),
])
def test_lines_that_cannot_be_followed_are_refused(line, message):
    with pytest.raises(ValueError, match="lines: " + message):
        read_lines(line, 12)


def test_a_line_wins_over_a_caption_and_what_all_share_goes_first():
    assert region_texts(3, "a photo,", "2: a boat", ["sea ", "rock", ""]) == ["a photo, sea", "a photo, a boat", "a photo"]


def test_without_captions_regions_without_a_line_get_what_all_share_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert region_texts(3, "a photo", "2: a boat") == ["a photo", "a photo, a boat", "a photo"]
    assert "regions 1, 3 have no line and no caption" in caplog.text


def test_captions_of_another_number_are_refused():
    with pytest.raises(ValueError, match="captions: expected one for each of 3 regions, got 2"):
        region_texts(3, "", "", ["one", "two"])


def test_regions_of_a_tree_with_leaves_of_many_sizes():
    """A small leaf that is redrawn makes a region of its square, wherever it lies in it."""
    leaves = tuple(Leaf(Rect(top, left, top + 32, left + 32), 32, 0.0, float((top, left) == (96, 160))) for top in range(0, 256, 32) for left in range(0, 256, 32))
    assert plan_regions(Quadtree(256, 256, 32, 32, leaves), 256, 256, 128) == [Rect(0, 128, 128, 256)]


def test_a_caption_that_says_nothing_is_told_and_one_that_is_no_text_refused(caplog):
    caplog.set_level("INFO")
    assert region_texts(3, "dusk", "3: sky", ["", "a boat", " "]) == ["dusk", "dusk, a boat", "dusk, sky"]
    assert "region 1 has no line and no caption" in caplog.text
    with pytest.raises(ValueError, match="captions: expected a text for each region, got NoneType for region 2"):
        region_texts(2, "", "", ["a boat", None])


@pytest.mark.parametrize("number", ["9" * 5000, "0" * 5000 + "1"])
def test_a_number_of_any_length_is_refused_as_others_are(number):
    with pytest.raises(ValueError, match="lines: expected regions from 1 to 12"):
        read_lines(f"{number}: sky", 12)

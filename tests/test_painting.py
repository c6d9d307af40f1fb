"""What is painted on a picture, and what becomes of its tree."""
from __future__ import annotations

import json

import pytest
import torch
from pictures import CROPPED_SIZES, busy_corner, crop_start, cropped_to, layout, strengths_of_pixels

from qtd_pack.painting import edit_quadtree, parse_edits
from qtd_pack.quadtree import Leaf, Quadtree, build_quadtree
from qtd_pack.utils import Rect


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

"""What several rooms need: rectangles, cutting by them, reducing grids."""
from __future__ import annotations

import pytest
import torch

from qtd_pack.utils import Rect, area, blocks, common_part, cut, cut_latent, double, grown, in_units_of, moved_to, pieces, pool, scaled, shrunk, slices

RECT = Rect(3, 5, 10, 21)
GRID = torch.arange(48.0).view(6, 8)


def test_a_rectangle_is_half_open():
    assert (RECT.height, RECT.width, area(RECT)) == (7, 16, 112)
    assert GRID[slices(Rect(1, 2, 3, 4))].tolist() == [[10, 11], [18, 19]]


@pytest.mark.parametrize("other, part", [
    (Rect(0, 0, 5, 30), Rect(3, 5, 5, 21)), (Rect(4, 6, 9, 20), Rect(4, 6, 9, 20)), (Rect(10, 5, 12, 21), None), (Rect(3, 21, 10, 22), None), (Rect(0, 0, 2, 2), None)])
def test_two_rectangles_share_what_lies_in_both(other, part):
    assert common_part(RECT, other) == part == common_part(other, RECT)


def test_rectangles_move_grow_and_change_their_resolution():
    assert moved_to(RECT, Rect(1, 2, 0, 0)) == Rect(2, 3, 9, 19)
    assert grown(RECT, 4, 12, 100) == Rect(0, 1, 12, 25)
    assert scaled(RECT, 8) == Rect(24, 40, 80, 168)
    assert shrunk(RECT, 4) == Rect(0, 1, 3, 6)
    assert shrunk(scaled(RECT, 8), 8) == RECT


@pytest.mark.parametrize("rect, corners", [(Rect(0, 0, 6, 8), (0, 7, 40, 47)), (Rect(-2, 1, 1, 4), (33, 35, 1, 3)), (Rect(2, -3, 4, 2), (21, 17, 29, 25)), (Rect(-1, -1, 1, 1), (47, 40, 7, 0))])
def test_what_begins_before_the_border_begins_at_the_end_and_goes_on_at_the_start(rect, corners):
    found = cut(GRID, rect)
    assert found.shape == (rect.height, rect.width)
    assert (found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]) == corners
    joined = torch.zeros(rect.height, rect.width)
    for here, there in pieces(rect, 6, 8):
        joined[slices(there)] = GRID[slices(here)]
    assert torch.equal(joined, found)


def test_windows_of_a_latent_are_rows_all_images_of_the_first_before_those_of_the_second():
    latent = torch.stack([GRID, GRID + 100])[:, None]
    assert cut_latent(latent, [Rect(0, 0, 1, 1), Rect(5, 7, 6, 8)]).flatten().tolist() == [0, 100, 47, 147]


def test_windows_have_whole_multiples_of_elements_inside_of_what_they_are_taken_from():
    value = torch.zeros(1, 3, 40, 56)
    assert in_units_of(value, [Rect(1, 2, 3, 5)], 8, 8) == [Rect(8, 16, 24, 40)]
    assert in_units_of(value, [Rect(3, 4, 5, 7)], 8, 8, 16) == [Rect(24, 24, 40, 56)]


def test_grids_are_reduced_by_blocks_whose_last_may_be_smaller_and_doubled_back():
    assert blocks(GRID[0], 3, 0).tolist() == [3, 12, 13]
    assert pool(GRID, 4, torch.amax).tolist() == [[27, 31], [43, 47]]
    assert double(torch.tensor([[1, 2], [3, 4]]), torch.zeros(3, 4)).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]

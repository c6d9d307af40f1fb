"""Windows at full strength become one picture, and what is measured of that is what an eye sees."""
from __future__ import annotations

import torch
from conftest import ROOT, load_module

collage = load_module("qtd_collage", ROOT / "benchmarks" / "collage.py")


def found(overlap_px: int, reference: str = "none") -> float:
    return collage.collage_of(collage.Way(256, overlap_px), reference, seeds=2)


def test_windows_that_share_nothing_each_make_up_their_own():
    assert found(0) > 0.3


def test_windows_that_share_half_of_themselves_come_to_agree():
    assert found(128) == 0


def test_windows_that_see_their_part_of_a_clear_reference_agree_with_it():
    assert found(32, "clear") == 0


def test_windows_that_follow_a_look_at_the_whole_agree():
    """Of 512 px, with the default overlap; without the look they are a collage."""
    apart = [collage.collage_of(collage.Way(512, 64, hold_layout=hold), seeds=3) for hold in (0.0, 1.0)]
    assert apart[0] > 0.1 and apart[1] == 0


def test_a_wave_is_found_where_it_begins_and_neighbours_are_compared_around_the_turn():
    wave = collage.waves(64)[3, :, None].expand(16, 64, 64)
    assert collage.phases(wave, 32).tolist() == [[3, 3], [3, 3]]
    assert collage.apart(torch.tensor([[0, 15], [2, 14]])) == 0.25
    assert collage.apart_at_random() == 11 / 16

"""How much, from when: the schedules' contract."""
from __future__ import annotations

import pytest
import torch

from qtd_pack.denoise_schedule import SCHEDULES, eased, progress_at, share_at, txt2img_share_at

STRENGTHS = torch.linspace(0, 1, 101)
PROGRESS = [step / 20 for step in range(21)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_keeps_its_contract(schedule):
    for progress in PROGRESS:
        share = share_at(schedule, STRENGTHS, progress)
        assert share.min() >= 0 and share.max() <= 1
        assert share[0] == 0
        assert share[-1] == 1
        assert bool((share.diff() >= 0).all())


@pytest.mark.parametrize("schedule, strength, shares", [
    ("img2img", 0.5, [0, 0, 1, 1]),
    ("img2img", 0.25, [0, 0, 0, 1]),
    ("img2img", 0.3, [0, 0, 0, 1]),
    ("img2img", 0.2, [0, 0, 0, 0]),
    ("blend", 0.5, [0.5, 0.5, 0.5, 0.5]),
    ("ramp", 0.5, [0.5, 0.625, 0.75, 0.875]),
])
def test_a_leafs_share_at_each_of_four_steps(schedule, strength, shares):
    assert [float(share_at(schedule, torch.tensor([strength]), step / 4)) for step in range(4)] == pytest.approx(shares)


@pytest.mark.parametrize("steps", [1, 3, 7, 8, 20, 50, 1000])
def test_a_strength_of_k_steps_is_sampled_for_k_steps(steps):
    for kept in range(0, steps + 1, max(steps // 20, 1)):
        strength = torch.tensor([kept / steps], dtype=torch.float32)
        assert sum(float(share_at("img2img", strength, step / steps)) for step in range(steps)) == kept


def test_without_an_original_the_velocity_is_slowed_gently_and_whole_on_the_last_step():
    shares = [txt2img_share_at(torch.tensor([0.0, 0.8, 1.0]), step / 4, 4).tolist() for step in range(4)]
    assert torch.allclose(torch.tensor(shares), torch.tensor([[0.7, 0.8, 1.0], [0.8, 13 / 15, 1.0], [0.9, 14 / 15, 1.0], [1.0, 1.0, 1.0]]))
    assert txt2img_share_at(torch.tensor([0.0]), 0.0, 1).tolist() == [1.0]


@pytest.mark.parametrize("sigma, progress", [(1.0, 0.0), (0.8, 0.25), (0.9, 0.125), (0.4, 0.5), (0.2, 0.75), (0.1, 0.875), (0.0, 1.0), (1.3, 0.0)])
def test_progress_is_the_place_in_the_schedule_and_in_between_for_multi_stage_samplers(sigma, progress):
    assert progress_at(sigma, (1.0, 0.8, 0.4, 0.2, 0.0)) == pytest.approx(progress)


def test_a_repeated_sigma_counts_at_its_first_place():
    assert [progress_at(sigma, (1.0, 0.5, 0.5, 0.5, 0.0)) for sigma in (1.0, 0.75, 0.5, 0.25)] == [0.0, 0.125, 0.25, 0.875]


def test_a_sigma_that_was_rounded_on_its_way_is_still_that_step():
    sigmas = tuple(torch.linspace(1, 0, 21, dtype=torch.float64).tolist())
    assert [progress_at(float(torch.tensor(sigma, dtype=torch.float32)), sigmas) for sigma in sigmas[:-1]] == [step / 20 for step in range(20)]


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule: expected one of img2img, blend, ramp, got 'linear'"):
        share_at("linear", STRENGTHS, 0.5)


@pytest.mark.parametrize("strengths, expected", [
    ([0, 0, 1, 1, 1, 1], [0, 0, 0.25, 0.5, 0.75, 1]),
    ([1, 1, 1, 1, 0.5, 0.5], [1, 0.875, 0.75, 0.625, 0.5, 0.5]),
    ([0, 0, 0.5, 0.5, 0, 0], [0, 0, 0.125, 0.125, 0, 0]),
])
def test_strengths_ease_inside_the_leaf_that_changes_more(strengths, expected):
    rows = torch.tensor(strengths, dtype=torch.float32).expand(3, -1)
    assert eased(rows, 4).tolist() == torch.tensor(expected, dtype=torch.float32).expand(3, -1).tolist()
    assert eased(rows.T, 4).T.tolist() == eased(rows, 4).tolist()


def test_easing_over_no_cells_changes_nothing():
    strengths = torch.rand(8, 8)
    assert torch.equal(eased(strengths, 0), strengths)

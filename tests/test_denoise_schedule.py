"""How much, from when: the schedules' contract."""
from __future__ import annotations

import pytest
import torch

from qtd_pack.denoise_schedule import SCHEDULES, eased, on_steps, share_at, txt2img_share_at

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


def steps_of(strength: float, steps: int) -> int:
    value = on_steps("img2img", torch.tensor([strength]), steps)
    return sum(int(share_at("img2img", value, step / steps)) for step in range(steps))


@pytest.mark.parametrize("strength, steps, expected", [
    (0.33, 3, 1), (0.67, 3, 2), (0.17, 6, 1), (0.83, 6, 5), (0.14, 7, 1), (0.13, 8, 1), (0.08, 12, 1), (0.92, 12, 11),
    (191 / 255, 8, 6), (191 / 255, 4, 3), (127 / 255, 2, 1), (128 / 255, 2, 1), (85 / 255, 3, 1), (170 / 255, 3, 2), (64 / 255, 4, 1), (0.749, 8, 6), (0.753, 8, 6),
    (0.5, 1, 0), (0.99, 1, 0), (1.0, 1, 1), (0.0, 8, 0), (0.001, 100, 0),
])
def test_a_strength_that_was_typed_or_painted_has_the_steps_that_were_meant(strength, steps, expected):
    assert steps_of(strength, steps) == expected


@pytest.mark.parametrize("steps", range(1, 51))
def test_every_number_of_steps_can_be_typed_in_hundredths_and_painted_in_8_bits(steps):
    for wanted in range(steps + 1):
        assert steps_of(round(wanted / steps, 2), steps) == wanted
        assert steps_of(round(255 * wanted / steps) / 255, steps) == wanted
        assert steps_of(round(255 * round(wanted / steps, 2)) / 255, steps) in ([wanted] if steps <= 25 else [wanted - 1, wanted])


@pytest.mark.parametrize("strength, steps, expected", [(0.33, 20, 6), (0.3, 4, 1), (0.49, 20, 9), (0.04, 20, 0), (0.6, 8, 4), (0.7, 3, 2), (0.65, 3, 1), (0.73, 8, 5), (0.333, 4, 1)])
def test_a_strength_between_two_steps_has_the_fewer(strength, steps, expected):
    assert steps_of(strength, steps) == expected


@pytest.mark.parametrize("steps", [1, 3, 8, 20, 100])
def test_meant_strengths_keep_their_order_and_their_ends(steps):
    found = on_steps("img2img", torch.linspace(0, 1, 4097), steps)
    assert found[0] == 0 and found[-1] == 1 and bool((found.diff() >= 0).all())
    assert (found - torch.linspace(0, 1, 4097)).abs().max() < 0.25 / steps + 1e-4


@pytest.mark.parametrize("schedule", ["blend", "ramp"])
def test_blend_and_ramp_use_every_strength_as_it_is(schedule):
    assert torch.equal(on_steps(schedule, STRENGTHS, 8), STRENGTHS)

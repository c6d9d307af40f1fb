"""How far a sampler is, whatever it tells."""
from __future__ import annotations

import pytest
import torch

from qtd_pack.clock import Clock, falling_part, progress_at

FALLING = (1.0, 0.8, 0.5, 0.3, 0.0)
ANYTHING = torch.zeros(1, 4, 8, 8)

@pytest.mark.parametrize("sigma, progress", [(1.0, 0.0), (0.8, 0.25), (0.9, 0.125), (0.4, 0.5), (0.2, 0.75), (0.1, 0.875), (0.0, 1.0), (1.3, 0.0)])
def test_progress_is_the_place_in_the_schedule_and_in_between_for_multi_stage_samplers(sigma, progress):
    assert progress_at(sigma, (1.0, 0.8, 0.4, 0.2, 0.0)) == pytest.approx(progress)


def test_a_repeated_sigma_counts_at_its_first_place():
    assert [progress_at(sigma, (1.0, 0.5, 0.5, 0.5, 0.0)) for sigma in (1.0, 0.75, 0.5, 0.25)] == [0.0, 0.125, 0.25, 0.875]


@pytest.mark.parametrize("sigmas, begins", [
    ((1.0, 0.5, 0.5, 0.5, 0.0), [0.0, 0.25, 0.5, 0.75]), ((1.0, 1.0, 0.5, 0.0), [0.0, 1 / 3, 2 / 3]), ((0.0, 1.0, 0.5, 0.5, 0.0), [0.0, 0.0, 1 / 3, 2 / 3]),
])
@pytest.mark.parametrize("calls_back", [True, False])
def test_steps_of_a_repeated_sigma_are_steps_like_all_others(sigmas, begins, calls_back):
    clock, found = Clock(sigmas, falling_part(sigmas)), []
    for step, sigma in enumerate(sigmas[:-1]):
        found.append(clock.call(sigma, ANYTHING))
        if calls_back:
            clock.callback(step, len(sigmas) - 1)
    assert found == pytest.approx(begins) and clock.at_end


@pytest.mark.parametrize("part, begins", [((1.0, 0.5, 0.5), [0, 0.25]), ((0.5, 0.5, 0.0), [0.5, 0.75]), ((0.5, 0.0), [0.75])])
def test_a_part_of_a_schedule_with_a_repeated_sigma_has_its_own_steps(part, begins):
    clock = Clock(part, (1.0, 0.5, 0.5, 0.5, 0.0))
    assert [clock.call(sigma, ANYTHING) for sigma in part[:-1]] == begins


def test_a_sigma_that_was_rounded_on_its_way_is_still_that_step():
    sigmas = tuple(torch.linspace(1, 0, 21, dtype=torch.float64).tolist())
    assert [progress_at(float(torch.tensor(sigma, dtype=torch.float32)), sigmas) for sigma in sigmas[:-1]] == [step / 20 for step in range(20)]


@pytest.mark.parametrize("sigmas, expected", [
    ((0.0, 1.0, 0.5, 0.0), (1.0, 0.5, 0.0)), ((0.2, 0.4, 1.0, 0.5, 0.0), (1.0, 0.5, 0.0)), ((1.0, 0.5, 0.0), (1.0, 0.5, 0.0)),
    ((0.0, 0.5, 1.0), (0.0, 0.5, 1.0)), ((1.0, 1.0, 0.5), (1.0, 1.0, 0.5)), ((0.0,), (0.0,)), ((), ()),
])
def test_a_schedule_begins_at_its_largest_sigma(sigmas, expected):
    assert falling_part(sigmas) == expected


def test_a_clock_without_callbacks_goes_by_the_sigmas_and_never_back():
    clock = Clock(FALLING, FALLING)
    assert [clock.call(sigma, ANYTHING) for sigma in (1.0, 0.9, 0.8, 0.9, 0.5, 0.42)] == pytest.approx([0, 0.125, 0.25, 0.25, 0.5, 0.6])
    assert not clock.at_end
    clock.call(0.3, ANYTHING)
    assert clock.at_end


def test_a_clock_goes_by_the_steps_that_it_is_told():
    clock, found = Clock(FALLING, FALLING), []
    for step, sigma in enumerate((0.9, 0.9, 0.4, 0.33)):
        found.append(clock.call(sigma, ANYTHING))
        clock.callback(step, 4)
    assert found[0] == 0 and found[2:] == [0.5, 0.75] and clock.at_end


def test_a_clock_of_a_part_of_the_schedule_begins_where_the_part_does():
    clock = Clock(FALLING[2:], FALLING)
    assert [clock.call(sigma, ANYTHING) for sigma in (0.5, 0.3)] == [0.5, 0.75]


def test_a_clock_that_cannot_follow_the_steps_goes_by_the_sigmas():
    clock = Clock(FALLING, FALLING)
    found = []
    for step, sigma in enumerate((1.0, 1.0, 1.0, 1.0, 0.5, 0.3)):
        found.append(clock.call(sigma, ANYTHING))
        clock.callback(step, 4)
    assert found == sorted(found) and found[-1] == 0.75


def test_a_sampler_that_calls_back_at_the_end_of_steps_is_followed_when_it_stops_to_tell_other_sigmas():
    """Two calls a step; the first step is told a tenth less noise than the schedule has, the others are not."""
    clock, found = Clock(FALLING, FALLING), []
    for step, told in enumerate(((0.9, 0.85), (0.8, 0.65), (0.5, 0.4))):
        found += [clock.call(sigma, ANYTHING) for sigma in told]
        clock.callback(step, 4)
    assert found[0::2] == [0.0, 0.25, 0.5]

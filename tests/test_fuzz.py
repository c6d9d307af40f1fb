"""A share of the seeded cases: `run.py bench reliability fuzz` tries 10,000 others."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
from fuzz_plans import PlanCase, check_plan_case, draw_plan_case
from fuzz_runs import RunCase, check_run_case, draw_run_case
from fuzzing import Broken, Unproven, changed, failure, hold, smallest

FIRST = 100_000

# What torchsde says of schedules that repeat or rise.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t")


def assert_all_hold(draw, check, seeds) -> int:
    """How many cases proved something; fails with the smallest case that breaks."""
    proven = 0
    for seed in seeds:
        case = draw(seed)
        try:
            check(case)
            proven += 1
        except Unproven:
            continue
        except Exception:
            least = smallest(case, check, tries=60)
            pytest.fail(f"seed {seed}: {changed(least)}: {failure(least, check)}")
    return proven


@pytest.mark.parametrize("block", range(4))
def test_trees_and_plans_of_all_kinds_hold(block):
    first = FIRST + 30 * block
    assert assert_all_hold(draw_plan_case, check_plan_case, range(first, first + 30)) == 30


@pytest.mark.parametrize("block", range(4))
def test_sampling_runs_of_all_kinds_hold(block):
    first = FIRST + 8 * block
    assert assert_all_hold(draw_run_case, check_run_case, range(first, first + 8)) >= 6


@dataclass(frozen=True)
class Sums:
    numbers: tuple = ()
    limit: int = 10
    name: str = ""


def no_sum_above_its_limit(case: Sums) -> None:
    hold(sum(case.numbers) <= case.limit, f"sums stay below the limit: {sum(case.numbers)}")


def test_a_case_that_breaks_is_made_smaller_until_nothing_can_be_left_out():
    case = Sums((3, 30, 5, 40), 25, "long")
    assert smallest(case, no_sum_above_its_limit) == Sums((40,), 10)
    assert failure(Sums((40,)), no_sum_above_its_limit) == "Broken: sums stay below the limit: 40"
    assert changed(Sums((40,))) == "Sums(numbers=(40,))"


def test_a_smaller_case_fails_in_the_same_way():
    def check(case: Sums) -> None:
        if len(case.numbers) == 3:
            raise ZeroDivisionError("three")
        no_sum_above_its_limit(case)

    assert smallest(Sums((30, 1, 30)), check) == Sums((30, 1, 30))


def test_what_the_host_cannot_do_alone_is_no_failure():
    def check(case: Sums) -> None:
        raise Unproven("the host cannot add")

    assert failure(Sums(), check) is None
    with pytest.raises(Broken, match="^three$"):
        hold(False, "three")


@pytest.mark.parametrize("case", [
    # Found by the fuzz, made small: two windows as long as a ring were not tried where many small ones cost more.
    PlanCase(height=68, min_denoise=0.7, scale=2.0, max_window=568, overlap=8, wrap="both", text=512, schedule="img2img", steps=20),
    # A square that is a cell shorter than the latent was no window among rectangles.
    PlanCase(
        source="photo", width=289, edits=((-5.0, 7.0, 110.0, 1.0),), cell_px=1, patch=2, scale=2.051087937165268, max_window=3840, overlap=56,
        shapes="tight", method="Mixture of Diffusers", text=77, steps=20),
])
def test_plans_that_once_broke_hold(case):
    check_plan_case(case)


def test_a_run_that_only_fails_with_the_patch_is_found():
    """The checks are no empty words: a kept cell that was moved by a hair is seen."""
    import fuzz_runs

    case = RunCase(levels=(0.0, 1.0), cols=16)
    check_run_case(case)
    scene = fuzz_runs.scene_of(case)
    out, seen = fuzz_runs.run(scene, {}, fuzz_runs.echo)
    with pytest.raises(Broken, match="kept cells are the original's"):
        fuzz_runs.check_kept(scene, out + 1e-7, seen)
    seen.cells += 1
    with pytest.raises(Broken, match="the model sees the cells that are planned"):
        fuzz_runs.check_counts(case, seen)

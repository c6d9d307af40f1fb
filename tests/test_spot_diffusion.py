"""SpotDiffusion on the host's samplers: where its windows are at every step. The windows of a plan: test_windows.py."""
from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import SIDE_PX, even_tree, load, patched, sample, striped_tree
from tiny_models import recorded

from qtd_pack.utils import Rect
from qtd_pack.blending import SHIFTS

SPOT = dict(method="SpotDiffusion", min_window=128, max_window=128)


@pytest.fixture
def model():
    return load("flux_schnell")


def watched(patcher) -> tuple[object, list[tuple[torch.Tensor, torch.Tensor, list]]]:
    """A clone, and what it did: for each prediction sigma, x, and its calls of the model."""
    clone, calls = recorded(patcher)
    steps = []

    def beside(executor, x, sigma, *args, **kwargs):
        before = len(calls)
        denoised = executor(x, sigma, *args, **kwargs)
        steps.append((float(sigma[0]), x.clone(), calls[before:]))
        return denoised

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watched", beside)
    return clone, steps


def place_of(part: torch.Tensor, whole: torch.Tensor) -> Rect:
    """Where a window was cut from; fails if its cells do not lie together anywhere."""
    height, width = part.shape[-2:]
    for top, left in (whole[0, 0] == part[0, 0, 0, 0]).nonzero().tolist():
        if torch.equal(whole[..., top:top + height, left:left + width], part):
            return Rect(top, left, top + height, left + width)
    raise AssertionError("the window's cells are not side by side in the latent")


def places(x: torch.Tensor, calls: list) -> frozenset[Rect]:
    return frozenset(place_of(row, x) for call in calls for row in call.x.split(1))


def places_per_step(model, patcher, **options) -> list[frozenset[Rect]]:
    clone, steps = watched(patcher)
    sample(model, clone, **options)
    return [places(x, calls) for _, x, calls in steps]


@pytest.mark.parametrize("shift_method", SHIFTS)
def test_windows_move_at_every_step_and_never_wrap_round_the_border(model, shift_method):
    steps = places_per_step(model, patched(model, even_tree(1.0), shift_method=shift_method, **SPOT), steps=6)
    assert len(set(steps)) > 3
    for windows in steps:
        assert all(rect.height == rect.width == 16 and rect.top % 2 == rect.left % 2 == 0 for rect in windows)
        covered = torch.zeros(32, 32)
        for rect in windows:
            covered[rect.top:rect.bottom, rect.left:rect.right] += 1
        assert covered.min() == 1


def test_each_cell_comes_from_one_window(model):
    """A model that answers with the window's mean: neighbours of one window get one value, and nothing is blended."""
    patcher, calls = recorded(patched(model, even_tree(1.0), **SPOT))

    def mean(executor, x, *args, **kwargs):
        executor(x, *args, **kwargs)
        return x.mean((-2, -1), keepdim=True).expand_as(x)

    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "mean", mean)
    out = model.patcher.model.process_latent_in(sample(model, patcher, steps=1))
    means = torch.cat([call.x.mean((-2, -1)) for call in calls])
    nearest = (out[0].flatten(1).T[:, None] - means).abs().amax(-1).amin(-1)
    assert len(means) >= 4 and nearest.max() < 1e-4


def test_conditionings_move_with_the_windows():
    model = load("flux_fill")
    whole, calls = recorded(model.patcher)
    sample(model, whole, steps=1)
    canvas = calls[0].c_concat
    clone, steps = watched(patched(model, even_tree(1.0), **SPOT))
    sample(model, clone, steps=3)
    for _, x, calls in steps:
        for call in calls:
            for row, concat in zip(call.x.split(1), call.c_concat.split(1)):
                rect = place_of(row, x)
                assert torch.equal(concat, canvas[..., rect.top:rect.bottom, rect.left:rect.right])


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "seeds_3", "res_multistep", "dpmpp_3m_sde"])
def test_stages_of_a_step_see_the_same_windows(model, sampler):
    clone, steps = watched(patched(model, even_tree(1.0), **SPOT))
    sample(model, clone, steps=6, sampler=sampler)
    sigmas, by_step = steps[0][2][0].transformer_options["sample_sigmas"].tolist(), {}
    for sigma, x, calls in steps:
        step = max(number for number, begin in enumerate(sigmas) if sigma <= begin * (1 + 1e-4))
        by_step.setdefault(step, set()).add(places(x, calls))
    assert sorted(by_step) == [0, 1, 2, 3, 4, 5]
    assert {len(windows) for windows in by_step.values()} == {1}


def test_repeated_sigmas_are_sampled_and_see_the_same_windows(model):
    clone, steps = watched(patched(model, even_tree(1.0), **SPOT))
    latent = model.latent(SIDE_PX, SIDE_PX)
    noise = comfy.sample.prepare_noise(latent, 5)
    out = comfy.sample.sample_custom(
        clone, noise, 1.0, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.8, 0.8, 0.8, 0.4, 0.0]),
        model.positive(SIDE_PX, SIDE_PX), model.negative(SIDE_PX, SIDE_PX), latent, disable_pbar=True)
    assert out.isfinite().all()
    assert [sigma for sigma, _, _ in steps] == pytest.approx([1.0, 0.8, 0.8, 0.8, 0.4])
    assert len({places(x, calls) for sigma, x, calls in steps if sigma == steps[1][0]}) == 1


def test_a_longer_run_after_a_shorter_one_has_a_plan_of_its_own(model):
    patcher = patched(model, even_tree(1.0), **SPOT)
    short = sample(model, patcher, steps=3)
    long = sample(model, patcher, steps=12)
    assert torch.equal(long, sample(model, patched(model, even_tree(1.0), **SPOT), steps=12))
    assert torch.equal(short, sample(model, patcher, steps=3))


def test_the_seed_of_the_windows_is_their_own(model):
    """They neither follow the sampler's seed nor take from the random numbers that samplers draw."""
    noise = comfy.sample.prepare_noise(model.latent(SIDE_PX, SIDE_PX), 5)
    first, again, other = (
        places_per_step(model, patched(model, even_tree(1.0), seed=seed, **SPOT), noise=noise, noise_seed=noise_seed)
        for seed, noise_seed in ((1, 5), (1, 6), (2, 5)))
    assert first == again
    assert first != other
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample(model, patched(model, even_tree(1.0), **SPOT), noise=noise)
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_without_anything_active_are_not_run(model):
    """One leaf of 64 px is active: one window of 128 px holds it wherever the grid is, or at a border of it two or four."""
    tree = striped_tree(0.0, 1.0, 0.0, 0.0, leaf=64)
    clone, steps = watched(patched(model, tree, **SPOT))
    sample(model, clone, steps=6)
    for _, x, calls in steps:
        assert all(rect.left < 16 and rect.right > 8 for rect in places(x, calls))
        assert sum(len(call.x) for call in calls) <= 6
    assert len({places(x, calls) for _, x, calls in steps}) > 1


def test_strengths_stay_where_the_picture_is(model):
    latent = model.latent(SIDE_PX, SIDE_PX)
    tree = striped_tree(0.0, 1.0, 0.0, 1.0, leaf=64)
    outs = [sample(model, patched(model, tree, shift_method=method, seed=seed, **SPOT), latent) for method in SHIFTS for seed in (0, 1)]
    for out in outs:
        assert torch.equal(out[..., 0:8], latent[..., 0:8]) and torch.equal(out[..., 16:24], latent[..., 16:24])
        assert (out - latent).abs().amax((0, 1))[:, [8, 15, 24, 31]].min() > 0

"""Samplers and wrappers that behave like other packs': they tell the model another sigma, stop early, count in other ways."""
from __future__ import annotations

import logging
import math

import comfy.k_diffusion.sampling as k_diffusion
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import SIDE_PX, even_tree, load, patched, sample, striped_tree, with_prediction

FAMILIES = ["flux_schnell", "sd15", "wan21_t2v"]
every_family = pytest.mark.parametrize("name", FAMILIES)

STEPS = 8
LEAVES = tuple(step / STEPS for step in range(1, STEPS + 1))


class Telling:
    """A model that is told f(sigma) in place of sigma, and keeps what it gives back."""

    def __init__(self, model, tell):
        self.model, self.tell, self.denoised = model, tell, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, sigma, **kwargs):
        self.denoised.append(self.model(x, sigma * self.tell(float(sigma[0])), **kwargs))
        return self.denoised[-1]


def telling(name: str, tell=lambda sigma: 1.0, seen=None, calls_back="as the host"):
    """One of the host's samplers that tells the model tell(sigma) * sigma. seen: is given (step, denoised of its first call)."""

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model, late = Telling(model, tell), []

        def told(info):
            if seen is not None:
                seen.append((info["i"], info["denoised"].clone()))
            late.append(info)
            if calls_back == "a step late" and len(late) > 1:
                callback(late[-2])
            if calls_back == "as the host":
                callback(info)
        return getattr(k_diffusion, f"sample_{name}")(model, x, sigmas, extra_args=extra_args, callback=told, disable=True)

    return comfy.samplers.KSAMPLER(function)


def sigmas_of(model, steps: int = STEPS) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.patcher.get_model_object("model_sampling"), "simple", steps)


def sampled(model, patcher, sampler, sigmas=None, *, latent=None, noise=None, callback=None):
    latent = model.latent(SIDE_PX, SIDE_PX) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, 5) if noise is None else noise
    return comfy.sample.sample_custom(
        patcher, noise, 1.0, sampler, sigmas_of(model) if sigmas is None else sigmas, model.positive(SIDE_PX, SIDE_PX),
        model.negative(SIDE_PX, SIDE_PX), latent, callback=callback, disable_pbar=True)


def leaves(model, **settings):
    """The model with a leaf for each number of steps, in columns of 32 px, towards a picture that is not the original."""
    return with_prediction(patched(model, striped_tree(*LEAVES, leaf=32), **settings), lambda x, sigma: torch.full_like(x, 7.0))


def assert_every_leaf_has_its_steps(model, seen, steps=STEPS) -> None:
    """The last k of the steps, and no others."""
    assert [step for step, _ in seen] == list(range(steps))
    cell = 32 // model.cell_px
    active = torch.stack([denoised[0, 0, ..., 2, cell // 2::cell].reshape(-1, STEPS)[0] - 7.0 for _, denoised in seen]).abs() < 1e-4
    assert active.sum(0).tolist() == [round(strength * steps) for strength in LEAVES]
    assert bool((active.int().diff(dim=0) >= 0).all())


def varying(sigmas, factors):
    """A factor for each step of the schedule."""
    return lambda sigma: factors[min(range(len(sigmas) - 1), key=lambda step: abs(float(sigmas[step]) - sigma)) % len(factors)]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "lms"])
@pytest.mark.parametrize("factor", [1.0, 0.95, 1.05, 0.8, 1.3])
@every_family
def test_a_sampler_that_tells_another_sigma_gives_every_leaf_its_steps(name, factor, sampler):
    model, seen = load(name), []
    sampled(model, leaves(model), telling(sampler, lambda sigma: factor, seen))
    assert_every_leaf_has_its_steps(model, seen)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "res_multistep"])
@pytest.mark.parametrize("factors", [(1.0, 1.05), (1.1, 0.9, 1.0), (0.8, 0.95, 1.1, 1.2), (1.0, 1.0, 0.7)])
@every_family
def test_a_sigma_that_is_told_otherwise_from_step_to_step_does_not_matter(name, factors, sampler):
    model, seen = load(name), []
    sampled(model, leaves(model), telling(sampler, varying(sigmas_of(model), factors), seen))
    assert_every_leaf_has_its_steps(model, seen)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "seeds_3", "heunpp2", "sa_solver_pece"])
@pytest.mark.parametrize("factor", [1.0, 0.95, 1.05])
@every_family
def test_samplers_of_several_stages_begin_a_leaf_with_its_step(name, factor, sampler):
    """The stage at a step's end may have begun it, but no stage before."""
    model, seen = load(name), []
    sampled(model, leaves(model), telling(sampler, lambda sigma: factor, seen))
    assert_every_leaf_has_its_steps(model, seen)


@pytest.mark.parametrize("sampler, factor, calls_back", [
    ("euler", 1.0, "never"), ("euler", 0.95, "never"), ("heun", 1.05, "never"), ("dpm_2", 1.0, "never"), ("euler", 1.0, "a step late")])
@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
def test_a_sampler_that_calls_back_late_or_never_gives_every_leaf_its_steps(name, calls_back, factor, sampler):
    model, seen = load(name), []
    sampled(model, leaves(model), telling(sampler, lambda sigma: factor, seen, calls_back=calls_back))
    assert_every_leaf_has_its_steps(model, seen)


@pytest.mark.parametrize("factors, every", [((1.0,), 1), ((0.9,), 1), ((1.0, 1.1, 0.9), 1), ((1.0,), 3), ((0.9,), 3)])
@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
def test_a_sampler_of_two_stages_that_calls_back_at_a_steps_end_or_now_and_then(name, every, factors):
    model, seen = load(name), []

    def midpoint(net, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones(len(x))
        for step in range(len(sigmas) - 1):
            here, below, factor = sigmas[step], sigmas[step + 1], factors[step % len(factors)]
            denoised = net(x, here * factor * ones, **extra_args)
            seen.append((step, denoised.clone()))
            middle = (here + below) / 2
            half = denoised + (x - denoised) * middle / here
            second = net(half, middle * factor * ones, **extra_args)
            x = second + (x - second) * below / here
            if step % every == every - 1:
                callback({"i": step, "denoised": second, "x": x})
        return x
    sampled(model, leaves(model), comfy.samplers.KSAMPLER(midpoint))
    assert_every_leaf_has_its_steps(model, seen)


@every_family
def test_the_progress_of_a_run_never_falls(name):
    model, seen = load(name), []
    for sampler in ("dpm_2_ancestral", "dpm_adaptive", "heunpp2", "dpm_fast"):
        clone = leaves(model, schedule="ramp")
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", lambda executor, *args: (seen.append(run_of(args[-1]).progress), executor(*args))[1])
        seen.clear()
        sampled(model, clone, comfy.samplers.sampler_object(sampler))
        assert seen == sorted(seen) and seen[0] == 0 and seen[-1] > 0.7


def run_of(model_options):
    return model_options["transformer_options"]["quadtree_tiled_diffusion"]

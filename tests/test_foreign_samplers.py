"""Samplers and wrappers that behave like other packs': they tell the model another sigma, stop early, count in other ways."""
from __future__ import annotations

import logging

import comfy.k_diffusion.sampling as k_diffusion
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import SIDE_PX, even_tree, load, patched, striped_tree, with_prediction

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


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("factor", [0.95, 1.05, 0.8])
@every_family
def test_a_sampler_that_tells_another_sigma_gives_every_leaf_its_steps(name, factor, sampler):
    model, seen = load(name), []
    sampled(model, leaves(model), telling(sampler, lambda sigma: factor, seen))
    assert_every_leaf_has_its_steps(model, seen)


@pytest.mark.parametrize("sampler", ["euler", "res_multistep"])
@pytest.mark.parametrize("factors", [(1.0, 1.05), (0.8, 0.95, 1.1, 1.2), (1.0, 1.0, 0.7)])
@every_family
def test_a_sigma_that_is_told_otherwise_from_step_to_step_does_not_matter(name, factors, sampler):
    model, seen = load(name), []
    sampled(model, leaves(model), telling(sampler, varying(sigmas_of(model), factors), seen))
    assert_every_leaf_has_its_steps(model, seen)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "seeds_3", "heunpp2", "sa_solver_pece"])
@pytest.mark.parametrize("factor", [1.0, 0.95])
@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
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
@pytest.mark.parametrize("place", [0.5, 1.0], ids=["midpoint", "heun"])
@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
def test_a_sampler_of_two_stages_that_calls_back_at_a_steps_end_or_now_and_then(name, place, every, factors):
    model, seen = load(name), []

    def two_stages(net, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones(len(x))
        for step in range(len(sigmas) - 1):
            here, below, factor = sigmas[step], sigmas[step + 1], factors[step % len(factors)]
            denoised = net(x, here * factor * ones, **extra_args)
            seen.append((step, denoised.clone()))
            middle = here + (below - here) * place
            second = net(denoised + (x - denoised) * middle / here, middle * factor * ones, **extra_args) if middle > 0 else denoised
            x = second + (x - second) * below / here
            if step % every == every - 1:
                callback({"i": step, "denoised": second, "x": x})
        return x
    sampled(model, leaves(model), comfy.samplers.KSAMPLER(two_stages))
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


def log_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("qtd_pack") and record.levelno == logging.WARNING]


def stopping_after(steps: int, calls_back=True):
    """A sampler that returns what it has after some steps, noise and all, although its sigmas end in 0."""
    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return k_diffusion.sample_euler(model, x, sigmas[:steps + 1], extra_args=extra_args, callback=callback if calls_back else None, disable=True)
    return comfy.samplers.KSAMPLER(function)


class StoppingClass(comfy.samplers.Sampler):
    """The same, as a sampler class of its own."""

    def __init__(self, steps: int):
        self.steps = steps

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        scale = model_wrap.inner_model.model_sampling.noise_scaling
        x = scale(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        for step in range(self.steps):
            denoised = model_wrap(x, sigmas[step] * x.new_ones(len(x)), **extra_args)
            x = denoised + (x - denoised) * sigmas[step + 1] / sigmas[step]
        return x


stopped = pytest.mark.parametrize("sampler", [stopping_after, lambda steps: stopping_after(steps, calls_back=False), StoppingClass], ids=["function", "no callback", "class"])


@pytest.mark.parametrize("steps", [1, STEPS - 1])
@stopped
@every_family
def test_a_sampler_that_stops_early_keeps_its_noise_where_the_strength_is_0(name, sampler, steps, caplog):
    model = load(name)
    latent, sigmas = model.latent(SIDE_PX, SIDE_PX), sigmas_of(model)
    noise = comfy.sample.prepare_noise(latent, 5)
    out = sampled(model, patched(model, striped_tree(0.0, 1.0)), sampler(steps), latent=latent, noise=noise)
    sampling, process = model.patcher.get_model_object("model_sampling"), model.patcher.model.process_latent_in
    expected = sampling.noise_scaling(sigmas[steps], noise.clone(), process(latent))
    half = SIDE_PX // model.cell_px // 2
    assert (process(out) - expected)[..., :half].abs().max() < 0.02 * float(sigmas[steps])
    assert (process(out) - process(latent))[..., :half].std() > 0.5 * float(sigmas[steps])
    assert len([line for line in log_lines(caplog) if "ended before its last step" in line]) == 1


@stopped
@every_family
def test_a_sampler_that_runs_to_its_end_is_restored(name, sampler, caplog):
    model = load(name)
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sampled(model, patched(model, striped_tree(0.0, 1.0)), sampler(STEPS), latent=latent)
    half = SIDE_PX // model.cell_px // 2
    assert torch.equal(out[..., :half], latent[..., :half])
    assert log_lines(caplog) == []


def chained(first: str, second: str, at: int, counted_from_0=True):
    """One sampler for the first steps, another for the rest, in one run."""
    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for name, part, start in ((first, sigmas[:at + 1], 0), (second, sigmas[at:], at)):
            def told(info, start=start):
                callback({**info, "i": info["i"] + (0 if counted_from_0 else start)})
            x = getattr(k_diffusion, f"sample_{name}")(model, x, part, extra_args=extra_args, callback=told, disable=True)
        return x
    return comfy.samplers.KSAMPLER(function)


class ChainOfSamplers(comfy.samplers.Sampler):
    """Two samplers in one run, each with its part of the sigmas: the second goes on without noise."""

    def __init__(self, at: int):
        self.at = at

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        euler = comfy.samplers.sampler_object("euler")
        x = euler.sample(model_wrap, sigmas[:self.at + 1], extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        return euler.sample(model_wrap, sigmas[self.at:], extra_args, callback, torch.zeros_like(noise), x, denoise_mask, disable_pbar)


@pytest.mark.parametrize("sampler", [
    chained("euler", "euler", 4), chained("euler", "euler", 1), chained("euler", "euler", 3, counted_from_0=False), ChainOfSamplers(3), ChainOfSamplers(1)],
    ids=["half", "after one step", "counted on", "class", "class, after one step"])
@every_family
def test_a_chain_of_samplers_in_one_run_is_one_sampler(name, sampler, caplog):
    model = load(name)
    tree = striped_tree(*LEAVES, leaf=32)
    latent = model.latent(SIDE_PX, SIDE_PX)
    one = sampled(model, patched(model, tree), comfy.samplers.sampler_object("euler"), latent=latent)
    out = sampled(model, patched(model, tree), sampler, latent=latent)
    assert (out - one).abs().max() < 1e-4 * latent.std()
    assert log_lines(caplog) == []


def stages_in_a_wrapper(kind):
    """A wrapper that samples in two stages: the second starts without noise from what the first has left."""
    def outer(executor, noise, latent, sampler, sigmas, *args, **kwargs):
        half = executor(noise, latent, sampler, sigmas[:4], *args, **kwargs)
        return executor(torch.zeros_like(noise), half, sampler, sigmas[3:], *args, **kwargs)

    def inner(executor, guider, sigmas, extra_args, callback, noise, latent, *args, **kwargs):
        half = executor(guider, sigmas[:4], extra_args, callback, noise, latent, *args, **kwargs)
        return executor(guider, sigmas[3:], extra_args, callback, torch.zeros_like(noise), half, *args, **kwargs)

    return outer if kind == WrappersMP.OUTER_SAMPLE else inner


def with_wrapper(model, tree, kind, wrapper, before: bool, **settings):
    """The patched model with another node's wrapper, which came before or after ours."""
    if before:
        patcher = model.patcher.clone()
        patcher.add_wrapper_with_key(kind, "foreign", wrapper)
        return patched(type(model)(model.name, model.family, patcher), tree, **settings)
    patcher = patched(model, tree, **settings)
    patcher.add_wrapper_with_key(kind, "foreign", wrapper)
    return patcher


before_and_after = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
both_kinds = pytest.mark.parametrize("kind", [WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE])


@both_kinds
@before_and_after
@every_family
def test_a_wrapper_that_samples_in_two_stages_knows_the_original(name, before, kind, caplog):
    model = load(name)
    tree = striped_tree(0.0, *LEAVES[1:], leaf=32)
    latent = model.latent(SIDE_PX, SIDE_PX)
    one = sampled(model, patched(model, tree), comfy.samplers.sampler_object("euler"), latent=latent)
    out = sampled(model, with_wrapper(model, tree, kind, stages_in_a_wrapper(kind), before), comfy.samplers.sampler_object("euler"), latent=latent)
    assert torch.equal(out[..., :32 // model.cell_px], latent[..., :32 // model.cell_px])
    assert (out - one).abs().max() < 1e-3 * latent.std()
    assert log_lines(caplog) == []


def giving_denoised(kind):
    """A wrapper that gives back what the sampler's callback was given last in place of the samples."""
    def outer(executor, noise, latent, sampler, sigmas, mask=None, callback=None, *args, **kwargs):
        kept, model = [], executor.class_obj.model_patcher.model
        executor(noise, latent, sampler, sigmas, mask, lambda step, denoised, *rest: kept.append(denoised), *args, **kwargs)
        return model.process_latent_out(kept[-1])

    def inner(executor, guider, sigmas, extra_args, callback, *args, **kwargs):
        kept = []
        executor(guider, sigmas, extra_args, lambda step, denoised, *rest: kept.append(denoised), *args, **kwargs)
        return kept[-1]

    return outer if kind == WrappersMP.OUTER_SAMPLE else inner


@both_kinds
@before_and_after
@pytest.mark.parametrize("last", [STEPS, 5], ids=["to the end", "with leftover noise"])
@every_family
def test_a_wrapper_that_gives_back_denoised_keeps_what_is_kept_exactly(name, last, before, kind):
    model = load(name)
    latent = model.latent(SIDE_PX, SIDE_PX)
    patcher = with_wrapper(model, striped_tree(0.0, 1.0), kind, giving_denoised(kind), before)
    out = sampled(model, patcher, comfy.samplers.sampler_object("euler"), sigmas_of(model)[:last + 1], latent=latent)
    half = SIDE_PX // model.cell_px // 2
    assert torch.equal(out[..., :half], latent[..., :half])
    assert (out - latent)[..., half:].abs().mean() > 0.1 * latent.std()


def resampling(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Is passed a 0 before its sigmas, and samples with what comes after it."""
    assert float(sigmas[0]) == 0
    return k_diffusion.sample_euler(model, x, sigmas[1:], extra_args=extra_args, callback=callback, disable=True)


def resampling_by_their_numbers(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The same, and it calls back with the number that a step has in all sigmas."""
    return k_diffusion.sample_euler(model, x, sigmas[1:], extra_args=extra_args, callback=lambda info: callback({**info, "i": info["i"] + 1}), disable=True)


def evaluating_the_0(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The same, and its first step is to ask the model at sigma 0."""
    callback({"i": 0, "x": x, "denoised": model(x, sigmas[0] * x.new_ones(len(x)), **extra_args)})
    return resampling_by_their_numbers(model, x, sigmas, extra_args, callback)


@pytest.mark.parametrize("function", [resampling, resampling_by_their_numbers, evaluating_the_0])
@pytest.mark.parametrize("tell", [1.0, 0.9])
@every_family
def test_a_0_in_front_of_the_sigmas_takes_no_step_from_a_leaf(name, tell, function):
    model, seen = load(name), []
    sigmas = sigmas_of(model)

    def sampler(net, x, sigmas, extra_args=None, callback=None, disable=None):
        def told(info):
            if function is not evaluating_the_0 or info["i"] > 0:
                seen.append((len(seen), info["denoised"].clone()))
            callback(info)
        return function(Telling(net, lambda sigma: tell), x, sigmas, extra_args, told)
    out = sampled(model, leaves(model), comfy.samplers.KSAMPLER(sampler), torch.cat([torch.zeros(1), sigmas]))
    assert_every_leaf_has_its_steps(model, seen)
    assert out.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun"])
@pytest.mark.parametrize("repeated", [[0, 1, 2], [2, 3, 4], [5, 6, 7], [1, 2, 5, 6]], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.95])
@every_family
def test_steps_that_repeat_a_sigma_are_steps_of_every_leaf(name, factor, repeated, sampler):
    model, seen = load(name), []
    sigmas = sigmas_of(model)
    for step in repeated[1:]:
        sigmas[step] = sigmas[step - 1] if step - 1 in repeated else sigmas[step]
    sampled(model, leaves(model), telling(sampler, lambda sigma: factor, seen), sigmas)
    assert_every_leaf_has_its_steps(model, seen)


def test_a_sampler_that_is_resampled_from_a_lower_sigma_begins_at_the_largest():
    """Rising to the largest, then falling: a leaf of half is sampled in the last two of four steps that fall."""
    model, seen = load("sd15"), []
    sigmas = torch.tensor([1.0, 3.0, 8.0, 6.0, 4.0, 2.0, 0.0])
    sampled(model, with_prediction(patched(model, even_tree(0.5)), lambda x, sigma: torch.full_like(x, 7.0)), telling("euler", seen=seen), sigmas)
    assert [bool((denoised == 7).all()) for _, denoised in seen] == [False, False, False, False, True, True]


def test_the_callback_of_the_node_is_called_as_ever(caplog):
    model, told = load("flux_schnell"), []
    sampled(model, leaves(model), comfy.samplers.sampler_object("heun"), callback=lambda *args: told.append((args[0], args[3])))
    assert told == [(step, STEPS) for step in range(STEPS)]


def own_steps(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler that takes twice as many steps as it was asked for, on a schedule of its own, and numbers them."""
    steps = 2 * (len(sigmas) - 1)
    own = torch.cat([sigmas[0] * (1 - torch.arange(steps) / steps) ** 3, torch.zeros(1)])
    return k_diffusion.sample_euler(model, x, own, extra_args=extra_args, callback=callback, disable=True)


@every_family
def test_a_sampler_with_steps_of_its_own_is_followed_by_its_sigmas_and_restored(name, caplog):
    model = load(name)
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sampled(model, patched(model, striped_tree(0.0, 0.5)), comfy.samplers.KSAMPLER(own_steps), latent=latent)
    half = SIDE_PX // model.cell_px // 2
    assert torch.equal(out[..., :half], latent[..., :half])
    assert (out - latent)[..., half:].abs().mean() > 0.1 * latent.std()
    assert log_lines(caplog) == []


class DirectGuider(comfy.samplers.CFGGuider):
    """As the guiders of some packs do."""

    def __call__(self, *args, **kwargs):
        return self.predict_noise(*args, **kwargs)


def asking_the_guider(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler, by the guider's predict_noise, as the samplers of some packs do."""
    for step, (sigma, below) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = model.inner_model.predict_noise(x, sigma.expand(x.shape[0]), model_options=extra_args["model_options"], seed=extra_args["seed"])
        callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = x + (x - denoised) / sigma * (below - sigma)
    return x


def image_by_image(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler, the images of a batch one after another."""
    for sigma, below in zip(sigmas, sigmas[1:]):
        denoised = torch.cat([model(row[None], sigma[None], **extra_args) for row in x])
        x = x + (x - denoised) / sigma * (below - sigma)
    return x


def guided(model, patcher, latent, guider=comfy.samplers.CFGGuider, function=None):
    guider = guider(patcher)
    guider.set_conds(model.positive(SIDE_PX, SIDE_PX), model.negative(SIDE_PX, SIDE_PX))
    guider.set_cfg(4.0)
    sampler = comfy.samplers.sampler_object("euler") if function is None else comfy.samplers.KSAMPLER(function)
    before = dict(vars(guider))
    out = guider.sample(comfy.sample.prepare_noise(latent, 5), latent, sampler, sigmas_of(model), callback=lambda *args: None, disable_pbar=True, seed=5)
    assert vars(guider).keys() == before.keys()
    return out


@pytest.mark.parametrize("schedule", ["img2img", "blend", "ramp"])
@pytest.mark.parametrize("way", [dict(guider=DirectGuider), dict(function=asking_the_guider), dict(guider=DirectGuider, function=asking_the_guider)])
def test_who_asks_the_guider_past_what_is_wrapped_around_it_is_answered_as_others(way, schedule):
    model = load("flux_schnell")
    patcher = with_prediction(patched(model, striped_tree(0.0, 0.5, 0.8, 1.0, leaf=64), schedule=schedule, hold_tones=0.3), lambda x, sigma: 0.5 * x + 3)
    latent = model.latent(SIDE_PX, SIDE_PX)
    out, right = guided(model, patcher, latent, **way), guided(model, patcher, latent)
    assert torch.allclose(out, right, atol=1e-4) and torch.equal(out[..., :8], latent[..., :8])


def test_a_sampler_that_asks_about_single_images_of_a_batch_is_refused():
    model = load("flux_schnell")
    latent = torch.cat([model.latent(SIDE_PX, SIDE_PX, seed=seed) for seed in (1, 2)])
    with pytest.raises(ValueError, match="sampler: expected one that asks about all images of a batch at once, 2, but it asked about 1"):
        guided(model, patched(model, striped_tree(0.5, 1.0)), latent, function=image_by_image)

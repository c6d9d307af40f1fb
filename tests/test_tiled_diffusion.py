"""The patch on the host's own samplers, with a small model of the FLUX architecture."""
from __future__ import annotations

import logging

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from sampling import SIDE_PX, calls_of, even_tree, load, patched, sample, striped_tree, with_prediction

from qtd_pack.painting import Edit, Edits, edit_quadtree
from qtd_pack.quadtree import build_quadtree
from qtd_pack.strengths import adjust_quadtree, quadtree_from_mask
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion

FLUX = "flux_schnell"
KEPT = (..., slice(0, 16))
CHANGED = (..., slice(16, 32))


@pytest.fixture
def model():
    return load(FLUX)


@pytest.mark.short
@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_every_sampler_keeps_strength_0_and_changes_strength_1(model, sampler):
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, patched(model, striped_tree(0.0, 1.0)), latent, sampler=sampler)
    assert torch.equal(out[KEPT], latent[KEPT])
    assert (out[CHANGED] - latent[CHANGED]).abs().mean() > 0.1
    assert out.isfinite().all()


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_every_scheduler_keeps_strength_0_and_changes_strength_1(model, scheduler, cfg):
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, patched(model, striped_tree(0.0, 1.0)), latent, scheduler=scheduler, cfg=cfg)
    assert torch.equal(out[KEPT], latent[KEPT])
    assert (out[CHANGED] - latent[CHANGED]).abs().mean() > 0.1


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "uni_pc"])
def test_a_run_that_stops_early_keeps_its_noise(model, sampler):
    latent = model.latent(SIDE_PX, SIDE_PX)
    noise = comfy.sample.prepare_noise(latent, 5)
    out = sample(model, patched(model, striped_tree(0.0, 1.0)), latent, noise=noise, steps=8, last_step=4, sampler=sampler)
    # The host divides a flow latent by 1 - sigma at the end of a stage: what is left is original + sigma / (1 - sigma) * noise.
    left = model.patcher.model.process_latent_in(out[KEPT]) - model.patcher.model.process_latent_in(latent[KEPT])
    share = (left * noise[KEPT]).sum() / noise[KEPT].square().sum()
    assert share > 0.3
    assert (left - share * noise[KEPT]).abs().max() < 1e-3


@pytest.mark.short
@pytest.mark.parametrize("method", ["Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_one_window_at_strength_1_is_plain_sampling_bit_for_bit(model, method, cfg):
    plain = sample(model, model.patcher, cfg=cfg)
    out = sample(model, patched(model, even_tree(1.0), method=method, min_window=1024, max_window=1024), cfg=cfg)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("strength, start", [(0.25, 6), (0.5, 4), (0.75, 2)])
def test_img2img_of_an_even_strength_is_the_hosts_sampler_started_later(model, strength, start):
    plain = sample(model, model.patcher, steps=8, start_step=start)
    out = sample(model, patched(model, even_tree(strength), min_window=1024, max_window=1024), steps=8)
    assert (out - plain).abs().max() < 1e-4


@pytest.mark.parametrize("schedule", ["img2img", "blend", "ramp"])
def test_min_denoise_0_leaves_no_noise_behind(model, schedule):
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, patched(model, even_tree(0.0), schedule=schedule), latent, steps=8)
    assert torch.equal(out, latent)


@pytest.mark.parametrize("schedule", ["img2img", "blend", "ramp"])
def test_the_noise_left_falls_at_every_step(model, schedule):
    latent = model.latent(SIDE_PX, SIDE_PX)
    noise = comfy.sample.prepare_noise(latent, 5)
    left = []
    towards = with_prediction(patched(model, even_tree(0.5), schedule=schedule), lambda x, sigma: torch.zeros_like(x))
    sample(model, towards, latent, noise=noise, steps=8, callback=lambda step, denoised, x, total: left.append(float((x * noise).sum() / noise.square().sum())))
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.99 and left[-1] < 0.4


@pytest.mark.parametrize("schedule", ["img2img", "blend", "ramp"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_sde"])
def test_txt2img_ends_without_noise(model, schedule, sampler, caplog):
    caplog.set_level(logging.INFO)
    target = model.patcher.model.process_latent_in(model.latent(SIDE_PX, SIDE_PX, seed=9))
    window = dict(min_window=1024, max_window=1024)
    towards = with_prediction(patched(model, striped_tree(0.0, 1.0), schedule=schedule, **window), lambda x, sigma: target)
    out = sample(model, towards, torch.zeros(1, 16, 32, 32), sampler=sampler, steps=8)
    assert (model.patcher.model.process_latent_in(out) - target).abs().max() < 1e-4
    assert caplog.text.count("nothing to preserve") == 1


def test_the_blend_of_denoised_is_the_blend_of_velocities():
    x, original, model_denoised, sigma, share = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4), 0.7, 0.3
    denoised = (1 - share) * original + share * model_denoised
    velocity = (1 - share) * (x - original) / sigma + share * (x - model_denoised) / sigma
    assert torch.allclose((x - denoised) / sigma, velocity, atol=1e-6)


@pytest.mark.parametrize("height, width", [(1000, 776), (8, 2048), (104, 72), (2048, 8)])
@pytest.mark.parametrize("method", ["Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion"])
def test_odd_sizes_keep_and_change_what_they_should(model, height, width, method):
    latent = model.latent(height, width)
    tree = TiledDiffusion(even_tree(1.0, height, width), method=method, min_window=128, max_window=256, tile_overlap=32).patched(model.patcher)
    out = sample(model, tree, latent, size=(height, width), steps=2)
    assert out.shape == latent.shape
    assert (out - latent).abs().amax(1).min() > 0
    kept = TiledDiffusion(even_tree(0.0, height, width), method=method).patched(model.patcher)
    assert torch.equal(sample(model, kept, latent, size=(height, width), steps=2), latent)


@pytest.mark.parametrize("method", ["Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion"])
@pytest.mark.parametrize("tile_batch_size", [1, 3, 0])
def test_windows_of_an_identity_model_leave_no_seam(model, method, tile_batch_size):
    settings = dict(method=method, tile_batch_size=tile_batch_size)
    identity = with_prediction(patched(model, even_tree(1.0), **settings), lambda x, sigma: x)
    plain = with_prediction(model.patcher, lambda x, sigma: x)
    assert (sample(model, identity) - sample(model, plain)).abs().max() < 1e-5


def test_the_model_sees_the_cells_of_the_plan_and_no_others(model):
    tree = striped_tree(0.0, 0.5)
    patcher = patched(model, tree, min_window=128, max_window=128, tile_batch_size=1)
    with calls_of(patcher) as shapes:
        sample(model, patcher, steps=8)
    # The right half is two windows of 128 px and 16 px of overlap: 20 x 20 cells, for the last four of eight steps.
    assert shapes == [(1, 16, 20, 20)] * 2 * 4


def test_strength_0_everywhere_never_runs_the_model(model):
    patcher = patched(model, even_tree(0.0))
    with calls_of(patcher) as shapes:
        sample(model, patcher, cfg=4.0)
    assert shapes == []


def test_skip_diffusion_below_keeps_and_does_not_run_weaker_leaves(model):
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, patched(model, striped_tree(0.4, 0.9), skip_diffusion_below=0.5), latent, steps=8)
    assert torch.equal(out[KEPT], latent[KEPT])
    assert not torch.equal(out[CHANGED], latent[CHANGED])


def test_one_line_says_what_the_run_did(model, caplog):
    caplog.set_level(logging.INFO)
    sample(model, patched(model, striped_tree(0.0, 1.0), min_window=128, max_window=128), steps=4)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("qtd_pack")]
    assert lines == ["8 windows over 4 steps, 0.50 of the cost of the full grid's 16; 50 % of the picture kept exactly"]


def test_two_samplers_two_runs_and_two_models_do_not_see_each_other(model):
    first, second = patched(model, striped_tree(0.0, 1.0)), patched(model, striped_tree(1.0, 0.0))
    one, other = model.latent(SIDE_PX, SIDE_PX, seed=1), model.latent(SIDE_PX, SIDE_PX, seed=2)
    alone = sample(model, first, one)
    assert torch.equal(sample(model, second, other)[CHANGED], other[CHANGED])
    assert torch.equal(sample(model, first, other)[KEPT], other[KEPT])
    assert torch.equal(sample(model, first, one), alone)
    assert KEY not in first.model_options.get("transformer_options", {})


@pytest.mark.short
def test_the_model_that_came_in_is_not_changed(model):
    wrappers, plain = dict(model.patcher.wrappers), sample(model, model.patcher)
    sample(model, patched(model, striped_tree(0.0, 1.0)))
    assert model.patcher.wrappers == wrappers
    assert torch.equal(sample(model, model.patcher), plain)


def test_a_second_tree_on_a_model_replaces_the_first(model):
    latent = model.latent(SIDE_PX, SIDE_PX)
    first = patched(model, striped_tree(0.0, 1.0))
    both = TiledDiffusion(striped_tree(1.0, 0.0), min_window=64, max_window=128, tile_overlap=16).patched(first)
    assert torch.equal(sample(model, both, latent), sample(model, patched(model, striped_tree(1.0, 0.0)), latent))
    assert torch.equal(sample(model, first, latent)[KEPT], latent[KEPT])


def test_images_of_a_batch_come_out_as_each_alone(model):
    patcher = patched(model, striped_tree(0.25, 1.0))
    latent = torch.cat([model.latent(SIDE_PX, SIDE_PX, seed=1), model.latent(SIDE_PX, SIDE_PX, seed=2)])
    noise = comfy.sample.prepare_noise(latent, 5)
    together = sample(model, patcher, latent, noise=noise, cfg=4.0)
    for row in range(2):
        alone = sample(model, patcher, latent[row:row + 1], noise=noise[row:row + 1], cfg=4.0)
        assert (together[row:row + 1] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("settings", [dict(tile_batch_size=1), dict(tile_batch_size=5)])
def test_the_batch_size_does_not_change_the_result(model, settings):
    reference = sample(model, patched(model, striped_tree(0.5, 1.0)), cfg=4.0)
    assert (sample(model, patched(model, striped_tree(0.5, 1.0), **settings), cfg=4.0) - reference).abs().max() < 1e-4


def test_out_of_memory_halves_the_batch_and_goes_on(model, caplog):
    caplog.set_level(logging.INFO)
    def hungry(x, sigma):
        if x.shape[0] > 2:
            raise comfy.model_management.OOM_EXCEPTION("too many windows")
        return 0.5 * x
    tree = striped_tree(1.0, 1.0)
    settings = dict(min_window=64, max_window=64)
    out = sample(model, with_prediction(patched(model, tree, **settings), hungry))
    reference = sample(model, with_prediction(patched(model, tree, **settings), lambda x, sigma: 0.5 * x))
    assert torch.allclose(out, reference)
    assert [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()] == [
        "out of memory with 16 windows at once: going on with 8", "out of memory with 8 windows at once: going on with 4", "out of memory with 4 windows at once: going on with 2"]


def test_out_of_memory_with_one_window_is_the_hosts_error(model):
    def hungry(x, sigma):
        raise comfy.model_management.OOM_EXCEPTION("one window is too large")
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="one window is too large"):
        sample(model, with_prediction(patched(model, striped_tree(1.0, 1.0)), hungry))


def test_an_interrupt_between_windows_stops_the_run_and_the_next_one_is_clean(model):
    reference = sample(model, patched(model, striped_tree(0.0, 1.0)))
    seen = []

    def cancel(x, sigma):
        seen.append(x.shape)
        comfy.model_management.interrupt_current_processing()
        return x
    patcher = patched(model, striped_tree(0.0, 1.0), tile_batch_size=1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, with_prediction(patcher, cancel))
    assert len(seen) == 1
    assert torch.equal(sample(model, patched(model, striped_tree(0.0, 1.0))), reference)


def test_memory_is_set_aside_for_a_window_and_not_for_the_canvas(model, monkeypatch):
    shapes = []
    real = model.patcher.model.memory_required
    monkeypatch.setattr(model.patcher.model, "memory_required", lambda shape, cond_shapes={}: shapes.append(list(shape)) or real(shape, cond_shapes=cond_shapes))
    sample(model, patched(model, striped_tree(1.0, 1.0), tile_batch_size=2))
    # The host asks twice before it loads: for cond and uncond, and for one of them.
    assert shapes[:2] == [[4, 16, 20, 20], [2, 16, 20, 20]]


def test_packed_and_flat_latents_are_refused():
    from qtd_pack.refusals import check_latent
    with pytest.raises(ValueError, match="cannot be tiled"):
        check_latent(torch.zeros(1, 1, 100), [(1, 16, 2, 4, 4), (1, 8, 10)])
    with pytest.raises(ValueError, match="several packed into one"):
        check_latent(torch.zeros(1, 16, 8, 8), [(1, 16, 8, 8), (1, 8, 10)])
    check_latent(torch.zeros(1, 16, 8, 8), [(1, 16, 8, 8)])
    with pytest.raises(ValueError, match="cannot be tiled"):
        check_latent(torch.zeros(1, 64, 100), None)


@pytest.mark.parametrize("settings, message", [
    (dict(method="Mixture"), "method: expected one of Mixture of Diffusers, MultiDiffusion, SpotDiffusion, got 'Mixture'"),
    (dict(schedule="linear"), "schedule: expected one of img2img, blend, ramp, got 'linear'"),
    (dict(min_window=1024, max_window=512), "min_window: expected at least 1 px and at most max_window .512., got 1024"),
    (dict(tile_overlap=-8), "tile_overlap and tile_batch_size: expected 0 or more, got -8 and 0"),
    (dict(skip_diffusion_below=1.5), "skip_diffusion_below: expected a strength from 0 to 1, got 1.5"),
])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TiledDiffusion(even_tree(1.0), **settings)


MODEL_FROM_BEFORE = "tile upscalers, detailers.*give them the model from before Quadtree Tiled Diffusion"


@pytest.mark.parametrize("height, width, message", [
    (512, 512, "512 x 512 px, but what is to be sampled is 256 x 256 px, which is smaller: a part of it, or a smaller version.*" + MODEL_FROM_BEFORE),
    (256, 384, "384 x 256 px, but what is to be sampled is 256 x 256 px, which is smaller.*" + MODEL_FROM_BEFORE),
    (266, 256, "256 x 266 px, but what is to be sampled is 256 x 256 px, which is smaller.*" + MODEL_FROM_BEFORE),
    (192, 384, "384 x 192 px, but what is to be sampled is 256 x 256 px, which is another shape.*after any crop or turn.*" + MODEL_FROM_BEFORE),
    (128, 192, "192 x 128 px, but what is to be sampled is 256 x 256 px: enlarged 2.00 times in height and 1.33 times in width, which is another aspect.*Enlarge both"),
])
def test_a_latent_that_is_not_of_the_trees_picture_is_refused_in_pixels_before_anything_is_run(model, height, width, message):
    plain = sample(model, model.patcher)
    patcher = patched(model, even_tree(1.0, height, width))
    with calls_of(patcher) as shapes, pytest.raises(ValueError, match=f"quadtree: made for a picture of {message}"):
        sample(model, patcher)
    assert shapes == []
    assert torch.equal(sample(model, model.patcher), plain)


@pytest.mark.parametrize("height, width", [(256, 256), (257, 263), (264, 264), (128, 128), (130, 128), (64, 64)])
def test_a_latent_of_the_trees_picture_or_larger_is_sampled_also_if_it_was_cropped_to_cells(model, height, width):
    assert sample(model, patched(model, even_tree(1.0, height, width))).isfinite().all()


@pytest.mark.parametrize("name, cells", [("flux2", 16), ("radiance", 1), ("ltxv", 32), ("wan21_t2v", 8)])
def test_the_size_in_pixels_is_that_of_the_models_cells(name, cells):
    model = load(name)
    assert model.cell_px == cells
    assert sample(model, patched(model, even_tree(1.0)), steps=1).isfinite().all()
    with pytest.raises(ValueError, match="made for a picture of 300 x 300 px, but what is to be sampled is 256 x 256 px"):
        sample(model, patched(model, even_tree(1.0, 300, 300)), steps=1)


TREES_OF_A_STRENGTH = {
    "mask": lambda strength: quadtree_from_mask(torch.full((1, SIDE_PX, SIDE_PX), strength)),
    "8-bit mask": lambda strength: quadtree_from_mask((torch.full((1, SIDE_PX, SIDE_PX), strength) * 255).round() / 255),
    "image": lambda strength: build_quadtree(torch.zeros(1, SIDE_PX, SIDE_PX, 3), min_denoise=strength),
    "busy image": lambda strength: build_quadtree(torch.rand(1, SIDE_PX, SIDE_PX, 3), detail_budget=0.0, content_threshold=0.0, max_denoise=strength),
    "range": lambda strength: adjust_quadtree(even_tree(0.5), min_denoise=2 * strength - 1, max_denoise=1.0),
    "gamma": lambda strength: adjust_quadtree(even_tree(round(strength ** 0.5, 3)), gamma=2.0),
    "edits": lambda strength: edit_quadtree(even_tree(0.0), Edits(SIDE_PX, SIDE_PX, (Edit(0, 0, SIDE_PX, strength),))),
}


@pytest.mark.parametrize("tree_of", TREES_OF_A_STRENGTH.values(), ids=TREES_OF_A_STRENGTH)
@pytest.mark.parametrize("name, strength, steps, sampled", [("flux_schnell", 0.75, 8, 6), ("sd15", 0.67, 3, 2), ("wan21_t2v", 0.83, 6, 5)])
def test_a_strength_that_was_meant_is_the_hosts_sampler_started_at_its_step(name, strength, steps, sampled, tree_of):
    model = load(name)
    latent = model.latent(SIDE_PX, SIDE_PX)
    noise = comfy.sample.prepare_noise(latent, 5)
    # At its largest sigma the host scales the noise of these models by sqrt(1 + sigma^2), not by sigma.
    largest = float(model.patcher.get_model_object("model_sampling").sigma_max)
    more = (1 + largest ** 2) ** 0.5 / largest if name == "sd15" else 1.0
    plain = sample(model, model.patcher, latent, noise=noise * more, steps=steps, start_step=steps - sampled)
    out = sample(model, patched(model, tree_of(strength), min_window=1024, max_window=1024), latent, noise=noise, steps=steps)
    assert (out - plain).abs().max() < 1e-4 * plain.std().clamp_min(1)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("qtd_pack") and record.levelno == logging.WARNING]


@pytest.mark.parametrize("strengths, steps, line, warning", [
    ((0.5, 0.5), 1, "100 % of the picture kept exactly", "100 % of what was to change did not change at all: 1 step is too few for strengths below 1.00. Use more steps"),
    ((0.4, 0.6), 2, "50 % of the picture kept exactly", None),
    ((0.2, 0.2, 0.2, 1.0), 4, "75 % of the picture kept exactly", "75 % of what was to change did not change at all: 4 steps are too few for strengths below 0.25. Use more steps"),
    ((0.0, 0.0, 0.0, 1.0), 4, "75 % of the picture kept exactly", None),
    ((0.5, 1.0), 2, "0 % of the picture kept exactly", None),
])
@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
def test_with_few_steps_the_line_counts_what_was_never_sampled_and_a_warning_says_what_did_not_change(name, strengths, steps, line, warning, caplog):
    caplog.set_level(logging.INFO)
    model = load(name)
    tree = striped_tree(*strengths, leaf=SIDE_PX // len(strengths))
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, patched(model, tree), latent, steps=steps)
    assert line in caplog.text
    # A leaf's strength eases at its border, over two cells of 32 here, which may have no step.
    assert 0 <= 100 * float((out == latent).all(1).double().mean()) - float(line.split(" %")[0]) < 7
    assert len(warnings_of(caplog)) == (warning is not None)
    assert warning is None or warnings_of(caplog)[0].startswith(warning)


@pytest.mark.parametrize("sampler", ["euler", "dpm_fast", "dpm_adaptive", "uni_pc"])
def test_what_was_never_sampled_is_kept_bit_for_bit(model, sampler):
    latent = model.latent(SIDE_PX, SIDE_PX)
    assert torch.equal(sample(model, patched(model, even_tree(0.2)), latent, steps=4, sampler=sampler), latent)


@pytest.mark.parametrize("schedule", ["blend", "ramp"])
def test_blend_and_ramp_change_everything_in_one_step(model, schedule, caplog):
    caplog.set_level(logging.INFO)
    sample(model, patched(model, striped_tree(0.1, 0.5), schedule=schedule), steps=1)
    assert "0 % of the picture kept exactly" in caplog.text
    assert warnings_of(caplog) == []


def test_a_run_that_ends_before_its_leaves_begin_says_so(model, caplog):
    """The whole schedule is wired, but nothing follows: the last sigma of the stage is 0."""
    sigmas = torch.linspace(1, 0, 9)
    latent = model.latent(SIDE_PX, SIDE_PX)

    def stopping(net, x, sigmas, **options):
        return comfy.k_diffusion.sampling.sample_euler(net, x, sigmas[:3], **options)
    patcher = patched(model, striped_tree(0.5, 0.5))
    comfy.sample.sample_custom(
        patcher, comfy.sample.prepare_noise(latent, 5), 1.0, comfy.samplers.KSAMPLER(stopping), sigmas, model.positive(SIDE_PX, SIDE_PX),
        model.negative(SIDE_PX, SIDE_PX), latent, disable_pbar=True)
    assert any("100 % of what was to change did not change at all: the sampler ended before their first step" in line for line in warnings_of(caplog))


def test_a_first_stage_of_several_does_not_complain_of_leaves_that_begin_later(model, caplog):
    sigmas = torch.linspace(1, 0, 9)
    sample(model, patched(model, striped_tree(0.2, 0.3), sigmas=sigmas), steps=8, last_step=4)
    assert warnings_of(caplog) == []


def test_a_latent_that_looks_half_sampled_is_not_taken_for_an_original_in_silence(caplog):
    model = load("sd15")
    first = sample(model, patched(model, striped_tree(0.0, 1.0)), steps=8, last_step=3)
    assert warnings_of(caplog) == []
    sample(model, patched(model, striped_tree(0.0, 1.0)), first, steps=8, start_step=3)
    assert len(warnings_of(caplog)) == 1
    assert "looks half-sampled" in warnings_of(caplog)[0] and "Connect the encoded picture to `original`" in warnings_of(caplog)[0]


def test_a_run_tells_how_far_a_step_is_and_in_the_end_what_it_did(model, monkeypatch):
    monkeypatch.setattr("qtd_pack.sampling_run.TELL_EVERY", 0.0)
    told = []
    latent = model.latent(SIDE_PX, SIDE_PX)
    sample(model, patched(model, striped_tree(0.0, 1.0), tell=lambda line, **values: told.append((line, values)), tile_batch_size=1), latent, steps=2)
    assert told[0] == ("step 1 of 2: 1 of 2 windows", {"step": 1, "steps": 2, "done": 1, "amount": 2})
    assert told[3] == ("step 2 of 2: 2 of 2 windows", {"step": 2, "steps": 2, "done": 2, "amount": 2})
    line, values = told[-1]
    assert line.endswith("% of the picture kept exactly")
    assert line.startswith(f"{values['windows']} windows over {values['steps']} steps, {values['cost']:.2f} of the cost of the full grid's {values['grid_windows']}")
    assert 0 < values["seconds"] < 60 and 0 < values["cost"] < 1 and values["kept"] == 0.5 and values["exact"] is True


def test_an_error_while_sampling_says_which_node_and_which_input_it_is_about(model):
    told = []
    tell = lambda line, **values: told.append((line, values))
    with pytest.raises(ValueError, match="^Quadtree Tiled Diffusion, quadtree: made for a picture of 384 x 256"):
        sample(model, patched(model, even_tree(1.0, 256, 384), tell=tell))
    line, values = told[-1]
    assert line.startswith("quadtree: made for a picture of 384 x 256") and values == {"failed": True}


def test_an_error_of_others_while_sampling_stays_theirs(model):
    def failing(arguments):
        raise ValueError("of others")

    ours = patched(model, even_tree(1.0))
    ours.set_model_sampler_post_cfg_function(failing)
    with pytest.raises(ValueError, match="^of others$"):
        sample(model, ours)

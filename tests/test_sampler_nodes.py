"""The patch in front of the host's sampler nodes, run through the nodes' own classes."""
from __future__ import annotations

import logging

import comfy_extras.nodes_advanced_samplers as advanced
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy_extras import nodes_perpneg
from hosts import needs
from nodes import KSampler, KSamplerAdvanced
from sampling import SIDE_PX, even_tree, load, striped_tree

from qtd_pack.nodes import QuadtreeTiledDiffusion
from qtd_pack.blending import METHODS

HALF = SIDE_PX // 2
SETTINGS = dict(
    method="Mixture of Diffusers", schedule="img2img", tile_overlap=0, tile_batch_size=0, skip_diffusion_below=0.0, min_window=64, max_window=128,
    shift_method="random", seed=0)


@pytest.fixture
def model():
    return load("flux_schnell")


def tiled(model, tree=None, **settings):
    """The left half kept and the right half redrawn, unless a tree says otherwise."""
    return QuadtreeTiledDiffusion.execute(model.patcher, striped_tree(0.0, 1.0) if tree is None else tree, **SETTINGS | settings)[0]


def picture(model, batch: int = 1) -> dict:
    return {"samples": model.latent(SIDE_PX, SIDE_PX, batch)}


def prompts(model) -> tuple[list, list]:
    return model.positive(SIDE_PX, SIDE_PX), model.negative(SIDE_PX, SIDE_PX)


def sigmas_of(model, steps: int = 4) -> torch.Tensor:
    return custom.BasicScheduler.execute(model.patcher, "simple", steps, 1.0)[0]


def ksampler(model, patcher, latent, *, steps=4, sampler="euler", denoise=1.0, cfg=3.0):
    return KSampler().sample(patcher, 5, steps, cfg, sampler, "simple", *prompts(model), latent, denoise=denoise)[0]


def ksampler_advanced(model, patcher, latent, start, end, *, steps=8, noise="enable", leftover="enable"):
    return KSamplerAdvanced().sample(patcher, noise, 5, steps, 3.0, "euler", "simple", *prompts(model), latent, start, end, leftover)[0]


def custom_advanced(model, guider, latent, sigmas, *, sampler=None, noise=None):
    sampler = custom.KSamplerSelect.execute("euler")[0] if sampler is None else sampler
    return custom.SamplerCustomAdvanced.execute(custom.RandomNoise.execute(5)[0] if noise is None else noise, guider, sampler, sigmas, latent)


def cfg_guider(model, patcher):
    return custom.CFGGuider.execute(patcher, *prompts(model), 3.0)[0]


def assert_left_kept_right_redrawn(out: dict, latent: dict) -> None:
    kept, changed = (out["samples"] - latent["samples"]).chunk(2, dim=-1)
    assert kept.count_nonzero() == 0
    assert changed.isfinite().all() and changed.abs().mean() > 0.1


def redrawn_in_two_stages_of_ksampler_advanced(model, patcher, latent):
    first = ksampler_advanced(model, patcher, latent, 0, 3)
    return ksampler_advanced(model, patcher, first, 3, 10000, noise="disable", leftover="disable")


def redrawn_in_two_stages_of_split_sigmas(model, patcher, latent):
    high, low = custom.SplitSigmas.execute(sigmas_of(model, 8), 3).result
    first = custom_advanced(model, cfg_guider(model, patcher), latent, high)[0]
    return custom_advanced(model, cfg_guider(model, patcher), first, low, noise=custom.DisableNoise.execute()[0])[0]


two_stages = pytest.mark.parametrize(
    "redrawn", [redrawn_in_two_stages_of_ksampler_advanced, redrawn_in_two_stages_of_split_sigmas], ids=["KSamplerAdvanced", "SplitSigmas"])


def test_ksampler_keeps_and_redraws(model):
    latent = picture(model)
    assert_left_kept_right_redrawn(ksampler(model, tiled(model), latent), latent)


def test_ksampler_with_denoise_below_1_counts_strengths_in_its_own_steps(model):
    """Half of the 4 steps that are left of 8: the same as beginning at step 6 of 8."""
    latent = picture(model)
    patcher = tiled(model, even_tree(0.5), min_window=1024, max_window=1024)
    out = ksampler(model, patcher, latent, steps=4, denoise=0.5)
    later = ksampler_advanced(model, model.patcher, latent, 6, 10000, leftover="disable")
    assert (out["samples"] - later["samples"]).abs().max() < 1e-4
    assert_left_kept_right_redrawn(ksampler(model, tiled(model), latent, denoise=0.5), latent)


def test_ksampler_with_denoise_0_gives_the_latent_back(model):
    latent = picture(model)
    assert torch.equal(ksampler(model, tiled(model, even_tree(1.0)), latent, denoise=0.0)["samples"], latent["samples"])


@pytest.mark.parametrize("start, end", [(0, 10000), (3, 10000), (3, 6), (0, 1)])
def test_ksampler_advanced_that_removes_all_noise_keeps_and_redraws(model, start, end):
    latent = picture(model)
    assert_left_kept_right_redrawn(ksampler_advanced(model, tiled(model), latent, start, end, leftover="disable"), latent)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flux_schnell", "sd15", "wan21_t2v"])
@two_stages
def test_two_stages_with_original_and_sigmas_are_one(redrawn, name, method):
    model = load(name)
    latent, tree = picture(model), striped_tree(0.0, 0.5, 0.75, 1.0, leaf=64)
    one = ksampler_advanced(model, tiled(model, tree, method=method), latent, 0, 10000, leftover="disable")
    both = redrawn(model, tiled(model, tree, method=method, original=latent, sigmas=sigmas_of(model, 8)), latent)
    assert torch.equal(both["samples"][..., :8], latent["samples"][..., :8])
    assert (both["samples"] - one["samples"]).abs().max() < 1e-3 * latent["samples"].std()


@two_stages
def test_a_second_stage_without_original_says_so_and_preserves_nothing(model, redrawn, caplog):
    latent = picture(model)
    out = redrawn(model, tiled(model), latent)["samples"] - latent["samples"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING and record.name.startswith("qtd_pack")] == [
        "this stage starts without noise, so it cannot know the original: nothing is preserved. Connect the encoded picture to `original`."]
    assert all(half.abs().mean() > 0.1 for half in out.chunk(2, dim=-1))


@two_stages
def test_original_alone_preserves_what_is_kept(model, redrawn):
    latent = picture(model)
    assert_left_kept_right_redrawn(redrawn(model, tiled(model, original=latent), latent), latent)


@pytest.mark.parametrize("name, original, message", [
    ("flux_schnell", (1, 16, 32, 16), "expected a latent like the one that is sampled, .16, 32, 32. .*, got .16, 32, 16."),
    ("flux_schnell", (1, 4, 32, 32), "got .4, 32, 32.*Encode the same picture with the same VAE"),
    ("wan21_t2v", (1, 16, 1, 32, 32), "expected a latent like the one that is sampled, .16, 3, 32, 32. .*, got .16, 1, 32, 32."),
])
def test_an_original_of_another_shape_is_refused(name, original, message):
    model = load(name)
    with pytest.raises(ValueError, match=f"original: .*{message}"):
        ksampler(model, tiled(model, original={"samples": torch.ones(original)}), picture(model), steps=1)


def test_one_original_serves_a_batch(model):
    latent = picture(model, batch=2)
    original = {"samples": latent["samples"][:1]}
    out = ksampler(model, tiled(model, original=original), latent)["samples"]
    assert torch.equal(out[..., :16], original["samples"][..., :16].repeat(2, 1, 1, 1))


def test_an_original_without_frames_serves_a_model_with_them():
    model = load("qwen_image")
    latent = picture(model)
    assert_left_kept_right_redrawn(ksampler(model, tiled(model, original={"samples": latent["samples"][:, :, 0]}), latent), latent)


def test_sampler_custom_keeps_and_redraws_also_in_its_denoised_output(model):
    latent = picture(model)
    sampler = custom.KSamplerSelect.execute("dpmpp_2m")[0]
    out, denoised = custom.SamplerCustom.execute(tiled(model), True, 5, 3.0, *prompts(model), sampler, sigmas_of(model), latent).result
    assert_left_kept_right_redrawn(out, latent)
    assert (denoised["samples"] - latent["samples"])[..., :16].abs().max() < 1e-5


GUIDERS = {
    "BasicGuider": lambda patcher, positive, negative: custom.BasicGuider.execute(patcher, positive),
    "CFGGuider": lambda patcher, positive, negative: custom.CFGGuider.execute(patcher, positive, negative, 3.0),
    "DualCFGGuider": lambda patcher, positive, negative: custom.DualCFGGuider.execute(patcher, positive, negative, negative, 3.0, 2.0, "regular"),
    "DualCFGGuider nested": lambda patcher, positive, negative: custom.DualCFGGuider.execute(patcher, positive, negative, negative, 3.0, 2.0, "nested"),
    "DualModelGuider": lambda patcher, positive, negative: custom.DualModelGuider.execute(patcher, positive, 3.0, load("flux_dev").patcher, load("flux_dev").negative(SIDE_PX, SIDE_PX)),
    "PerpNegGuider": lambda patcher, positive, negative: nodes_perpneg.PerpNegGuider.execute(patcher, positive, negative, negative, 3.0, 1.0),
}


def on_this_host(nodes: dict, *modules) -> list:
    """The nodes as a test's parameters; those that this host lacks are skipped."""
    return [
        pytest.param(make, id=name, marks=[needs(f"node {name}", any(hasattr(module, name) for module in modules))] if name[0].isupper() and " " not in name else [])
        for name, make in nodes.items()]


@pytest.mark.parametrize("guider", on_this_host(GUIDERS, custom, nodes_perpneg))
def test_every_guider_keeps_redraws_and_is_itself_in_one_window(model, guider):
    latent, sigmas = picture(model), sigmas_of(model)

    def guided(patcher):
        return custom_advanced(model, guider(patcher, *prompts(model))[0], latent, sigmas)[0]

    assert_left_kept_right_redrawn(guided(tiled(model)), latent)
    whole = guided(tiled(model, even_tree(1.0), min_window=512, max_window=512))
    assert torch.equal(whole["samples"], guided(model.patcher)["samples"])


SAMPLERS = {
    "SamplerDPMPP_3M_SDE": lambda model: custom.SamplerDPMPP_3M_SDE.execute(1.0, 1.0, "cpu"),
    "SamplerDPMPP_2M_SDE": lambda model: custom.SamplerDPMPP_2M_SDE.execute("heun", 1.0, 1.0, "cpu"),
    "SamplerDPMPP_SDE": lambda model: custom.SamplerDPMPP_SDE.execute(1.0, 1.0, 0.5, "cpu"),
    "SamplerDPMPP_2S_Ancestral": lambda model: custom.SamplerDPMPP_2S_Ancestral.execute(1.0, 1.0),
    "SamplerEulerAncestral": lambda model: custom.SamplerEulerAncestral.execute(1.0, 1.0),
    "SamplerEulerAncestralCFGPP": lambda model: custom.SamplerEulerAncestralCFGPP.execute(1.0, 1.0),
    "SamplerLMS": lambda model: custom.SamplerLMS.execute(4),
    "SamplerDPMAdaptative": lambda model: custom.SamplerDPMAdaptative.execute(3, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.81, 0.0, 1.0),
    "SamplerER_SDE": lambda model: custom.SamplerER_SDE.execute("ER-SDE", 3, 1.0, 1.0),
    "SamplerSASolver": lambda model: custom.SamplerSASolver.execute(model.patcher, 1.0, 0.2, 0.8, 1.0, 3, 4, True, False),
    "SamplerSEEDS2": lambda model: custom.SamplerSEEDS2.execute("phi_2", 1.0, 1.0, 0.5),
    "SamplerLCM": lambda model: advanced.SamplerLCM.execute(1.0, 1.0, 0.0),
    "SamplerEulerCFGpp": lambda model: advanced.SamplerEulerCFGpp.execute("regular"),
    "heun": lambda model: custom.KSamplerSelect.execute("heun"),
    "seeds_3": lambda model: custom.KSamplerSelect.execute("seeds_3"),
    "uni_pc": lambda model: custom.KSamplerSelect.execute("uni_pc"),
}


@pytest.mark.parametrize("sampler", on_this_host(SAMPLERS, custom, advanced))
@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
def test_every_sampler_node_keeps_and_redraws(name, sampler):
    model = load(name)
    latent = picture(model)
    out = custom_advanced(model, cfg_guider(model, tiled(model)), latent, sigmas_of(model), sampler=sampler(model)[0])[0]
    assert_left_kept_right_redrawn(out, latent)


def test_a_sampler_that_enlarges_the_latent_on_its_way_is_refused(model):
    sampler = advanced.SamplerLCMUpscale.execute(2.0, -1, "bislerp")[0]
    with pytest.raises(ValueError, match="sampler: expected one that keeps the latent's size, 32 x 32 cells, but it went on with 48 x 48.*Choose another sampler"):
        custom_advanced(model, cfg_guider(model, tiled(model)), picture(model), sigmas_of(model), sampler=sampler)


def test_noise_that_is_added_beforehand_needs_the_original(model):
    latent, sigmas = picture(model), sigmas_of(model)
    noisy = custom.AddNoise.execute(model.patcher, custom.RandomNoise.execute(5)[0], sigmas, latent)[0]
    out = custom_advanced(model, cfg_guider(model, tiled(model, original=latent)), noisy, sigmas, noise=custom.DisableNoise.execute()[0])[0]
    assert_left_kept_right_redrawn(out, latent)


def test_sigmas_without_a_step_change_nothing(model):
    latent, nothing = picture(model), torch.tensor([0.0])
    plain = custom_advanced(model, cfg_guider(model, model.patcher), latent, nothing, noise=custom.DisableNoise.execute()[0])[0]
    out = custom_advanced(model, cfg_guider(model, tiled(model)), latent, nothing, noise=custom.DisableNoise.execute()[0])[0]
    assert (out["samples"] - plain["samples"]).abs().max() < 1e-6


def test_sigmas_that_rise_are_sampled_with_the_whole_model(model):
    """Unsampling: the result is noise, and nothing in it is the original."""
    latent = picture(model)
    flipped = custom.FlipSigmas.execute(sigmas_of(model))[0]
    patcher = tiled(model, min_window=512, max_window=512)
    out = custom_advanced(model, cfg_guider(model, patcher), latent, flipped, noise=custom.DisableNoise.execute()[0])[0]
    plain = custom_advanced(model, cfg_guider(model, model.patcher), latent, flipped, noise=custom.DisableNoise.execute()[0])[0]
    assert torch.equal(out["samples"], plain["samples"])

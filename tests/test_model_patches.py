"""Other nodes' patches on the same model: the host's own, through their classes, and of the kinds that packs make."""
from __future__ import annotations

import inspect

import comfy.sample
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy.context_windows import IndexListContextHandler, IndexListContextWindow
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_context_windows import ContextWindowsManualNode, WanContextWindowsManualNode
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg
from comfy_extras.nodes_rope import ScaleROPE
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_sd3 import SkipLayerGuidanceSD3
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_tcfg import TCFG
from hosts import needs, of_host
from sampling import SIDE_PX, even_tree, load, sample, striped_tree
from tiny_models import recorded

from qtd_pack.quadtree import Quadtree
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.sampling_run import _frames
from qtd_pack.tiled_diffusion import TiledDiffusion

HAS_CAUSAL_FRAME = "causal_window_fix" in inspect.signature(IndexListContextHandler.__init__).parameters
HALF = SIDE_PX // 2
WINDOWS = dict(min_window=128, max_window=128, tile_overlap=0)
ONE_WINDOW = dict(min_window=512, max_window=512)


def tiled(patcher, tree=None, **settings):
    """A patched model with the tree on top. The left half is kept, unless a tree says otherwise."""
    return TiledDiffusion(striped_tree(0.0, 1.0) if tree is None else tree, **WINDOWS | settings).patched(patcher)


def first(output):
    """The model that a node gave, of either kind of node."""
    return output[0]


# Name: family, and the node on a model.
PATCHES = {
    "FreeU": ("sd15", lambda patcher: FreeU.execute(patcher, 1.1, 1.2, 0.9, 0.2)),
    "FreeU_V2": ("sd15", lambda patcher: FreeU_V2.execute(patcher, 1.3, 1.4, 0.9, 0.2)),
    "HyperTile": ("sd15", lambda patcher: HyperTile.execute(patcher, 32, 1, 2, False)),
    "PatchModelAddDownscale": ("sd15", lambda patcher: PatchModelAddDownscale.execute(patcher, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic")),
    "UNetCrossAttentionMultiply": ("sd15", lambda patcher: UNetCrossAttentionMultiply.execute(patcher, 1.0, 1.2, 1.0, 1.1)),
    "PerpNeg": ("sd15", lambda patcher: PerpNeg.execute(patcher, load("sd15").conds(SIDE_PX, SIDE_PX, seed=4), 1.0)),
    "ModelSamplingDiscrete": ("sd15", lambda patcher: ModelSamplingDiscrete().patch(patcher, "v_prediction", False)),
    "RescaleCFG": ("sd15", lambda patcher: RescaleCFG().patch(patcher, 0.7)),
    "NAGuidance": ("flux_schnell", lambda patcher: NAGuidance.execute(patcher, 5.0, 0.5, 1.5)),
    "PerturbedAttentionGuidance": ("sd15", lambda patcher: PerturbedAttentionGuidance.execute(patcher, 3.0)),
    "SkipLayerGuidanceDiT": ("flux_schnell", lambda patcher: SkipLayerGuidanceDiT.execute(patcher, 3.0, 0.0, 1.0, "0", "0", 0.5)),
    "SkipLayerGuidanceDiTSimple": ("flux_schnell", lambda patcher: SkipLayerGuidanceDiTSimple.execute(patcher, 0.0, 1.0, "0", "0")),
    "SkipLayerGuidanceSD3": ("sd3", lambda patcher: SkipLayerGuidanceSD3.execute(patcher, "0", 3.0, 0.0, 1.0)),
    "APG": ("flux_schnell", lambda patcher: APG.execute(patcher, 0.5, 2.0, 0.3)),
    "TCFG": ("flux_schnell", lambda patcher: TCFG.execute(patcher)),
    "Mahiro": ("flux_schnell", lambda patcher: Mahiro.execute(patcher)),
    "CFGZeroStar": ("flux_schnell", lambda patcher: CFGZeroStar.execute(patcher)),
    "CFGNorm": ("flux_schnell", lambda patcher: CFGNorm.execute(patcher, 1.0)),
    "FreSca": ("flux_schnell", lambda patcher: FreSca.execute(patcher, 1.0, 1.25, 5)),
    "EpsilonScaling": ("flux_schnell", lambda patcher: EpsilonScaling.execute(patcher, 1.05)),
    "TemporalScoreRescaling": ("flux_schnell", lambda patcher: TemporalScoreRescaling.execute(patcher, 0.9, 1.0)),
    "ScaleROPE": ("flux_schnell", lambda patcher: ScaleROPE.execute(patcher, 1.5, 0.0, 1.5, 0.0, 1.0, 0.0)),
    "ModelSamplingFlux": ("flux_schnell", lambda patcher: ModelSamplingFlux().patch(patcher, 1.15, 0.5, SIDE_PX, SIDE_PX)),
    "CFGOverride": ("flux_schnell", lambda patcher: custom.CFGOverride.execute(patcher, 2.0, 0.0, 0.5)),
}

NEEDED = {"CFGOverride": needs("CFGOverride", of_host("comfy_extras.nodes_custom_sampler", "CFGOverride"))}

every_patch = pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDED.get(name, ())) for name in PATCHES])


def run(name: str, patcher, **options) -> torch.Tensor:
    torch.manual_seed(0)  # HyperTile draws from it
    return sample(load(name), patcher, steps=3, cfg=3.0, **options)


@every_patch
def test_a_patch_before_or_after_ours_keeps_and_redraws(name):
    family, patch = PATCHES[name]
    latent = load(family).latent(SIDE_PX, SIDE_PX)
    before, after = run(family, tiled(first(patch(load(family).patcher))), latent=latent), run(family, first(patch(tiled(load(family).patcher))), latent=latent)
    assert torch.equal(before, after)
    assert torch.equal(before[..., :16], latent[..., :16])
    assert before.isfinite().all() and (before - latent)[..., 16:].abs().mean() > 0.1


@every_patch
def test_a_patch_acts_in_windows_however_many_share_a_batch(name):
    family, patch = PATCHES[name]
    patcher = first(patch(load(family).patcher))
    together = run(family, tiled(patcher, even_tree(1.0)))
    assert (together - run(family, tiled(patcher, even_tree(1.0), tile_batch_size=1))).abs().max() < 1e-3 * together.std()
    assert (together - run(family, tiled(load(family).patcher, even_tree(1.0)))).abs().max() > 1e-3 * together.std()


@every_patch
def test_a_patch_with_one_window_is_the_patch_bit_for_bit(name):
    family, patch = PATCHES[name]
    patcher = first(patch(load(family).patcher))
    assert torch.equal(run(family, tiled(patcher, even_tree(1.0), **ONE_WINDOW)), run(family, patcher))


def test_self_attention_guidance_is_refused_where_there_are_windows():
    model = load("sd15")
    patcher = first(SelfAttentionGuidance.execute(model.patcher, 0.5, 2.0))
    with pytest.raises(ValueError, match="Self-Attention Guidance: expected the whole picture in one window.*use Perturbed-Attention Guidance instead"):
        run("sd15", tiled(patcher))
    assert torch.equal(run("sd15", tiled(patcher, even_tree(1.0), **ONE_WINDOW)), run("sd15", patcher))


def test_rows_come_conditioning_by_conditioning():
    """What IP-Adapter and its like rely on: the rows of a batch are all windows of cond, then all of uncond."""
    model, seen = load("sd15"), []
    prompts = [conds[0][0] for conds in (model.positive(SIDE_PX, SIDE_PX), model.negative(SIDE_PX, SIDE_PX))]

    def patch(q, context, value, extra_options):
        chunks = extra_options["cond_or_uncond"]
        seen.append(q.shape[0])
        assert all(torch.equal(rows, prompts[chunk].expand_as(rows)) for chunk, rows in zip(chunks, context.chunk(len(chunks))))
        return q, context, value

    patcher = model.patcher.clone()
    patcher.set_model_attn2_patch(patch)
    run("sd15", tiled(patcher, even_tree(1.0)))
    assert max(seen) > 2


def test_a_function_wrapper_of_another_pack_is_called_with_windows():
    model, inputs = load("flux_schnell"), []

    def wrapper(apply_model, args):
        inputs.append((tuple(args["input"].shape), args["cond_or_uncond"]))
        return 0.5 * apply_model(args["input"], args["timestep"], **args["c"])

    patcher = model.patcher.clone()
    patcher.set_model_unet_function_wrapper(wrapper)
    out = run("flux_schnell", tiled(patcher, even_tree(1.0)))
    assert {(shape[-2:], tuple(chunks)) for shape, chunks in inputs} == {((16, 16), (1, 0))}
    assert out.std() < 0.9 * run("flux_schnell", tiled(model.patcher, even_tree(1.0))).std()


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"])
def test_cfg_pp_samplers_get_the_original_as_uncond(sampler):
    """They step with the unconditional prediction, so kept cells keep to their path only if that is the original, too."""
    model = load("sd15")
    latent = model.latent(SIDE_PX, SIDE_PX)
    original, off = model.patcher.model.process_latent_in(latent)[..., :16], []

    def unconditional(args):
        off.append((args["uncond_denoised"][..., :16] - original).abs().max())
        return args["denoised"]

    patcher = tiled(model.patcher)
    patcher.set_model_sampler_post_cfg_function(unconditional, disable_cfg1_optimization=True)
    out = run("sd15", patcher, latent=latent, sampler=sampler)
    assert len(off) == 3 and max(off) == 0
    assert torch.equal(out[..., :16], latent[..., :16])


@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
@pytest.mark.parametrize("differential", [False, True])
def test_a_noise_mask_and_a_tree_keep_what_either_keeps(name, differential):
    model = load(name)
    latent = model.latent(SIDE_PX, SIDE_PX)
    mask = torch.ones(1, SIDE_PX, SIDE_PX)
    mask[:, :HALF] = 0
    mask[:, HALF:, -64:] = 0.6
    patcher = tiled(first(DifferentialDiffusion.execute(model.patcher, 1.0)) if differential else model.patcher)
    change = (run(name, patcher, latent=latent, noise_mask=mask) - latent).abs().amax((0, 1))
    assert change[:, :16].max() == 0
    assert change[:16].max() < 1e-4 * latent.std()
    assert change[16:, 16:24].mean() > 0.1 and change[16:, 24:].mean() > 0.1


def test_a_compiled_model_runs_in_windows():
    model = load("flux_schnell")
    compiled = model.patcher.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, tiled(compiled), latent, steps=2)
    assert (out - sample(model, tiled(model.patcher), latent, steps=2)).abs().max() < 1e-4
    assert torch.equal(out[..., :16], latent[..., :16])


def quarters(picture: torch.Tensor) -> list[torch.Tensor]:
    return [part for half in picture.chunk(2, dim=-2) for part in half.chunk(2, dim=-1)]


@pytest.mark.parametrize("tile_batch_size", [0, 1])
def test_easy_cache_keeps_what_it_remembers_of_each_window_apart(tile_batch_size, caplog):
    """Four windows without overlap come out as each would alone, with steps skipped."""
    caplog.set_level("INFO")
    model = load("flux_schnell")
    latent = model.latent(SIDE_PX, SIDE_PX)
    noise = comfy.sample.prepare_noise(latent, 5)
    patcher = first(EasyCacheNode.execute(model.patcher, 3.0, 0.1, 0.9, False))
    out = sample(model, tiled(patcher, even_tree(1.0), method="MultiDiffusion", tile_batch_size=tile_batch_size), latent, noise=noise, steps=8, cfg=3.0)
    assert "EasyCache - skipped 4/8 steps" in caplog.text
    for window, part, noise_part in zip(quarters(out), quarters(latent), quarters(noise)):
        alone = sample(model, patcher, part, noise=noise_part, steps=8, cfg=3.0)
        assert (window - alone).abs().max() < 1e-3 * out.std()


CACHES = {
    "EasyCache": lambda patcher: EasyCacheNode.execute(patcher, 3.0, 0.1, 0.9, False),
    "LazyCache": lambda patcher: LazyCacheNode.execute(patcher, 3.0, 0.1, 0.9, False),
}


def corner_and_spots() -> Quadtree:
    """A corner and a spot of 64 px to redraw, beside that a spot that begins with the last quarter of the steps."""
    mask = torch.zeros(1, SIDE_PX, SIDE_PX)
    mask[:, :HALF, HALF:] = 1
    mask[:, -64:, -64:] = 1
    mask[:, -64:, HALF:-64] = 0.25
    return quadtree_from_mask(mask, min_leaf=64, max_leaf=64)


@pytest.mark.parametrize("method", ["Mixture of Diffusers", "SpotDiffusion"])
@pytest.mark.parametrize("min_window, several", [(128, False), (64, True)], ids=["one shape", "several shapes"])
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
def test_cells_that_have_not_begun_are_the_original_at_every_step_of_a_cache(cache, min_window, several, method):
    """Whatever it makes of the steps that it skips."""
    model = load("flux_schnell")
    latent = model.latent(SIDE_PX, SIDE_PX)
    original, seen = model.patcher.model.process_latent_in(latent), []
    settings = dict(method=method, min_window=min_window)

    def follow(step, denoised, x, steps):
        seen.append((denoised - original).abs().amax((0, 1)))

    patcher, calls = recorded(tiled(first(cache(model.patcher)), corner_and_spots(), **settings))
    before = sample(model, patcher, latent, steps=8, cfg=3.0, callback=follow)
    after = sample(model, first(cache(tiled(model.patcher, corner_and_spots(), **settings))), latent, steps=8, cfg=3.0)
    assert (len({call.x.shape[-2:] for call in calls}) > 1) == several
    assert torch.equal(before, after) and before.isfinite().all()
    assert torch.equal(before[..., :16], latent[..., :16])
    assert len(seen) == 8 and max(change[:, :16].max() for change in seen) == 0
    assert max(change[24:, 16:24].max() for change in seen[:6]) == 0
    assert (before - latent)[..., :16, 16:].abs().mean() > 0.1


@pytest.mark.parametrize("settings", [dict(min_window=64), dict(method="SpotDiffusion")], ids=["two shapes", "SpotDiffusion"])
def test_easy_cache_skips_nothing_when_windows_differ(settings, caplog):
    caplog.set_level("INFO")
    model = load("flux_schnell")
    cached, plain = (sample(model, tiled(patcher, corner_and_spots(), **settings), steps=8) for patcher in (first(CACHES["EasyCache"](model.patcher)), model.patcher))
    assert "EasyCache - skipped 0/8 steps" in caplog.text
    assert torch.equal(cached, plain)


def test_lazy_cache_skips_whole_steps(caplog):
    caplog.set_level("INFO")
    model = load("flux_schnell")
    patcher, calls = recorded(tiled(first(LazyCacheNode.execute(model.patcher, 3.0, 0.1, 0.9, False))))
    sample(model, patcher, steps=8)
    assert "LazyCache - skipped 6/8 steps" in caplog.text
    assert len({float(call.sigma[0]) for call in calls}) == 2


def windowed_video(patcher, **settings):
    """Wan's context windows of 3 latent frames that share 1."""
    return first(WanContextWindowsManualNode.execute(patcher, 9, 4, "standard_static", 1, False, "pyramid", **dict(freenoise=False) | settings))


def video(model) -> torch.Tensor:
    return model.patcher.model.latent_format.process_out(torch.randn(1, 16, 7, 32, 32))


@pytest.mark.parametrize("freenoise", [False, True])
def test_context_windows_and_ours_divide_time_and_space(freenoise):
    model = load("wan21_t2v")
    latent = video(model)
    patcher, calls = recorded(windowed_video(tiled(model.patcher, min_window=64, max_window=64), freenoise=freenoise))
    out = sample(model, patcher, latent, steps=2, cfg=3.0)
    assert torch.equal(out[..., :16], latent[..., :16])
    assert (out - latent)[..., 16:].flatten(-2).std(-1).min() > 0.1
    # With the frame that newer hosts add before a window that does not begin with the first.
    assert {call.x.shape[2:] for call in calls} == ({(3, 8, 8), (4, 8, 8)} if HAS_CAUSAL_FRAME else {(3, 8, 8)})


def test_context_windows_with_one_of_ours_are_context_windows_alone():
    model = load("wan21_t2v")
    latent = video(model)
    alone = sample(model, windowed_video(model.patcher), latent, steps=2, cfg=3.0)
    assert torch.equal(sample(model, windowed_video(tiled(model.patcher, even_tree(1.0), **ONE_WINDOW)), latent, steps=2, cfg=3.0), alone)


def images_as_frames(patcher):
    """Context windows of 3 images of a batch, which motion modules for SD 1.5 take for a video."""
    return first(ContextWindowsManualNode.execute(patcher, 3, 1, "standard_static", 1, False, "pyramid", 0, False))


@pytest.mark.parametrize("name, batch, divided", [("wan21_t2v", 1, windowed_video), ("sd15", 5, images_as_frames)])
def test_kept_cells_are_the_original_of_their_own_frame_in_every_context_window(name, batch, divided):
    model = load(name)
    latent = video(model) if batch == 1 else model.latent(SIDE_PX, SIDE_PX, batch)
    original, off = model.patcher.model.process_latent_in(latent)[..., :16], []

    def guided(args):
        off.extend((args[key][..., :16] - original).abs().max() for key in ("cond_denoised", "uncond_denoised"))
        return args["denoised"]

    patcher = divided(tiled(model.patcher))
    patcher.set_model_sampler_post_cfg_function(guided)
    sample(model, patcher, latent, steps=2, cfg=3.0)
    assert len(off) == 4 and max(off) < 1e-5


@needs("context windows with a frame before them", HAS_CAUSAL_FRAME)
def test_guides_that_follow_a_context_window_stay_as_they_are():
    """The host appends the guides of LTX-2 to each of its windows, and drops what becomes of them."""
    window = IndexListContextWindow([3, 4], dim=2, total_frames=6)
    window.causal_anchor_index = 2
    original, x = torch.randn(1, 4, 7, 8, 8), torch.randn(1, 4, 4, 8, 8)
    frames = _frames(original, x, {"transformer_options": {"context_window": window}})
    assert torch.equal(frames, torch.cat([original[:, :, 2:5], x[:, :, 3:]], dim=2))

"""Controls in windows: an echo of a control's hint adds up to what the host gives it for the whole picture."""
from __future__ import annotations

import comfy.controlnet
import comfy.latent_formats
import echo_patches
import pytest
import tiny_controls as controls
import torch
from comfy_extras.nodes_controlnet import ControlNetInpaintingAliMamaApply
from comfy_extras.nodes_model_patch import QwenImageDiffsynthControlnet, ZImageFunControlnet
from hosts import needs
from nodes import ConditioningSetArea, ConditioningSetMask, ConditioningSetTimestepRange, ControlNetApply, ControlNetApplyAdvanced
from seen import HEIGHT_PX, WIDTH_PX, assert_windows_see_their_part, denoised, every_batching, tiled
from tiny_controls import EchoVAE, echo_adapter, echo_control, echoed, picture
from tiny_models import drawer, load, with_prediction

from qtd_pack import control as pack_control
from qtd_pack.canvas import Canvas, cut_padded
from qtd_pack.patches import cut_patches
from qtd_pack.tiled_diffusion import KEY
from qtd_pack.utils import Rect


def flux_echo(**options):
    return echo_control(compression_ratio=1, latent_format=comfy.latent_formats.Flux(), **options)


def qwen_echo():
    return echo_control(compression_ratio=1, latent_format=comfy.latent_formats.Wan21())


# Family, control and VAE.
ECHOES = {
    "pixels": ("sd15", echo_control, None),
    "a VAE": ("flux_dev", flux_echo, EchoVAE),
    "a VAE for video": ("qwen_image", qwen_echo, lambda: EchoVAE(video=True)),
    "an adapter": ("sd15", echo_adapter, None),
    "an adapter of one channel": ("sd15", lambda: echo_adapter(channels_in=1), None),
    "an adapter of two cells": ("sd15", lambda: echo_adapter(unshuffle_amount=16), None),
}
every_echo = pytest.mark.parametrize("kind", ECHOES)


def prompts(name: str) -> tuple[list, list]:
    """As CLIPTextEncodeSDXL leaves them: the size is the picture's, whatever is sampled of it."""
    size = {"width": WIDTH_PX, "height": HEIGHT_PX}
    return tuple([[tokens, extras | size] for tokens, extras in conds(HEIGHT_PX, WIDTH_PX)] for conds in (load(name).positive, load(name).negative))


def controlled(name: str, control, hint=None, vae=None, conds=None, strength=1.0, start=0.0, end=1.0) -> tuple[list, list]:
    hint = picture(HEIGHT_PX, WIDTH_PX) if hint is None else hint
    return ControlNetApplyAdvanced().apply_controlnet(*(conds or prompts(name)), control, hint, strength, start, end, vae=vae)


def of_kind(kind: str, hint=None, **options) -> tuple:
    """A model and its conditionings under an echo of this kind."""
    name, make, make_vae = ECHOES[kind]
    return load(name), *controlled(name, make(), hint, make_vae and make_vae(), **options)


@every_batching
@every_echo
def test_a_window_sees_its_part_of_the_hint(kind, tiling):
    model, positive, negative = of_kind(kind)
    assert_windows_see_their_part(model, echoed, positive, negative, tiling=tiling)


@every_echo
def test_cond_and_uncond_see_their_part_of_the_hint(kind):
    model, positive, negative = of_kind(kind)
    assert_windows_see_their_part(model, echoed, positive, negative, tiling=dict(tile_batch_size=3), cfg=4.0)


def test_an_adapter_of_two_cells_in_windows_of_an_odd_number():
    model, positive, negative = of_kind("an adapter of two cells")
    assert_windows_see_their_part(model, echoed, positive, negative, latent=model.latent(120, WIDTH_PX), tiling={})


def test_an_adapter_serves_batches_of_any_size():
    """At the second step one of its conditionings has ended: fewer rows share its batch."""
    model, positive, negative = of_kind("an adapter")
    positive = positive + ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)[0]
    assert_windows_see_their_part(model, echoed, positive, negative, tiling=dict(tile_batch_size=3), cfg=4.0)


def test_what_a_vae_sees_beyond_a_window_is_the_picture():
    size = 200, 264
    conds = controlled("flux_dev", flux_echo(), picture(*size), controls.vae())
    assert_windows_see_their_part(load("flux_dev"), echoed, *conds, latent=load("flux_dev").latent(*size), tiling={})


@pytest.mark.parametrize("size", [(204, 268), (1000, 1100), (72, 536), (816, 1072)])
@pytest.mark.parametrize("kind", ["pixels", "a VAE", "an adapter"])
def test_a_hint_of_another_size_is_that_of_the_whole(kind, size):
    model, positive, negative = of_kind(kind, picture(*size))
    assert_windows_see_their_part(model, echoed, positive, negative, tiling={})


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("hints", [2, 3, 4])
@pytest.mark.parametrize("kind", ["pixels", "an adapter"])
def test_images_of_a_batch_keep_their_hints(kind, hints, cfg):
    model, positive, negative = of_kind(kind, picture(HEIGHT_PX, WIDTH_PX, batch=hints))
    latent = model.latent(HEIGHT_PX, WIDTH_PX, batch=3)
    assert_windows_see_their_part(model, echoed, positive, negative, tiling=dict(tile_batch_size=3), latent=latent, cfg=cfg)


@every_batching
def test_chained_controls_add_up(tiling):
    conds = controlled("sd15", echo_control(), strength=0.5)
    conds = controlled("sd15", echo_control(), picture(HEIGHT_PX, WIDTH_PX, seed=8), conds=conds, strength=2.0)
    conds = controlled("sd15", echo_adapter(), picture(HEIGHT_PX, WIDTH_PX, seed=9), conds=conds)
    assert_windows_see_their_part(load("sd15"), echoed, *conds, tiling=tiling, cfg=4.0)


@pytest.mark.parametrize("start, end", [(0.0, 0.5), (0.5, 1.0), (0.2, 0.5)])
def test_start_and_end_per_cent_hold_for_windows(start, end):
    conds = controlled("sd15", echo_control())
    conds = controlled("sd15", echo_control(), picture(HEIGHT_PX, WIDTH_PX, seed=8), conds=conds, start=start, end=end)
    assert_windows_see_their_part(load("sd15"), echoed, *conds, tiling={})


def half_mask(left: bool) -> torch.Tensor:
    mask = torch.zeros(1, HEIGHT_PX, WIDTH_PX)
    mask[..., slice(0, 300) if left else slice(200, WIDTH_PX)] = 1
    return mask


@pytest.mark.parametrize("kind", ["pixels", "a VAE", "an adapter"])
@every_batching
def test_two_controls_on_two_masked_conditionings_keep_apart_at_every_step(kind, tiling):
    """Caches by shape alone give both of them one hint from the second step on."""
    parts = []
    for left in (True, False):
        model, positive, _ = of_kind(kind, picture(HEIGHT_PX, WIDTH_PX, seed=7 + left))
        parts += ConditioningSetMask().append(positive, half_mask(left), "default", 1.0)[0]
    assert_windows_see_their_part(model, echoed, parts, model.negative(HEIGHT_PX, WIDTH_PX), tiling=tiling, cfg=4.0, percents=(0.2, 0.4, 0.6, 0.8))


@pytest.mark.parametrize("kind", ["pixels", "a VAE"])
@every_batching
def test_the_hint_of_an_area_covers_the_area(kind, tiling):
    model, positive, negative = of_kind(kind)
    positive = ConditioningSetArea().append(positive, 320, 240, 120, 88, 1.0)[0]
    assert_windows_see_their_part(model, echoed, positive, negative, tiling=tiling)


@pytest.mark.parametrize("mask_size", [(HEIGHT_PX, WIDTH_PX), (100, 300), None])
@every_batching
def test_an_inpainting_control_sees_its_part_of_the_mask(tiling, mask_size):
    control, vae = flux_echo(concat_mask=True), EchoVAE()
    if mask_size is None:
        conds = controlled("flux_dev", control, vae=vae)
    else:
        mask = picture(*mask_size, seed=9)[..., 0]
        conds = ControlNetInpaintingAliMamaApply.execute(*prompts("flux_dev"), control, vae, picture(HEIGHT_PX, WIDTH_PX), mask, 1.0, 0.0, 1.0)
    assert_windows_see_their_part(load("flux_dev"), echoed, conds[0], conds[1], tiling=tiling)


def test_the_old_node_without_a_negative_works_too():
    positive = ControlNetApply().apply_controlnet(prompts("sd15")[0], echo_control(), picture(HEIGHT_PX, WIDTH_PX), 1.0)[0]
    assert_windows_see_their_part(load("sd15"), echoed, positive, prompts("sd15")[1], tiling={}, cfg=4.0)


def batches_of(name: str, conds, cfg=4.0, **settings) -> list:
    """The calls of a tiled run of two steps."""
    model, calls = load(name), []
    patcher = with_prediction(tiled(model.patcher, **settings), lambda call: calls.append(call) or echoed(call))
    denoised(patcher, model.latent(HEIGHT_PX, WIDTH_PX), *conds, cfg=cfg)
    return calls


def test_cond_and_uncond_share_a_batch_under_one_control():
    calls = batches_of("sd15", controlled("sd15", echo_control()), tile_batch_size=5)
    assert {tuple(call.transformer_options["cond_or_uncond"]) for call in calls} == {(1, 0)}
    assert {call.x.shape[0] for call in calls} == {10, 4}


def test_a_hint_is_encoded_once_in_a_run():
    vae = EchoVAE()
    batches_of("flux_dev", controlled("flux_dev", flux_echo(), vae=vae), tile_batch_size=2)
    assert vae.sizes == [(HEIGHT_PX, WIDTH_PX)]


def test_a_hint_is_prepared_once_for_each_window_and_not_at_each_step():
    prepared = []
    control = echo_control(preprocess_image=lambda hint: prepared.append(hint.shape) or hint)
    calls = batches_of("sd15", controlled("sd15", control), tile_batch_size=1)
    assert len(calls) == 2 * len(prepared)


def test_an_adapter_runs_once_for_each_window_and_not_at_each_step():
    control, runs = echo_adapter(), []
    control.t2i_model.register_forward_hook(lambda *arguments: runs.append(1))
    calls = batches_of("sd15", controlled("sd15", control), tile_batch_size=2)
    assert len(calls) == 2 * len(runs)


def test_windows_that_are_gone_leave_nothing_behind():
    held = []

    def count(call):
        held.append(len(call.transformer_options[KEY].ledger.copies))
        return echoed(call)
    model = load("sd15")
    patcher = with_prediction(tiled(model.patcher, method="SpotDiffusion", tile_batch_size=1), count)
    denoised(patcher, model.latent(HEIGHT_PX, WIDTH_PX), *controlled("sd15", echo_control()), percents=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    assert len(held) > 100
    assert max(held) < 40


@every_echo
def test_the_users_control_is_not_changed(kind):
    model, positive, negative = of_kind(kind)
    control = positive[0][1]["control"]
    before = dict(vars(control))
    denoised(with_prediction(tiled(model.patcher), echoed), model.latent(HEIGHT_PX, WIDTH_PX), positive, negative, cfg=4.0)
    assert control is positive[0][1]["control"] and type(control).__module__ == "comfy.controlnet"
    assert vars(control).keys() == before.keys()
    assert all(vars(control)[name] is value for name, value in before.items())


@needs("controls for several devices", hasattr(comfy.controlnet.ControlBase, "deepclone_multigpu"))
def test_each_device_has_its_windows():
    from qtd_pack.control import cut_control
    from qtd_pack.utils import Rect
    hint, device = picture(HEIGHT_PX, WIDTH_PX).movedim(-1, 1), torch.device("meta")
    control = echo_control().set_cond_hint(hint)
    control.previous_controlnet = echo_control().set_cond_hint(hint.flip(-1))
    clone = control.deepclone_multigpu(controls.CPU)
    clone.previous_controlnet = control.previous_controlnet.deepclone_multigpu(controls.CPU)
    control.multigpu_clones[device] = clone
    canvas = Canvas(load("sd15").patcher.model, (1, 4, 51, 67), controls.CPU, 8, {}, {})
    part = cut_control(control, [Rect(8, 16, 24, 40)], Rect(0, 0, 51, 67), canvas).get_instance_for_device(device)
    assert part.control_model is clone.control_model
    assert torch.equal(part.cond_hint_original, hint[..., 64:192, 128:320])
    assert torch.equal(part.previous_controlnet.cond_hint_original, hint.flip(-1)[..., 64:192, 128:320])


# Family, control and whether it needs a VAE, as the windows of a real network see them.
NETWORKS = {
    "sd15_controlnet": ("sd15", None), "sdxl_controlnet": ("sdxl", None), "flux_controlnet": ("flux_dev", EchoVAE), "flux_pixel_controlnet": ("flux_dev", None),
    "sd3_controlnet": ("sd3", EchoVAE), "qwen_controlnet": ("qwen_image", lambda: EchoVAE(video=True)), "t2i_adapter": ("sd15", None),
    "t2i_adapter_xl": ("sdxl", None), "t2i_adapter_light": ("sd15", None),
}


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_window_is_what_the_host_makes_of_that_part_alone(kind, windows):
    name, make_vae = NETWORKS[kind]
    model, hint, control, vae = load(name), picture(256, 256), getattr(controls, kind)(), make_vae and make_vae()
    latent = model.latent(256, 256)
    noise = drawer(5)(*latent.shape)
    settings = dict(min_window=128, max_window=128, tile_overlap=0, tile_batch_size=windows)
    out = denoised(tiled(model.patcher, 256, 256, **settings), latent, *controlled(name, control, hint, vae), cfg=3.0, noise=noise, percents=(0.3,))
    for top, left in ((0, 0), (0, 16), (16, 0), (16, 16)):
        cells, px = (..., slice(top, top + 16), slice(left, left + 16)), (slice(None), slice(8 * top, 8 * top + 128), slice(8 * left, 8 * left + 128))
        alone = denoised(model.patcher, latent[cells], *controlled(name, control, hint[px], vae), cfg=3.0, noise=noise[cells], percents=(0.3,))
        assert (out[cells] - alone).abs().max() < 1e-4


every_patch = pytest.mark.parametrize("kind", echo_patches.kinds())


def sizes_px(name: str) -> tuple[int, int]:
    """A UNet's windows are multiples of 8 cells."""
    return (200, 264) if name != "sdxl" else (HEIGHT_PX, WIDTH_PX)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@every_batching
@every_patch
def test_a_model_patch_has_the_windows_part_of_its_picture(kind, tiling, cfg):
    name, put_on, read = echo_patches.ECHOES[kind]
    model, size = load(name), sizes_px(name)
    patcher = put_on(model.patcher, picture(*size), mask=picture(*size, seed=9)[..., 0])
    settings = dict(min_window=96, max_window=96) | tiling
    assert_windows_see_their_part(model, read, *prompts(name), patcher=patcher, latent=model.latent(*size), tiling=settings, cfg=cfg)


@pytest.mark.parametrize("image_size, mask_size", [((104, 136), (200, 264)), ((336, 264), (96, 96)), ((200, 264), (400, 528))])
@pytest.mark.parametrize("kind", echo_patches.kinds("Qwen-Image DiffSynth", "Z-Image Fun", "Anima LLLite"))
def test_pictures_and_masks_of_other_sizes_are_those_of_the_whole(kind, image_size, mask_size):
    name, put_on, read = echo_patches.ECHOES[kind]
    patcher = put_on(load(name).patcher, picture(*image_size), mask=picture(*mask_size, seed=9)[..., 0])
    assert_windows_see_their_part(
        load(name), read, *prompts(name), patcher=patcher, latent=load(name).latent(200, 264), tiling=dict(min_window=96, max_window=96))


@pytest.mark.parametrize("kind, vae", [("Qwen-Image DiffSynth", EchoVAE(video=True)), ("Z-Image Fun", EchoVAE()), 
    pytest.param("Uni3C", echo_patches.FramesVAE(), marks=echo_patches.NEEDED["Uni3C"])])
def test_a_picture_is_encoded_once_in_a_run_and_the_users_patch_is_not_changed(kind, vae):
    name, put_on, read = echo_patches.ECHOES[kind]
    patcher = put_on(load(name).patcher, picture(200, 264), vae=vae)
    (patch,) = patcher.model_options["transformer_options"]["patches"]["double_block"]
    before = dict(vars(patch))
    vae.sizes.clear()
    patcher = with_prediction(tiled(patcher, 200, 264, min_window=96, max_window=96, tile_batch_size=1), read)
    denoised(patcher, load(name).latent(200, 264), *prompts(name))
    # Z-Image samples whole patches: 25 x 33 cells are 26 x 34.
    assert vae.sizes == [(200, 264) if kind == "Qwen-Image DiffSynth" else (208, 272)]
    assert vars(patch).keys() == before.keys() and all(vars(patch)[name] is value for name, value in before.items())


@echo_patches.NEEDED["Uni3C"]
def test_a_video_is_encoded_for_as_many_frames_as_are_sampled():
    """A context window at the end of a video may have fewer."""
    patcher, prepared, shapes = echo_patches.with_uni3c(load("wan21_t2v").patcher, picture(64, 64)), {}, []
    options = patcher.model_options["transformer_options"]
    for frames in (3, 2):
        canvas = Canvas(patcher.model, (1, 16, frames, 8, 8), controls.CPU, 2, prepared, {})
        (patch,) = cut_patches(options, [Rect(0, 0, 4, 8)], canvas)["patches"]["double_block"]
        shapes.append(tuple(patch.prepared_render.shape[2:]))
    assert shapes == [(3, 4, 8), (2, 4, 8)]


def test_other_patches_pass_as_they_are():
    model, seen = load("sd15"), set()
    patcher = model.patcher.clone()
    patcher.set_model_attn1_patch(test_other_patches_pass_as_they_are)
    patcher = with_prediction(tiled(patcher), lambda call: seen.update(call.transformer_options["patches"]["attn1_patch"]) or call.x)
    denoised(patcher, model.latent(HEIGHT_PX, WIDTH_PX), *prompts("sd15"))
    assert seen == {test_other_patches_pass_as_they_are}


PATCH_NETWORKS = {
    "qwen_diffsynth_patch": ("qwen_image", QwenImageDiffsynthControlnet, lambda: EchoVAE(video=True)),
    "z_image_fun_patch": ("z_image", ZImageFunControlnet, EchoVAE),
}


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("kind", PATCH_NETWORKS)
def test_a_window_under_a_model_patch_is_what_the_host_makes_of_that_part_alone(kind, windows, inpaint):
    name, node, make_vae = PATCH_NETWORKS[kind]
    model, image, network = load(name), picture(256, 256), getattr(controls, kind)(inpaint)
    mask = picture(256, 256, seed=9)[..., 0].round() if inpaint else None

    def under_patch(px) -> object:
        return node().diffsynth_controlnet(model.patcher, network, make_vae(), image[px], 1.0, mask=mask if mask is None else mask[px])[0]
    latent = model.latent(256, 256)
    noise = drawer(5)(*latent.shape)
    settings = dict(min_window=128, max_window=128, tile_overlap=0, tile_batch_size=windows)
    out = denoised(tiled(under_patch(...), 256, 256, **settings), latent, *prompts(name), cfg=3.0, noise=noise, percents=(0.3,))
    for top, left in ((0, 0), (0, 16), (16, 0), (16, 16)):
        cells, px = (..., slice(top, top + 16), slice(left, left + 16)), (slice(None), slice(8 * top, 8 * top + 128), slice(8 * left, 8 * left + 128))
        alone = denoised(under_patch(px), latent[cells], *prompts(name), cfg=3.0, noise=noise[cells], percents=(0.3,))
        assert (out[cells] - alone).abs().max() < 1e-4


def test_two_windows_of_two_images_have_a_row_of_the_one_hint_each():
    hint = torch.arange(4.0).expand(1, 1, 2, 4)
    cut = cut_padded(hint, [Rect(0, 0, 2, 2), Rect(0, 2, 2, 4)], (2, 4), 1, 1, rows=2)
    assert cut[:, 0, 0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_windows_part_of_a_hint_is_cut_once_in_a_run_whatever_the_number_of_its_steps(monkeypatch):
    model, cut, counts = load("sd15"), pack_control._cut_hint, []
    positive, _ = controlled("sd15", echo_control(), hint=picture(256, 256))
    monkeypatch.setattr(pack_control, "_cut_hint", lambda part, view: counts.append(view.rects) or cut(part, view))
    for percents in ((0.3,), (0.3, 0.5, 0.7)):
        patcher = with_prediction(tiled(model.patcher, 256, 256, tile_overlap=0, tile_batch_size=1), echoed)
        denoised(patcher, model.latent(256, 256), positive, percents=percents)
    assert len(counts) == 2 * 4 and set(counts[:4]) == set(counts[4:])

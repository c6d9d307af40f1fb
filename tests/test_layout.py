"""Windows that follow one layout: what the look at the whole sees, what it costs, and what is left as it is."""
from __future__ import annotations

import math
import threading
import types

import comfy.hooks
import comfy.model_base
import comfy.model_management
import echo_patches
import foreign_patches
import pytest
import tiny_controls as controls
import torch
import torch.nn.functional as F
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from device_keys import KEYS, on_devices, with_fault
from nodes import ConditioningSetArea, ConditioningSetMask, ConditioningSetTimestepRange, ControlNetApplyAdvanced
from sampling import SIDE_PX, calls_of, even_tree, load, patched, sample, striped_tree
from seen import denoised, tiled
from test_control import prompts, sizes_px
from test_prompts import columns, counted, prompt, prompted, regional, soft_masks
from tiny_models import FAMILIES, drawer, recorded, with_prediction

from qtd_pack.layout import Look, _means, _sigma_of_means, follow, hold_of
from qtd_pack.prompts import region_conditioning
from qtd_pack.quadtree import Leaf, Quadtree
from qtd_pack.tiled_diffusion import TiledDiffusion
from qtd_pack.utils import Rect

MODEL = "flux_schnell"
# In cells 50 x 66 and 48 x 64: of the first, what the look leaves out is as what is next to it.
ODD, EVEN = (400, 528), (384, 512)
# Windows of two sizes, one alone and several at once, the methods, and a picture that goes on over its border.
every_way = pytest.mark.parametrize("way", [
    dict(tile_batch_size=1), dict(min_window=64, tile_overlap=16), dict(method="MultiDiffusion"), dict(method="SpotDiffusion"), dict(wrap="both"), dict(wrap="horizontal")],
    ids=["mixture", "two sizes", "multi", "spot", "ring", "panorama"])


def looks(calls) -> list:
    """The calls that see the whole picture small, by their sigmas, which are none of the sampler's."""
    return [call for call in calls if not bool((call.transformer_options["sample_sigmas"] == call.sigma.flatten()[0]).any())]


def outcomes(model, predict, positive, size, *, cfg=1.0, negative=None, **way) -> list[torch.Tensor]:
    """What windows give without a look and with one, of a model that says the same of each cell whatever it sees."""
    latent = model.latent(*size)
    return [
        denoised(with_prediction(tiled(model.patcher, *size, hold_layout=hold, **way), predict), latent, positive, negative, cfg=cfg, percents=(0.1, 0.3, 0.5))
        for hold in (0.0, 1.0)]


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "EDM", "V_PREDICTION_CONTINUOUS", "FLOW", "FLUX", "FLOW_COSMOS"])
@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("percent", [0.02, 0.3, 0.8])
def test_the_look_is_a_latent_of_the_sigma_that_the_model_is_told(kind, factor, percent):
    """Of an even picture: the means of a latent at one sigma are a latent at the other, in the family's own mixture."""
    sampling = comfy.model_base.model_sampling(types.SimpleNamespace(sampling_settings={}), comfy.model_base.ModelType[kind])
    sigma = float(sampling.percent_to_sigma(percent))
    small, scale = _sigma_of_means(sampling, sigma, factor)
    noise = drawer(1)(1, 1, 60 * factor, 60 * factor)
    x = sampling.noise_scaling(torch.tensor([sigma]), noise, torch.full_like(noise, 3.0))
    means = factor * _means(noise, factor)
    assert 0.9 < float(means.std()) < 1.1 and 0 < small < sigma
    assert torch.allclose(scale * _means(x, factor), sampling.noise_scaling(torch.tensor([small]), means, torch.full_like(means, 3.0)), rtol=1e-3, atol=1e-3)


@every_way
@pytest.mark.parametrize("size", [ODD, EVEN], ids=["odd", "even"])
def test_a_model_that_says_the_same_of_each_cell_is_not_changed_by_the_look(way, size):
    model = load("sd15")
    without, held = outcomes(model, prompted, prompt(0.5), size, **way)
    assert (without - held).abs().max() < 1e-5


# Half the picture's prompt is 1, the other's 2; columns are whole cells of the look, which is of 2 or of 4 cells.
PLACED = {
    "masks": lambda size: regional(columns(size[1] // 2, size[1] // 2, height=size[0]), False),
    "masks above each other": lambda size: regional([mask.mT for mask in columns(size[0] // 2, size[0] // 2, height=size[1])], False),
    "masks and a share": lambda size: regional(columns(size[1] // 2, size[1] // 2, height=size[0]), False, 0.25),
    "areas": lambda size: ConditioningSetArea().append(prompt(1.0), size[1] // 2, size[0], 0, 0, 1.0)[0] + ConditioningSetArea().append(prompt(2.0), size[1] // 2, size[0], size[1] // 2, 0, 1.0)[0],
}


@every_way
@pytest.mark.parametrize("placed", PLACED)
def test_prompts_lie_where_they_lie_in_the_picture(placed, way):
    model, positive = load("sd15"), PLACED[placed](EVEN)
    calls = []
    outs = outcomes(model, lambda call: calls.append(call) or prompted(call), positive, EVEN, negative=prompt(0.5), cfg=3.0, **way)
    assert outs[0].std() > 0.2
    # 48 x 64 cells in windows of 16 x 16 to 22 x 22: as many become one on a ring. Of an area the host makes a picture of its own.
    assert {tuple(call.x.shape[-2:]) for call in looks(calls)} == ({(8, 8)} if placed == "areas" else set()) | {(8, 16)}
    # The host fades an area's edges over cells, of which the look has fewer.
    near = (outs[0] - outs[1]).abs()
    assert near.max() < (0.5 if placed == "areas" else 1e-5) and near[..., 2:14, 2:14].max() < 1e-5


def test_soft_masks_keep_their_weights():
    without, held = outcomes(load("sd15"), prompted, regional(soft_masks(*EVEN), False), EVEN)
    assert without.std() > 0.2 and (without - held).abs().max() < 0.02


@pytest.mark.parametrize("name, said", [
    ("flux_kontext", lambda call: call.conds["ref_latents"][0][..., :call.x.shape[-2], :call.x.shape[-1]]), ("sd15_inpaint", lambda call: call.c_concat[:, -4:])],
    ids=["reference", "picture beside"])
def test_pictures_beside_the_latent_are_shown_small(name, said):
    """The model gives back what it is shown: what is slow in that is the same small, so the windows' result stays."""
    model = load(name)
    calls = []
    positive = model.positive(*EVEN)
    without, held = outcomes(model, lambda call: calls.append(call) or said(call).expand_as(call.x).clone(), positive, EVEN)
    assert {tuple(said(call).shape[-2:]) == tuple(call.x.shape[-2:]) for call in looks(calls)} == {True}
    assert without.std() > 0.1 and (without - held).abs().max() < 1e-4


def test_prompts_are_on_when_the_sampler_is_there_and_not_when_the_look_is():
    """One until three tenths of the schedule, the other from then on."""
    model, calls = load("sd15"), []
    parts = [ConditioningSetTimestepRange().set_range(prompt(value), start, end)[0] for value, start, end in ((1.0, 0.0, 0.25), (2.0, 0.25, 1.0))]
    patcher = tiled(model.patcher, *EVEN, hold_layout=1.0)
    denoised(with_prediction(patcher, lambda call: calls.append(call) or prompted(call)), model.latent(*EVEN), parts[0] + parts[1], percents=(0.1, 0.3, 0.5))
    assert [round(float(call.context.mean()), 3) for call in looks(calls)] == [1.0, 2.0, 2.0]


def drifted(call):
    """A model whose every call has a tone of its own, by its noise, and a fine pattern."""
    out = 20 * call.x.mean((1, 2, 3), keepdim=True).expand_as(call.x).clone()
    out[..., ::2, :] += 0.25
    out[..., 1::2, :] -= 0.25
    return out


def test_windows_of_tones_of_their_own_follow_the_look_and_keep_their_pattern():
    """In windows of 64 cells without overlap: squares of 64 cells differ, or are as the look is, which shows the pattern, too, but too large for it."""
    model = load(MODEL)
    outs = outcomes(model, drifted, model.positive(1536, 1536), (1536, 1536), min_window=512, max_window=512, tile_overlap=0)
    spreads = [float(F.avg_pool2d(out[0, 0], 64).std(dim=(-2, -1)).mean()) for out in outs]
    assert spreads[0] > 0.03 and spreads[1] < spreads[0] / 3
    patterns = [out[0][..., 20:28, 20:28].diff(dim=-2).mean((0, 1, 3)) for out in outs]
    assert torch.allclose(patterns[0].abs(), torch.tensor(0.5), atol=0.05) and torch.allclose(*patterns, atol=0.05)


def test_the_hold_falls_with_every_step_and_sooner_where_the_strength_is_lower():
    strengths = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(torch.stack([hold_of(0.8, strengths, progress) for progress in (0.0, 0.5, 1.0)]), torch.tensor([[0, 0.4, 0.8], [0, 0, 0.4], [0, 0, 0]]))


@pytest.mark.parametrize("schedule", ["img2img", "blend", "ramp"])
@pytest.mark.parametrize("wrap", ["none", "both"])
def test_what_is_kept_is_exact(schedule, wrap):
    model = load(MODEL)
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, patched(model, striped_tree(0.0, 1.0), schedule=schedule, hold_layout=1.0, wrap=wrap), latent)
    assert torch.equal(out[..., :16], latent[..., :16])
    assert not torch.equal(out[..., 16:], sample(model, patched(model, striped_tree(0.0, 1.0), schedule=schedule, wrap=wrap), latent)[..., 16:])


def test_kept_parts_do_not_lead_what_is_beside_them():
    """A model that gives one answer, far from the original: the look of the kept half differs from it, and is not followed."""
    model = load(MODEL)
    outs = [
        sample(model, with_prediction(patched(model, striped_tree(0.0, 1.0), hold_layout=hold), lambda call: torch.full_like(call.x, 5.0)), steps=4) for hold in (0.0, 1.0)]
    assert (outs[0] - outs[1]).abs().max() < 0.05


def test_without_hold_nothing_changes():
    model = load(MODEL)
    assert torch.equal(sample(model, patched(model, even_tree(1.0))), sample(model, patched(model, even_tree(1.0), hold_layout=0.0)))


@pytest.mark.parametrize("strength, schedule, expected", [(1.0, "img2img", 4), (0.75, "img2img", 2), (0.5, "img2img", 0), (0.25, "img2img", 0), (0.5, "blend", 2)])
def test_a_look_costs_a_window_at_the_steps_that_need_it_and_nothing_at_others(strength, schedule, expected):
    """Of 4 steps. 32 x 32 cells in windows of at most 16: the look has as many."""
    model, rows = load(MODEL), []
    for hold in (0.0, 1.0):
        patcher = patched(model, even_tree(strength), hold_layout=hold, schedule=schedule, tile_batch_size=1)
        with calls_of(patcher) as shapes:
            sample(model, patcher)
        rows.append([math.prod(shape[-2:]) * shape[0] for shape in shapes])
    assert len(rows[1]) - len(rows[0]) == expected
    assert sum(rows[1]) - sum(rows[0]) == expected * 16 * 16


def test_what_the_run_says_of_its_cost_counts_the_looks(caplog):
    caplog.set_level("INFO")
    model, lines = load(MODEL), []
    for hold in (0.0, 1.0):
        told = []
        sample(model, patched(model, even_tree(1.0), hold_layout=hold, tell=lambda line, **values: told.append(values)))
        lines.append(told[-1])
    assert lines[1]["windows"] == lines[0]["windows"] + 4 and lines[1]["cost"] > lines[0]["cost"]
    assert lines[1]["cost"] * lines[1]["grid_windows"] == pytest.approx(lines[0]["cost"] * lines[0]["grid_windows"] + 4, rel=0.2)


def test_one_window_is_plain_sampling_and_asks_nothing_more():
    model = load(MODEL)
    latent = model.latent(SIDE_PX, SIDE_PX)
    patcher = patched(model, even_tree(1.0), min_window=512, max_window=512, hold_layout=1.0)
    with calls_of(patcher) as shapes:
        out = sample(model, patcher, latent)
    assert torch.equal(out, sample(model, model.patcher, latent)) and len(shapes) == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_look_of_whole_patches(name, caplog):
    """Or says why not; kept cells stay exact, and the rest is numbers."""
    model = load(name)
    size = 12 * 4 * model.cell_px, 16 * 4 * model.cell_px
    latent = model.latent(*size)
    tree = striped_tree(0.0, 1.0, leaf=size[1] // 2, height=size[0])
    patcher, calls = recorded(TiledDiffusion(tree, min_window=16 * model.cell_px, max_window=16 * model.cell_px, tile_overlap=0, hold_layout=1.0).patched(model.patcher))
    out = sample(model, patcher, latent, size=size, steps=2, cfg=3.0)
    assert torch.equal(out[..., :32], latent[..., :32]) and out.isfinite().all()
    found = looks(calls)
    assert found or "hold_layout: " in caplog.text
    for call in found:
        assert call.x.shape[-2:].numel() <= 16 * 16 and all(length % model.patch_cells == 0 for length in call.x.shape[-2:])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["flux_schnell", "sd15", "wan21_t2v"])
def test_images_of_a_batch_each_have_a_layout_of_their_own(name, batch):
    model = load(name)
    latent, noise = model.latent(SIDE_PX, SIDE_PX, batch=batch), drawer(4)(*model.latent_shape(SIDE_PX, SIDE_PX, batch))
    settings = dict(hold_layout=1.0, tile_overlap=0)
    together = sample(model, patched(model, even_tree(1.0), **settings), latent, noise=noise, cfg=3.0)
    for index in range(batch):
        alone = sample(model, patched(model, even_tree(1.0), **settings), latent[index:index + 1], noise=noise[index:index + 1], cfg=3.0)
        assert (together[index:index + 1] - alone).abs().max() < 1e-3


def hooked(positive):
    return comfy.hooks.set_hooks_for_conditioning(positive, comfy.hooks.create_hook_lora({}, 1.0, 1.0))


def controlled(positive):
    return ControlNetApplyAdvanced().apply_controlnet(positive, positive, controls.echo_control(), torch.rand(1, SIDE_PX, SIDE_PX, 3), 1.0, 0.0, 1.0)[0]


def boxed(positive):
    return [[text, values | {"gligen": ("position", controls.echo_gligen(), [(torch.ones(1, 64), 8, 8, 0, 0)])}] for text, values in positive]


@pytest.mark.parametrize("change, why", [
    (controlled, "a control shows each window its part"), (hooked, "hooks follow the sampler's sigmas"), (boxed, "GLIGEN's boxes are placed in the picture")])
def test_what_cannot_be_shown_small_is_told_once_and_windows_are_as_without(change, why, caplog):
    model = load("sd15")
    positive, negative, latent = change(model.positive(SIDE_PX, SIDE_PX)), model.negative(SIDE_PX, SIDE_PX), model.latent(SIDE_PX, SIDE_PX)
    outs = [denoised(patched(model, even_tree(1.0), hold_layout=hold, tile_overlap=0), latent, positive, negative, cfg=3.0) for hold in (0.0, 1.0)]
    assert torch.equal(*outs)
    assert caplog.text.count(f"hold_layout: {why}, so windows follow no common layout") == 1


def test_what_compares_one_call_with_the_next_gets_no_look(caplog):
    model = load(MODEL)
    outs = [
        sample(model, EasyCacheNode.execute(patched(model, even_tree(1.0), hold_layout=hold), 3.0, 0.1, 0.9, False)[0], steps=8) for hold in (0.0, 1.0)]
    assert torch.equal(*outs) and caplog.text.count("hold_layout: EasyCache compares one call of the model with the one before") == 1


def test_guidance_that_asks_the_model_once_more_is_held_too():
    model = load("sd15")
    patcher = PerturbedAttentionGuidance.execute(patched(model, even_tree(1.0), hold_layout=1.0, tile_overlap=0), 3.0)[0]
    patcher, calls = recorded(patcher)
    assert sample(model, patcher, cfg=3.0, steps=2).isfinite().all()
    assert len(looks(calls)) == 4


def test_a_picture_thinner_than_what_becomes_one_cell_is_told_and_sampled(caplog):
    model = load(MODEL)
    out = denoised(tiled(model.patcher, 16, 1024, hold_layout=1.0), model.latent(16, 1024), model.positive(16, 1024))
    assert out.isfinite().all() and "hold_layout: the picture is too small" in caplog.text


@pytest.mark.parametrize("hold", [-0.1, 1.5, float("nan")])
def test_a_hold_that_is_no_share_is_refused(hold):
    with pytest.raises(ValueError, match="hold_layout: expected 0 to 1, got"):
        TiledDiffusion(even_tree(1.0), hold_layout=hold)


@pytest.mark.parametrize("kind", foreign_patches.KINDS)
def test_patches_that_hold_a_mask_are_told_and_go_on_as_without(kind, caplog):
    family, put = foreign_patches.KINDS[kind]
    model, mask = load(family), (controls.picture(SIDE_PX, SIDE_PX)[..., 0] > 0.5).float()
    outs = [sample(model, put(patched(model, even_tree(1.0), hold_layout=hold, tile_overlap=0), mask), steps=3, cfg=3.0) for hold in (0.0, 1.0)]
    assert torch.equal(*outs) and caplog.text.count("hold_layout: a patch holds something of the picture, so windows follow no common layout") == 1


@pytest.mark.parametrize("kind", echo_patches.kinds())
def test_pictures_in_patches_are_told_and_go_on_as_without(kind, caplog):
    family, put, read = echo_patches.ECHOES[kind]
    model, size = load(family), sizes_px(family)
    outs = [
        denoised(with_prediction(put(tiled(model.patcher, *size, hold_layout=hold, min_window=96, max_window=96), controls.picture(*size)), read), model.latent(*size), *prompts(family))
        for hold in (0.0, 1.0)]
    assert torch.equal(*outs) and outs[0].std() > 0.02
    assert caplog.text.count("hold_layout: a patch holds something of the picture, so windows follow no common layout") == 1


@pytest.mark.parametrize("row, col", [(0, 0), (1, 3), (5, 7), (6, 11)])
def test_what_is_seen_of_a_ring_is_followed_where_it_was_seen(row, col):
    """The look begins 8 rows and 16 columns before the latent's first, and four cells are one; rows beyond it are as the nearest."""
    look = Look(Rect(-8, -16, 20, 32), 4, torch.zeros(1), torch.zeros(1), [])
    nothing, seen = torch.zeros(1, 4, 32, 48), torch.zeros(1, 4, 7, 12)
    seen[0, 2, row, col] = 1
    out = follow(nothing, seen, look, torch.full((32, 48), 0.5), torch.ones(32, 48, dtype=torch.bool), nothing, 32, (True, True))
    rows, cols = ([(first + place) % length for place in range(4)] for first, length in ((4 * row - 8, 32), (4 * col - 16, 48)))
    block = out[0, 2][rows][:, cols]
    assert out.abs().max() == block.max() > 0.35 and out[0, [0, 1, 3]].abs().max() == 0
    beyond = torch.tensor([(place - 8) % 32 for place in range(28, 32)])
    assert torch.equal(out[0, 2, beyond], out[0, 2, 19:20].expand(4, -1))


def test_the_look_of_hold_layout_does_not_pay_for_what_is_outside_all_that_is_redrawn():
    tree = Quadtree(512, 512, 128, 128, tuple(
        Leaf(Rect(top, left, top + 128, left + 128), 128, 0.0, float(left < 256)) for top in range(0, 512, 128) for left in range(0, 512, 128)))
    aside = ConditioningSetMask().append(prompt(7.0), columns(256, 256, height=512)[1], "default", 1.0)[0]
    model, rows = load("sd15"), []
    patcher = TiledDiffusion(tree, min_window=128, max_window=128, tile_overlap=0, hold_layout=1.0).patched(model.patcher)
    denoised(with_prediction(patcher, counted(prompted, rows)), model.latent(512, 512), prompt(1.0) + aside, percents=(0.3,))
    assert {value for of_call in rows for value in of_call} == {1.0}


def test_what_the_run_says_of_its_cost_counts_each_prompt_of_a_look(caplog):
    """16 windows and 16 regions: a step is 32 rows of one size, twice the grid."""
    caplog.set_level("INFO")
    model, rows = load("sd15"), []
    patcher = TiledDiffusion(even_tree(1.0, 1024, 1024), min_window=256, max_window=256, tile_overlap=0, hold_layout=1.0).patched(model.patcher)
    denoised(
        with_prediction(patcher, counted(prompted, rows)), model.latent(1024, 1024), regional(soft_masks(1024, 1024, side=256, overlap=32), True), percents=(0.3,))
    assert sum(map(len, rows)) == 32
    assert "2.00 of the cost of the full grid's 16" in caplog.text


@pytest.mark.parametrize("hold", ["hold_tones", "hold_layout"])
def test_a_window_without_numbers_stays_alone(hold, caplog):
    """The prompt 7 of the left quarter gives NaN."""
    def predict(call):
        value = prompted(call).clone()
        value[call.context.mean((1, 2)) == 7.0] = float("nan")
        return value
    model = load("sd15")
    positive = region_conditioning(prompt(0.5), [prompt(7.0), prompt(2.0)], columns(128, 384, height=512), per_window=True, share=0.0)
    patcher = with_prediction(tiled(model.patcher, 512, 512, tile_overlap=0, **{hold: 0.5}), predict)
    out = denoised(patcher, model.latent(512, 512), positive, percents=(0.3,))[0]
    assert out.isnan().float().mean() == 0.25 and not out[..., 16:].isnan().any()
    assert "for 25 % of the picture, within 128 x 512 px at 0, 0" in caplog.text


def test_a_look_that_there_is_no_memory_for_is_left_out_once_and_for_all(caplog):
    """Windows of 64 px fit, the look of 128 px does not."""
    model, tried = load("flux_schnell"), []
    corners = Quadtree(256, 256, 64, 64, tuple(
        Leaf(Rect(top, left, top + 64, left + 64), 64, 0.0, float(top == left and top in (0, 192))) for top in range(0, 256, 64) for left in range(0, 256, 64)))
    settings = dict(min_window=64, max_window=256, tile_overlap=0)

    def full(number, device, x):
        if x.shape[-1] > 8:
            tried.append(number)
            raise comfy.model_management.OOM_EXCEPTION("no memory")
    short = with_fault(patched(model, corners, hold_layout=0.5, **settings), full)
    assert torch.equal(sample(model, short), sample(model, patched(model, corners, **settings)))
    assert len(tried) == 1 and caplog.text.count("hold_layout: there is no memory for a look at the whole picture, so windows follow no common layout") == 1


def test_a_look_goes_to_another_device_where_the_first_has_no_memory():
    many, main = on_devices(load("flux_schnell"), 2), threading.main_thread()
    patcher = patched(many, even_tree(1.0), tile_batch_size=1, min_window=64, max_window=64, tile_overlap=0, hold_layout=0.5)

    def full(number, device, x):
        # The look alone is evaluated in the sampler's own thread.
        if device == KEYS[0] and threading.current_thread() is main:
            raise comfy.model_management.OOM_EXCEPTION("no memory")
    assert torch.equal(sample(many, with_fault(patcher, full)), sample(many, patcher))

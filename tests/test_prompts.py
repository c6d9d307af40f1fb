"""Prompts of regions: which one a window gets, what it costs, and that nothing is asked that says nothing."""
from __future__ import annotations

import itertools

import comfy.conds
import comfy.hooks
import comfy.samplers
import pytest
import tiny_controls as controls
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_hooks import ConditioningSetDefaultAndCombine
from nodes import ConditioningSetArea, ConditioningSetMask, ConditioningSetTimestepRange, ControlNetApply, ControlNetApplyAdvanced
from sampling import even_tree
from seen import HEIGHT_PX, WIDTH_PX, assert_windows_see_their_part, denoised, every_batching, tiled
from test_conditioning import with_boxes
from tiny_models import TOKENS, drawer, load, with_prediction

from qtd_pack import conditioning
from qtd_pack.prompts import is_on, region_conditioning
from qtd_pack.quadtree import Leaf, Quadtree
from qtd_pack.reach import REGION
from qtd_pack.regions import plan_regions, region_masks
from qtd_pack.tiled_diffusion import TiledDiffusion
from qtd_pack.utils import Rect

SIDE = 512


def prompt(value: float, name: str = "sd15", tokens: int = TOKENS, **extras) -> list:
    """A prompt whose tokens all have one value."""
    (_, values), = load(name).positive(HEIGHT_PX, WIDTH_PX)
    return [[torch.full((1, tokens, load(name).family.text_dim), value), values | extras]]


def prompted(call) -> torch.Tensor:
    """The denoised value is the prompt's."""
    return call.context.mean((1, 2)).view(-1, *[1] * (call.x.ndim - 1)).expand_as(call.x).contiguous()


def counted(predict, rows: list):
    """A prediction that also lists the prompts of its rows."""
    def predicted(call):
        rows.append([round(value, 3) for value in call.context.mean((1, 2)).tolist()])
        return predict(call)
    return predicted


def columns(*widths: int, height: int = HEIGHT_PX) -> list[torch.Tensor]:
    """Masks of a picture's columns, px wide."""
    edges = [0, *itertools.accumulate(widths)]
    masks = torch.zeros(len(widths), 1, height, edges[-1])
    for mask, left, right in zip(masks, edges, edges[1:]):
        mask[..., left:right] = 1
    return list(masks)


def soft_masks(height: int = HEIGHT_PX, width: int = WIDTH_PX, side: int = 128, overlap: int = 40) -> list[torch.Tensor]:
    return region_masks(plan_regions(even_tree(1.0, height, width), height, width, side), height, width, overlap)


def regional(masks, per_window: bool, share: float = 0.0, whole=None, name: str = "sd15") -> list:
    """The whole picture's prompt is 0.5, the regions' are 1, 2, 3 ..."""
    whole = prompt(0.5, name) if whole is None else whole
    return region_conditioning(whole, [prompt(float(number), name) for number in range(1, len(masks) + 1)], masks, per_window=per_window, share=share)


@every_batching
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_by_the_cell_every_cell_gets_its_regions_prompts_by_their_weights(cfg, share, tiling):
    positive = regional(soft_masks(), False, share)
    assert_windows_see_their_part(load("sd15"), prompted, positive, prompt(0.5), cfg=cfg, tiling=tiling)


def test_by_the_cell_weights_add_up_to_what_was_said():
    """In two columns of prompts 1 and 2 with a share of a quarter of 0.5."""
    out = denoised(with_prediction(tiled(load("sd15").patcher), prompted), load("sd15").latent(HEIGHT_PX, WIDTH_PX), regional(columns(264, 272), False, 0.25))
    scale = 1.0
    assert torch.allclose(out[..., :32], torch.tensor(0.75 * 1 + 0.25 * 0.5) * scale, atol=1e-5)
    assert torch.allclose(out[..., 34:], torch.tensor(0.75 * 2 + 0.25 * 0.5) * scale, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", ["Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion"])
def test_by_the_window_each_gets_the_prompt_of_the_region_that_covers_most_of_it(method, batch):
    """Windows of 16 cells without overlap over columns of 10, 33 and 21 cells."""
    model, rows = load("sd15"), []
    patcher = tiled(model.patcher, SIDE, SIDE, method=method, tile_overlap=0, shift_method="sorted", seed=3)
    positive = regional(columns(80, 264, 168, height=SIDE), True)
    out = denoised(with_prediction(patcher, counted(prompted, rows)), model.latent(SIDE, SIDE, batch=batch), positive, percents=(0.3,))
    assert sum(map(len, rows)) >= 16 * batch
    if method != "SpotDiffusion":
        assert sum(map(len, rows)) == 16 * batch
        for col, expected in ((0, 1.0), (1, 2.0), (2, 2.0), (3, 3.0)):
            assert torch.allclose(out[..., 16 * col:16 * (col + 1)], torch.tensor(expected), atol=1e-5)
    assert set(out.unique().tolist()) <= {1.0, 2.0, 3.0}


def test_only_active_cells_count():
    """Two leaves of 256 px; in the left one a region of 64 px alone is redrawn, and it wins against the larger one."""
    tree = Quadtree(256, 256, 64, 64, tuple(
        Leaf(Rect(top, left, top + 64, left + 64), 64, 0.0, float(left == 192)) for top in range(0, 256, 64) for left in range(0, 256, 64)))
    model, rows = load("sd15"), []
    patcher = TiledDiffusion(tree, min_window=256, max_window=256, tile_overlap=0).patched(model.patcher)
    denoised(with_prediction(patcher, counted(prompted, rows)), model.latent(256, 256), regional(columns(192, 64, height=256), True))
    assert {value for of_call in rows for value in of_call} == {2.0}


def test_a_window_without_a_region_gets_the_whole_pictures_prompt():
    model, rows = load("sd15"), []
    masks = columns(128, 384, height=SIDE)[:1]
    out = denoised(
        with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), counted(prompted, rows)), model.latent(SIDE, SIDE), regional(masks, True), percents=(0.3,))
    assert torch.equal(out[..., :16].unique(), torch.tensor([1.0]))
    assert torch.equal(out[..., 16:].unique(), torch.tensor([0.5]))
    assert sum(map(len, rows)) == 16


def test_of_two_regions_that_cover_equally_much_the_lower_number_counts():
    model = load("sd15")
    out = denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), prompted), model.latent(SIDE, SIDE), regional(columns(192, 320, height=SIDE), True))
    assert torch.equal(out[..., 16:32].unique(), torch.tensor([1.0]))


def test_a_share_is_a_second_row_in_windows_that_have_a_region():
    model, rows = load("sd15"), []
    positive = regional(columns(256, 256, height=SIDE)[:1], True, 0.25)
    out = denoised(
        with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), counted(prompted, rows)), model.latent(SIDE, SIDE), positive, percents=(0.3,))
    assert torch.allclose(out[..., :32], torch.tensor(0.75 * 1 + 0.25 * 0.5), atol=1e-6)
    assert torch.allclose(out[..., 32:], torch.tensor(0.5), atol=1e-6)
    assert sum(map(len, rows)) == 8 * 2 + 8


@pytest.mark.parametrize("per_window", [True, False])
def test_a_share_of_one_is_the_whole_pictures_prompt_alone(per_window):
    model, rows = load("sd15"), []
    out = denoised(
        with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), counted(prompted, rows)), model.latent(SIDE, SIDE),
        regional(columns(256, 256, height=SIDE), per_window, 1.0), percents=(0.3,))
    assert torch.equal(out.unique(), torch.tensor([0.5])) and sum(map(len, rows)) == 16


def test_a_region_outside_its_time_does_not_win():
    model, rows = load("sd15"), []
    late = ConditioningSetTimestepRange().set_range(prompt(1.0), 0.5, 1.0)[0]
    positive = region_conditioning(prompt(0.5), [late, prompt(2.0)], columns(300, 212, height=SIDE), per_window=True, share=0.0)
    out = denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), counted(prompted, rows)), model.latent(SIDE, SIDE), positive)
    assert out[0, ..., :32].unique().tolist() == [0.5] and out[0, ..., 32:].unique().tolist() == [2.0]
    assert out[1, ..., :32].unique().tolist() == [1.0] and out[1, ..., 32:].unique().tolist() == [2.0]


@pytest.mark.parametrize("per_window, rows_of_a_prompt", [(True, 1), (False, 2.5)])
def test_prompts_for_sixteen_regions_cost_what_one_costs(per_window, rows_of_a_prompt):
    """A picture of 2048 px in windows of 512: by the window as one prompt, by the cell only those that lie in a window."""
    model, counts = load("sd15"), {}
    masks = soft_masks(2048, 2048, side=512, overlap=64)
    for name, positive in (("one", prompt(0.5)), ("regions", regional(masks, per_window))):
        rows: list = []
        patcher = TiledDiffusion(even_tree(1.0, 2048, 2048), min_window=512, max_window=512, tile_overlap=0).patched(model.patcher)
        denoised(with_prediction(patcher, counted(prompted, rows)), model.latent(2048, 2048), positive, prompt(0.25), percents=(0.3,), cfg=3.0)
        counts[name] = sum(map(len, rows)), len(rows)
    if per_window:
        assert counts["regions"][0] == counts["one"][0]
        assert counts["regions"][1] <= 1.1 * counts["one"][1]
    else:
        # Corners see four regions, borders six, the middle nine; beside the negative.
        assert counts["regions"][0] == 16 + 4 * 4 + 8 * 6 + 4 * 9


def test_a_masked_prompt_outside_all_that_is_redrawn_costs_nothing():
    tree = Quadtree(256, 256, 128, 128, tuple(
        Leaf(Rect(top, left, top + 128, left + 128), 128, 0.0, float(left == 0)) for top in (0, 128) for left in (0, 128)))
    model, rows = load("sd15"), []
    aside = ConditioningSetMask().append(prompt(7.0), columns(128, 128, height=256)[1], "default", 1.0)[0]
    patcher = TiledDiffusion(tree, min_window=128, max_window=128, tile_overlap=16).patched(model.patcher)
    denoised(with_prediction(patcher, counted(prompted, rows)), model.latent(256, 256), prompt(1.0) + aside)
    assert {value for of_call in rows for value in of_call} == {1.0}


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_where_masks_cover_nothing_windows_give_what_the_host_gives(cfg):
    alone = ConditioningSetMask().append(prompt(3.0), columns(100, 436)[0], "default", 1.0)[0]
    assert_windows_see_their_part(load("sd15"), prompted, alone, prompt(0.5), cfg=cfg, tiling={})
    rest = ConditioningSetDefaultAndCombine().set_default_and_combine(alone, prompt(1.0))[0]
    assert_windows_see_their_part(load("sd15"), prompted, rest, prompt(0.5), cfg=cfg, tiling={})


def test_the_masks_of_a_batch_of_images_are_theirs():
    """A mask that is 0 for the first image and not for the second is asked for."""
    masks = torch.cat(columns(268, 268))
    positive = prompt(1.0) + ConditioningSetMask().append(prompt(3.0), masks, "default", 1.0)[0]
    assert_windows_see_their_part(load("sd15"), prompted, positive, latent=load("sd15").latent(HEIGHT_PX, WIDTH_PX, batch=2), tiling=dict(tile_batch_size=2))


def test_what_a_regions_conditioning_carries_is_kept():
    """Its own mask, in the window as in the whole; and its area."""
    own = columns(200, 312, height=SIDE)
    one = ConditioningSetMask().append(prompt(1.0), own[0], "default", 0.5)[0] + ConditioningSetMask().append(prompt(3.0), own[1], "default", 0.5)[0]
    positive = region_conditioning(prompt(0.5), [one], [torch.ones(1, SIDE, SIDE)], per_window=True, share=0.0)
    model = load("sd15")
    out = denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), prompted), model.latent(SIDE, SIDE), positive)
    assert torch.allclose(out[..., :25], torch.tensor(1.0)) and torch.allclose(out[..., 25:], torch.tensor(3.0))
    inside = region_conditioning(
        prompt(0.5), [ConditioningSetArea().append(prompt(2.0), 256, 256, 0, 0, 1.0)[0]], [torch.ones(1, SIDE, SIDE)], per_window=True, share=0.0)
    out = denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), prompted), model.latent(SIDE, SIDE), inside)
    assert torch.allclose(out[..., :32, :32], torch.tensor(2.0)) and torch.allclose(out[..., 32:, :], torch.tensor(0.5))


def test_texts_of_several_lengths_share_a_batch_where_the_host_would_pad_them():
    model, rows = load("sd15"), []
    texts = [prompt(float(number), tokens=77 * (1 + number % 2)) for number in (1, 2, 3, 4)]
    positive = region_conditioning(prompt(0.5), texts, columns(128, 128, 128, 128, height=SIDE), per_window=True, share=0.0)
    out = denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), counted(prompted, rows)), model.latent(SIDE, SIDE), positive, percents=(0.3,))
    assert [len(of_call) for of_call in rows] == [16]
    assert all(out[..., 16 * col].unique().tolist() == [col + 1.0] for col in range(4))


def test_texts_that_cannot_be_padded_are_asked_apart():
    model, rows = load("flux_schnell"), []
    texts = [prompt(float(number), "flux_schnell", tokens=50 + number % 2) for number in (1, 2)]
    positive = region_conditioning(prompt(0.5, "flux_schnell"), texts, columns(256, 256, height=SIDE), per_window=True, share=0.0)
    denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), counted(prompted, rows)), model.latent(SIDE, SIDE), positive, percents=(0.3,))
    assert sorted(map(len, rows)) == [8, 8]


@pytest.mark.parametrize("name", ["flux_dev", "flux2_edit", "qwen_image_edit", "wan21_t2v", "ltxv", "sdxl", "sd3", "lumina2", "z_image", "hunyuan_video"])
def test_a_window_of_every_family_is_what_it_would_be_with_its_prompt_alone(name):
    """Real networks: two regions in a batch of windows, against each prompt for the whole picture."""
    model = load(name)
    side = 16 * model.cell_px
    size = (side, 2 * side)
    masks = columns(side, side, height=side)
    prompts = [model.conds(*size, seed=seed) for seed in (11, 12)]
    if name == "ltxv":
        prompts = [prompts[0], [[torch.roll(prompts[0][0][0], 1, 1), prompts[0][0][1]]]]
    else:
        prompts[1] = [[prompts[1][0][0], prompts[0][0][1]]]
    settings = dict(min_window=side, max_window=side, tile_overlap=0)
    patcher = TiledDiffusion(even_tree(1.0, *size), **settings).patched(model.patcher)
    both = denoised(patcher, model.latent(*size), region_conditioning(prompts[0], prompts, masks, per_window=True, share=0.0), percents=(0.3,))
    alone = [denoised(patcher, model.latent(*size), one, percents=(0.3,)) for one in prompts]
    assert (both[..., :16] - alone[0][..., :16]).abs().max() < 1e-4
    assert (both[..., 16:] - alone[1][..., 16:]).abs().max() < 1e-4
    assert (alone[0] - alone[1]).abs().max() > 1e-3


@pytest.mark.parametrize("regions, masks, message", [
    (2, [(1, 64, 64)] * 3, "regions: expected as many as masks, 3, got 2"),
    (2, [(1, 64, 64), (1, 64, 96)], "masks: expected masks of one picture, 64 x 64 px or of that aspect, got 96 x 64 for region 2"),
])
def test_lists_that_do_not_belong_together_are_refused(regions, masks, message):
    with pytest.raises(ValueError, match=message):
        region_conditioning(prompt(0.5), [prompt(1.0)] * regions, [torch.ones(shape) for shape in masks], per_window=True, share=0.0)


def test_a_region_whose_mask_is_empty_says_nothing():
    whole = prompt(0.5)
    assert region_conditioning(whole, [prompt(1.0)], [torch.zeros(1, 64, 64)], per_window=True, share=0.5) is whole


def test_masks_of_another_size_of_the_picture_are_scaled():
    positive = region_conditioning(prompt(0.5), [prompt(1.0), prompt(2.0)], [columns(32, 32, height=64)[0], columns(64, 64, height=128)[1]], per_window=False, share=0.0)
    assert [tuple(extras["mask"].shape) for _, extras in positive] == [(1, 64, 64)] * 3


def test_without_the_patch_the_host_does_as_ever():
    model = load("sd15")
    out = denoised(with_prediction(model.patcher, prompted), model.latent(SIDE, SIDE), regional(columns(256, 256, height=SIDE), True))
    assert out[..., :31].unique().tolist() == [1.0] and out[..., 33:].unique().tolist() == [2.0]


def test_prompts_that_share_a_control_share_a_batch_and_each_window_has_its_part_of_the_hint():
    model, rows = load("sd15"), []
    texts = [prompt(1.0), prompt(2.0)]
    positive = region_conditioning(prompt(0.5), texts, columns(256, 256, height=SIDE), per_window=True, share=0.0)
    positive, negative = ControlNetApplyAdvanced().apply_controlnet(positive, prompt(0.25), controls.echo_control(), controls.picture(SIDE, SIDE), 1.0, 0.0, 1.0)
    single, _ = ControlNetApplyAdvanced().apply_controlnet(prompt(1.0), prompt(0.25), controls.echo_control(), controls.picture(SIDE, SIDE), 1.0, 0.0, 1.0)

    def both(call):
        return prompted(call) + 100 * controls.echoed(call)
    patcher = tiled(model.patcher, SIDE, SIDE, tile_overlap=0)
    out = denoised(with_prediction(patcher, counted(both, rows)), model.latent(SIDE, SIDE), positive, negative, percents=(0.3,))
    alone = denoised(with_prediction(patcher, both), model.latent(SIDE, SIDE), single, negative, percents=(0.3,))
    difference = out - alone
    assert difference[..., :32].abs().max() < 1e-4 and (difference[..., 32:] - 1).abs().max() < 1e-4
    assert [len(of_call) for of_call in rows] == [16]


def test_prompts_under_hooks_of_their_own_are_asked_apart():
    hooks = [comfy.hooks.create_hook_lora({}, strength, 1.0) for strength in (1.0, 0.5)]
    texts = [comfy.hooks.set_hooks_for_conditioning(prompt(float(number)), hook) for number, hook in enumerate(hooks, 1)]
    model, rows = load("sd15"), []
    positive = region_conditioning(prompt(0.5), texts, columns(256, 256, height=SIDE), per_window=True, share=0.0)
    out = denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, tile_overlap=0), counted(prompted, rows)), model.latent(SIDE, SIDE), positive, percents=(0.3,))
    assert out[..., :32].unique().tolist() == [1.0] and out[..., 32:].unique().tolist() == [2.0]
    assert sum(map(len, rows)) == 16


@pytest.mark.parametrize("per_window", [True, False])
@pytest.mark.parametrize("style", ["regular", "nested"])
def test_regions_under_dual_guidance(per_window, style):
    """Three conditionings, two of them with regions, whose sets do not mix."""
    model, outs = load("sd15"), []
    middle = region_conditioning(prompt(0.5), [prompt(5.0), prompt(4.0)], columns(256, 256, height=SIDE), per_window=per_window, share=0.0)
    positive = regional(columns(256, 256, height=SIDE), per_window)
    for tiling in (True, False):
        if per_window and not tiling:
            continue
        patcher = tiled(model.patcher, SIDE, SIDE, tile_overlap=0) if tiling else model.patcher
        guider, = custom.DualCFGGuider.execute(with_prediction(patcher, prompted), positive, middle, prompt(0.25), 3.0, 2.0, style).result
        outs.append(guider.sample(drawer(5)(1, 4, 64, 64), model.latent(SIDE, SIDE), comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 0.0]), disable_pbar=True, seed=1))
    if not per_window:
        assert (outs[0] - outs[1]).abs().max() < 1e-4
    halves = outs[0][..., :32], outs[0][..., 32:]
    expected = {"regular": lambda one, two: 0.25 + (two - 0.25) * 2 + (one - two) * 3, "nested": lambda one, two: 0.25 + (two + (one - two) * 3 - 0.25) * 2}[style]
    scale = model.patcher.model.latent_format.process_out(torch.ones(1))
    assert torch.allclose(halves[0], scale * expected(1.0, 5.0), atol=1e-3) and torch.allclose(halves[1], scale * expected(2.0, 4.0), atol=1e-3)


def test_one_window_over_the_whole_gets_one_prompt():
    model, rows = load("sd15"), []
    patcher = TiledDiffusion(even_tree(1.0, 256, 256), min_window=512, max_window=512).patched(model.patcher)
    out = denoised(with_prediction(patcher, counted(prompted, rows)), model.latent(256, 256), regional(columns(100, 156, height=256), True))
    assert out.unique().tolist() == [2.0] and rows == [[2.0]] * 2


def test_regions_of_a_picture_that_wraps():
    """A window over the border belongs to the region that it shows most of, on either side."""
    model = load("sd15")
    patcher = tiled(model.patcher, SIDE, SIDE, wrap="horizontal", method="SpotDiffusion", tile_overlap=0, seed=1, shift_method="fibonacci")
    out = denoised(with_prediction(patcher, prompted), model.latent(SIDE, SIDE), regional(columns(256, 256, height=SIDE), True))
    assert set(out.unique().tolist()) == {1.0, 2.0}
    soft = regional(soft_masks(SIDE, SIDE), False)
    cells = denoised(with_prediction(tiled(model.patcher, SIDE, SIDE, wrap="horizontal"), prompted), model.latent(SIDE, SIDE), soft)
    assert (cells - denoised(with_prediction(model.patcher, prompted), model.latent(SIDE, SIDE), soft)).abs().max() < 1e-5


def test_a_changed_prompt_changes_its_region_alone():
    """A real network, windows without overlap: elsewhere not a bit, over whole runs."""
    model, masks = load("flux_schnell"), columns(128, 256, 128, height=256)
    tree = even_tree(1.0, 256, SIDE)
    patcher = TiledDiffusion(tree, min_window=128, max_window=128, tile_overlap=0, tile_batch_size=1).patched(model.patcher)
    texts = [model.conds(256, SIDE, seed=seed) for seed in (11, 12, 13, 14)]
    outs = [
        denoised(patcher, model.latent(256, SIDE), region_conditioning(texts[0], [texts[0], second, texts[1]], masks, per_window=True, share=0.0))
        for second in (texts[2], texts[3])]
    assert torch.equal(outs[0][..., :16], outs[1][..., :16]) and torch.equal(outs[0][..., 48:], outs[1][..., 48:])
    assert (outs[0] - outs[1])[..., 16:48].abs().mean() > 1e-3


def test_prompts_whose_masks_are_of_frames_share_no_batch_with_ones_of_the_picture():
    """The left half's mask has a plane for each frame, the right one's one for all; windows of each have no part in the other's."""
    model = load("wan21_t2v")
    left, right = columns(256, 256, height=SIDE)
    latent = model.latent(SIDE, SIDE)
    frames = left[:, None].expand(-1, latent.shape[2], -1, -1)
    positive = [[text, values | {"mask": mask, "mask_strength": 1.0}] for value, mask in ((1.0, frames), (2.0, right)) for text, values in prompt(value, "wan21_t2v")]
    patcher = tiled(model.patcher, SIDE, SIDE, tile_overlap=0)
    out = denoised(with_prediction(patcher, prompted), latent, positive, percents=(0.3,))
    assert torch.allclose(out[..., :32], torch.tensor(1.0), atol=1e-5) and torch.allclose(out[..., 32:], torch.tensor(2.0), atol=1e-5)


@pytest.mark.parametrize("sigma, on", [(8.0, False), (6.0, True), (4.0, True), (2.0, True), (1.0, False)])
def test_a_prompt_with_times_is_on_from_its_first_sigma_to_its_last_both_included(sigma, on):
    """As the host asks for it."""
    entry = {"timestep_start": 6.0, "timestep_end": 2.0}
    assert is_on(entry, torch.tensor([sigma])) == on and is_on({}, torch.tensor([sigma]))
    found = comfy.samplers.get_area_and_mult(entry | {"model_conds": {}, "uuid": None}, torch.zeros(1, 4, 8, 8), torch.tensor([sigma]))
    assert (found is not None) == on


def sampled(positive, negative=None, *, side=SIDE, cfg=1.0, predict=prompted, batch=1, **settings):
    """The denoised value of one step in windows of 16 cells, and the prompts of the model's rows, call by call."""
    model, rows = load("sd15"), []
    patcher = tiled(model.patcher, side, side, **{"tile_overlap": 0} | settings)
    out = denoised(with_prediction(patcher, counted(predict, rows)), model.latent(side, side, batch=batch), positive, negative, cfg=cfg, percents=(0.3,))
    return out[0], rows


def hosts(positive, batch=1):
    model = load("sd15")
    return denoised(with_prediction(model.patcher, prompted), model.latent(SIDE, SIDE, batch=batch), positive, percents=(0.3,))[0]


def test_a_mask_that_the_user_sets_after_region_prompts_holds():
    """Regions in the left half, another prompt in the right one: nothing of the regions belongs into the right half."""
    left, right = columns(256, 256, height=SIDE)
    regions = ConditioningSetMask().append(regional(columns(256, 256, height=SIDE), True), left, "default", 1.0)[0]
    positive = regions + ConditioningSetMask().append(prompt(9.0), right, "default", 1.0)[0]
    out, _ = sampled(positive)
    assert hosts(positive)[..., 34:].unique().tolist() == [9.0]
    assert out[..., 34:].unique().tolist() == [9.0]


def test_no_cell_is_without_a_prompt_that_the_host_gives_one():
    """Region 1's conditioning has a mask of its own, its own region. A window over the border has cells of both regions."""
    left, right = columns(200, 312, height=SIDE)
    one = ConditioningSetMask().append(prompt(1.0), left, "default", 1.0)[0]
    positive = region_conditioning(prompt(0.5), [one, prompt(2.0)], [left, right], per_window=True, share=0.0)
    out, _ = sampled(positive)
    assert float(hosts(positive).min()) >= 0.99
    assert float(out.min()) >= 0.49


def test_a_window_over_the_end_of_a_regions_area_has_what_the_host_gives():
    """Region 1's conditioning has an area, cells 0 to 23; its mask and region 2's meet at cell 28."""
    left, right = columns(224, 288, height=SIDE)
    one = ConditioningSetArea().append(prompt(1.0), 192, SIDE, 0, 0, 1.0)[0]
    positive = region_conditioning(prompt(0.5), [one, prompt(2.0)], [left, right], per_window=True, share=0.0)
    out, _ = sampled(positive)
    assert out[..., :15].unique().tolist() == [1.0] and out[..., 32:].unique().tolist() == [2.0]
    assert torch.allclose(out[..., 16:24], torch.tensor(1.0)) and torch.allclose(out[..., 28:32], torch.tensor(2.0))


def test_a_window_pays_for_no_entry_whose_own_mask_is_not_there():
    left, right = columns(256, 256, height=SIDE)
    halves = [entry for value, mask in ((0.5, left), (0.7, right)) for entry in ConditioningSetMask().append(prompt(value), mask, "default", 1.0)[0]]
    corner = torch.zeros(1, SIDE, SIDE)
    corner[:, :128, :128] = 1
    counts = {per_window: sum(map(len, sampled(region_conditioning(halves, [prompt(2.0)], [corner], per_window=per_window, share=0.0))[1])) for per_window in (False, True)}
    assert counts[False] == 16
    assert counts[True] == 16


@pytest.mark.parametrize("amount", [1.0, 1e-4])
def test_a_window_belongs_to_the_whole_pictures_prompt_where_no_region_covers_most_of_it(amount):
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 120:136, 120:136] = amount  # 2 x 2 cells, one in each of four windows
    out, _ = sampled(region_conditioning(prompt(0.5), [prompt(2.0)], [mask], per_window=True, share=0.0))
    assert float((out == 2.0).float().mean()) < 0.01


SPOT = dict(side=320, method="SpotDiffusion", window_shapes="square", shift_method="sorted")


def test_spot_diffusion_counts_the_cells_that_a_window_is_asked_for():
    """Of the windows at the left, cells 0 to 7 count, five of them of region 1; what they see more is region 2's."""
    out, _ = sampled(regional(columns(40, 280, height=320), True), **SPOT)
    assert out[..., :8].unique().tolist() == [1.0]


def test_spot_diffusion_pays_for_no_region_outside_a_windows_core():
    _, rows = sampled(regional(columns(64, 256, height=320), False), **SPOT)
    assert sum(map(len, rows)) == 9


def test_regions_of_a_batch_with_masks_of_its_images():
    """Image 1 has region 1 at the left, image 2 at the right."""
    left, right = columns(256, 256, height=SIDE)
    positive = regional([torch.cat([left, right]), torch.cat([right, left])], True)
    out, _ = sampled(positive, batch=2)
    host = hosts(positive, batch=2)
    assert torch.equal(out[:, :, :, ::16], host[:, :, :, ::16])


def test_texts_of_several_lengths_cost_as_many_batches_as_one():
    """The host pads to at most four times the shorter text; all of these beside a negative of 77 are within that, one by one."""
    model, calls = load("sd15"), []

    def predict(call):
        calls.append(tuple(call.context.shape[:2]))
        return prompted(call)
    texts = [prompt(float(number), tokens=77 * number) for number in (1, 2, 3, 4)]
    positive = region_conditioning(prompt(0.5), texts, columns(128, 128, 128, 128, height=SIDE), per_window=True, share=0.0)
    patcher = tiled(model.patcher, SIDE, SIDE, tile_overlap=0)
    denoised(with_prediction(patcher, predict), model.latent(SIDE, SIDE), positive, prompt(0.25, tokens=77), percents=(0.3,), cfg=4.0)
    assert max(tokens for _, tokens in calls) <= 4 * 77


def test_prompts_that_are_alike_are_found_without_comparing_all_and_without_copies(monkeypatch):
    asked, real = [], conditioning._are_alike
    monkeypatch.setattr(conditioning, "_are_alike", lambda *args: asked.append(args) or real(*args))
    sampled(regional(soft_masks(SIDE, SIDE, side=128), True), prompt(0.25), cfg=4.0, batch=2)
    assert len(asked) == 15 + 1  # each region's with the first, and the negative
    text = torch.zeros(1, 512, 4096)
    shape = conditioning._of_so_many(comfy.conds.CONDCrossAttn(text), 8).cond
    assert shape.shape == (8, 512, 4096) and shape.data_ptr() == text.data_ptr()


@pytest.mark.parametrize("lengths, expected", [
    ({77}, True), ({77, 154, 308}, True), ({77, 154, 231}, False), ({154, 231}, False), ({77, 385}, False), ({77, 154, 616}, False), ({50, 51}, False)])
def test_texts_are_joined_where_all_are_padded_to_the_longest(lengths, expected):
    assert conditioning._pad_to_longest(lengths) == expected


@pytest.mark.parametrize("kind", ["control", "boxes"])
def test_controls_that_the_host_copies_for_each_entry_share_batches(kind):
    counts = []
    for positive in (prompt(1.0), region_conditioning(prompt(0.5), [prompt(float(number)) for number in (1, 2, 3, 4)], columns(128, 128, 128, 128, height=SIDE), per_window=True, share=0.0)):
        if kind == "control":
            positive, = ControlNetApply().apply_controlnet(positive, controls.echo_control(), controls.picture(SIDE, SIDE), 1.0)
        else:
            model = controls.echo_gligen()
            placed = with_boxes(model, [(1, 60, 60, 2, 2)])[0][1]["gligen"]
            positive = [[tokens, extras | {"gligen": (*placed[:2], list(placed[2]))}] for tokens, extras in positive]
        counts.append(len(sampled(positive, prompt(0.25), cfg=4.0)[1]))
    assert counts[1] <= 1.1 * counts[0], counts


@pytest.mark.parametrize("whole, regions", [(2, 1), (1, 2)])
def test_a_share_is_of_the_whole_pictures_prompt_however_many_entries_it_has(whole, regions):
    positive = region_conditioning(prompt(0.0) * whole, [prompt(1.0) * regions], [torch.ones(1, SIDE, SIDE)], per_window=True, share=0.25)
    out, _ = sampled(positive)
    assert torch.allclose(out, torch.tensor(0.75), atol=1e-5)


def test_masks_of_batches_that_do_not_fit_are_refused_in_the_users_words():
    with pytest.raises(ValueError, match="masks"):
        region_conditioning(prompt(0.5), [prompt(1.0)] * 2, [torch.ones(2, 64, 64), torch.ones(3, 64, 64)], per_window=True, share=0.0)


@pytest.mark.parametrize("times, parts", [
    ([(0, 1)], [1.0]), ([(0, 1), (0, 1)], [0.5, 0.5]), ([(0, 0.5), (0.5, 1)], [1.0, 1.0]), ([(0, 0.5), (0.5, 1), (0, 1)], [0.5, 0.5, 0.5]),
    ([(0.2, 0.2)], [1.0]), ([(0, 0.6), (0.4, 1), (0.9, 1)], [0.5, 0.5, 0.5])])
def test_combined_prompts_that_are_on_at_a_time_count_as_one(times, parts):
    whole = [entry for start, end in times for entry in ConditioningSetTimestepRange().set_range(prompt(1.0), start, end)[0]]
    found = region_conditioning(whole, [prompt(2.0)], [torch.ones(1, 8, 8)], per_window=False, share=0.25)
    assert [extras["mask_strength"] for _, extras in found] == [*parts, 0.75]


@pytest.mark.parametrize("empty, line", [
    ([2], "masks of regions 2 are 0 everywhere, so these prompts are left out"),
    ([1, 2, 3], "no mask is above 0 anywhere, so there is no region, and only the whole picture's prompt")])
def test_a_prompt_that_is_left_out_is_told(empty, line, caplog):
    caplog.set_level("INFO")
    masks = [mask * (number not in empty) for number, mask in enumerate(columns(8, 8, 8, height=8), 1)]
    regional(masks, True)
    assert [record.message for record in caplog.records] == [f"Quadtree Region Prompts: {line}"]


def test_a_region_whose_mask_was_taken_away_or_whose_strength_is_0():
    """Without a mask it is a prompt like any other, and means the whole picture; with a strength of 0 it says nothing."""
    positive = regional(columns(256, 256, height=SIDE), True)
    without = [[tokens, {key: value for key, value in extras.items() if key != "mask"}] for tokens, extras in positive]
    assert torch.allclose(sampled(without)[0], torch.tensor((0.5 + 1 + 2) / 3))
    one_without = [without[1] if extras[REGION]["number"] == 1 else [tokens, extras] for tokens, extras in positive]
    assert torch.allclose(sampled(one_without)[0][..., :32], torch.tensor((0.5 + 1) / 2)) and torch.allclose(sampled(one_without)[0][..., 34:], torch.tensor((1 + 2) / 2))
    silent = [[tokens, extras | {"strength": 0.0}] if extras[REGION]["number"] == 2 else [tokens, extras] for tokens, extras in positive]
    assert sampled(silent)[0].unique().tolist() == [0.5, 1.0]


def test_a_prompts_own_masks_for_other_pictures_than_the_regions_are_refused():
    own = ConditioningSetMask().append(prompt(1.0), torch.ones(2, 64, 64), "default", 1.0)[0]
    with pytest.raises(ValueError, match="regions: the prompt of region 1 has a mask for 2 pictures of a batch, where `masks` are for 3"):
        region_conditioning(prompt(0.5), [own], [torch.ones(3, 64, 64)], per_window=True, share=0.0)

"""Conditionings in windows: what an echo of the model was given adds up to what the host gives it for the whole picture."""
from __future__ import annotations

import inspect

import comfy.conds
import comfy.hooks
import comfy.model_patcher
import comfy.supported_models as supported
import pytest
import torch
import tiny_controls as controls
from comfy_extras.nodes_hooks import ConditioningSetDefaultAndCombine
from comfy_extras.nodes_lt import LTXVAddGuide
from comfy_extras.nodes_video_model import ConditioningSetAreaPercentageVideo
from hosts import needs, of_host
from nodes import (
    ConditioningSetArea, ConditioningSetAreaPercentage, ConditioningSetAreaStrength, ConditioningSetMask, ConditioningSetTimestepRange)
from seen import HEIGHT_PX, WIDTH_PX, assert_windows_are_their_parts_alone, assert_windows_see_their_part, denoised, every_batching, tiled
from tiny_controls import picture, spread
from tiny_models import TOKENS, UNET, Call, Family, TinyModel, build, drawer, load, seeded_weights, with_prediction

from qtd_pack.canvas import Canvas
from qtd_pack.conditioning import _guide_in_window
from qtd_pack.utils import Rect

GUIDES_HAVE_MASKS = "attention_mask" in inspect.signature(LTXVAddGuide.execute).parameters


def prompt(name: str, *values: float) -> list:
    """A prompt whose tokens all have one value; with several values, one for each image of a batch."""
    width = load(name).family.text_dim
    (_, extras), = load(name).positive(HEIGHT_PX, WIDTH_PX)
    return [[torch.tensor(values).view(-1, 1, 1).expand(-1, TOKENS, width).clone(), extras]]


def prompted(call: Call) -> torch.Tensor:
    """The denoised value is the prompt's."""
    return call.context.mean((1, 2)).view(-1, *[1] * (call.x.ndim - 1)).expand_as(call.x).contiguous()


def blobs(seed: int) -> torch.Tensor:
    return picture(HEIGHT_PX, WIDTH_PX, seed=seed)[..., 0]


def area(cond, width=240, height=160, x=96, y=72, strength=0.7):
    return ConditioningSetArea().append(cond, width, height, x, y, strength)[0]


def masked(cond, seed=7, strength=0.8, bounds="default"):
    mask = blobs(seed)
    if bounds != "default":
        mask = torch.nn.functional.pad(mask[:, 100:300, 60:400], (60, WIDTH_PX - 400, 100, HEIGHT_PX - 300))
    return ConditioningSetMask().append(cond, mask, bounds, strength)[0]


def in_range(cond, start, end):
    return ConditioningSetTimestepRange().set_range(cond, start, end)[0]


# Each gives the positive of prompts 1 and 3.
PLACES = {
    "an area over a prompt": lambda one, other: one + area(other),
    "two areas that overlap": lambda one, other: area(one, 400, 300, 0, 0) + area(other),
    "areas at every border": lambda one, other: one + area(other, 400, 80, 0, 0) + area(other, 96, 500, 472, 0, 2.0) + area(other, 104, 104, 0, 304),
    "an area beyond the border": lambda one, other: one + area(other, 800, 800, 296, 200),
    "a small area": lambda one, other: one + area(other, 64, 64, 248, 184),
    "an area without a prompt around it": lambda one, other: area(other),
    "an area in per cent": lambda one, other: one + ConditioningSetAreaPercentage().append(other, 0.3, 0.4, 0.25, 0.35, 1.5)[0],
    "the strength of an area": lambda one, other: ConditioningSetAreaStrength().append(one, 0.4)[0] + area(other),
    "masks": lambda one, other: masked(one) + masked(other, seed=8),
    "the bounds of a mask": lambda one, other: one + masked(other, bounds="mask bounds"),
    "a mask in an area": lambda one, other: one + area(masked(other)),
    "ranges of time": lambda one, other: in_range(one, 0.0, 0.5) + in_range(area(other), 0.2, 0.9) + masked(other),
    "a default for the rest": lambda one, other: ConditioningSetDefaultAndCombine().set_default_and_combine(masked(other, strength=1.0), one)[0],
    "a default around an area": lambda one, other: ConditioningSetDefaultAndCombine().set_default_and_combine(masked(other, bounds="mask bounds"), one)[0],
    "hooks": lambda one, other: comfy.hooks.set_hooks_for_conditioning(masked(one), comfy.hooks.create_hook_lora({}, 1.0, 1.0)) + masked(other, seed=8),
}


@every_batching
@pytest.mark.parametrize("places", PLACES)
def test_prompts_keep_their_places(places, tiling):
    positive = PLACES[places](prompt("sd15", 1.0), prompt("sd15", 3.0))
    assert_windows_see_their_part(load("sd15"), prompted, positive, tiling=tiling)


@pytest.mark.parametrize("places", PLACES)
def test_prompts_keep_their_places_beside_a_negative(places):
    positive = PLACES[places](prompt("sd15", 1.0), prompt("sd15", 3.0))
    assert_windows_see_their_part(load("sd15"), prompted, positive, prompt("sd15", 0.5) + area(prompt("sd15", 2.0), 160, 160, 320, 16), tiling={}, cfg=4.0)


def masked_frames(cond):
    return ConditioningSetMask().append(cond, torch.cat([blobs(seed) for seed in (1, 2, 3)]), "default", 1.0)[0]


VIDEO_PLACES = {
    **{name: PLACES[name] for name in ("an area over a prompt", "areas at every border", "masks", "a default for the rest")},
    "an area in per cent of a video": lambda one, other: one + ConditioningSetAreaPercentageVideo().append(other, 0.3, 0.4, 1.0, 0.25, 0.35, 0.0, 1.5)[0],
    "an area of some frames": lambda one, other: one + ConditioningSetAreaPercentageVideo().append(other, 0.5, 0.5, 0.67, 0.2, 0.3, 0.33, 1.0)[0],
    "a mask for every frame of an area": lambda one, other: one + area(masked_frames(other)),
    "a mask for every frame": lambda one, other: one + masked_frames(other),
}


@pytest.mark.parametrize("tiling", [dict(tile_batch_size=1), dict(tile_batch_size=4)])
@pytest.mark.parametrize("places", VIDEO_PLACES)
def test_prompts_of_a_video_keep_their_places(places, tiling):
    positive = VIDEO_PLACES[places](prompt("wan21_t2v", 1.0), prompt("wan21_t2v", 3.0))
    assert_windows_see_their_part(load("wan21_t2v"), prompted, positive, tiling=tiling)


@pytest.mark.parametrize("masks", [1, 3])
@every_batching
def test_images_of_a_batch_keep_their_masks(masks, tiling):
    mask = torch.cat([blobs(seed) for seed in range(masks)])
    positive = prompt("sd15", 1.0) + ConditioningSetMask().append(prompt("sd15", 3.0), mask, "default", 1.0)[0]
    assert_windows_see_their_part(load("sd15"), prompted, positive, latent=load("sd15").latent(HEIGHT_PX, WIDTH_PX, batch=3), tiling=tiling)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [(1.0, 3.0), (1.0, 3.0, 5.0), (1.0, 3.0, 5.0, 7.0)])
def test_images_of_a_batch_keep_their_prompts(prompts, cfg):
    """Fewer prompts than images begin again with the first, more are cut off."""
    latent = load("sd15").latent(HEIGHT_PX, WIDTH_PX, batch=3)
    for tile_batch_size in (1, 3):
        assert_windows_see_their_part(
            load("sd15"), prompted, prompt("sd15", *prompts), prompt("sd15", 0.5), latent=latent, tiling=dict(tile_batch_size=tile_batch_size), cfg=cfg)


def test_an_area_is_never_run_where_it_is_not():
    values = []

    def count(call):
        values.extend(call.context.mean((1, 2)).tolist())
        return call.x
    positive = prompt("sd15", 1.0) + area(prompt("sd15", 3.0), 64, 64, 0, 0)
    denoised(with_prediction(tiled(load("sd15").patcher), count), load("sd15").latent(HEIGHT_PX, WIDTH_PX), positive, percents=(0.3,))
    assert (values.count(3.0), values.count(1.0)) == (1, 12)


def as_cells(value: torch.Tensor, call: Call) -> torch.Tensor:
    """What the last channel of a conditioning says of each cell: its mean over the cell, or the value around it."""
    planes = value.flatten(1, -3)[:, -1:]
    height, width = call.x.shape[-2:]
    if planes.shape[-2] > height:
        planes = torch.nn.functional.avg_pool2d(planes, planes.shape[-1] // width)
    if planes.shape[-2:] != call.x.shape[-2:]:
        planes = torch.nn.functional.interpolate(planes, (height, width), mode="nearest")
    return planes.view(-1, *[1] * (call.x.ndim - 3), height, width).expand_as(call.x).contiguous()


def given(key: str):
    """A prediction that gives back one of the conditionings, of a list the first."""
    def predict(call: Call) -> torch.Tensor:
        value = call.c_concat if key == "c_concat" else call.conds[key]
        return as_cells(value[0] if isinstance(value, list) else value, call)
    return predict


def with_cond(name: str, key: str, cond) -> list:
    """A conditioning whose model_conds have one entry more, as the model's extra_conds would have made it."""
    return [[tokens, extras | {"model_conds": {key: cond}}] for tokens, extras in load(name).positive(HEIGHT_PX, WIDTH_PX)]


NOISE, REGULAR = comfy.conds.CONDNoiseShape, comfy.conds.CONDRegular
# Height and width of the latent below.
H, W = 50, 66
# Key: class, family and shape of what the host's models make of it.
SHAPES = {
    "c_concat": (NOISE, "sd15", (1, 5, H, W)),
    "c_concat of twice the size": (NOISE, "sd15", (1, 5, 2 * H, 2 * W)),
    "c_concat of half the size": (NOISE, "sd15", (1, 5, H // 2, W // 2)),
    "c_concat of a video": (NOISE, "wan21_t2v", (1, 20, 3, H, W)),
    "denoise_mask": (REGULAR, "wan21_t2v", (1, 16, 3, H, W)),
    "vace_context": (REGULAR, "wan21_t2v", (1, 2, 96, 3, H, W)),
    "camera_conditions": (REGULAR, "wan21_t2v", (1, 2, 3, 8 * H, 8 * W)),
    "pose_latents": (REGULAR, "wan21_t2v", (1, 16, 2, H, W)),
    "pose_latents of half the size": (REGULAR, "wan21_t2v", (1, 20, 3, H // 2, W // 2)),
    "sam_latents": (REGULAR, "wan21_t2v", (1, 28, 3, H // 2, W // 2)),
    "ref_mask_latents": (REGULAR, "wan21_t2v", (1, 28, 4, H, W)),
    "control_video": (REGULAR, "wan21_t2v", (1, 16, 3, H, W)),
    "reference_latent": (REGULAR, "wan21_t2v", (1, 16, H, W)),
    "ref_latent": (REGULAR, "wan21_t2v", (1, 16, 1, H, W)),
    "time_dim_concat": (REGULAR, "wan21_t2v", (1, 16, 2, H, W)),
    "time_dim_replace": (REGULAR, "wan21_t2v", (1, 16, 1, H, W)),
    "condition": (REGULAR, "wan21_t2v", (1, 17, 3, H, W)),
    "lq_latent": (REGULAR, "sd15", (1, 16, H // 2, W // 2)),
    "an unknown one of the latent's size": (REGULAR, "sd15", (1, 3, H, W)),
}


@pytest.mark.parametrize("images, rows", [(1, 1), (3, 2)])
@pytest.mark.parametrize("what", SHAPES)
def test_a_conditioning_of_the_pictures_place_is_cut(what, images, rows):
    """Two rows for three images: the host begins again with the first."""
    kind, name, shape = SHAPES[what]
    key, latent = what.split(" of ")[0], load(name).latent(8 * H, 8 * W, batch=images)
    positive = with_cond(name, key, kind(drawer(6)(rows, *shape[1:])))
    assert_windows_see_their_part(load(name), given(key), positive, latent=latent, tiling=dict(tile_batch_size=images), cfg=4.0)


def test_windows_whose_borders_run_through_a_conditionings_cells_get_what_is_there():
    latent = load("flux_dev").latent(8 * 52, 8 * 68)
    positive = with_cond("flux_dev", "lq_latent", REGULAR(drawer(6)(1, 16, 13, 17)))
    assert_windows_see_their_part(load("flux_dev"), given("lq_latent"), positive, latent=latent, tiling=dict(tile_overlap=8, min_window=144, max_window=144))


def test_stable_cascades_prior_is_that_of_the_whole():
    def resized(call: Call) -> torch.Tensor:
        return torch.nn.functional.interpolate(call.conds["effnet"], call.x.shape[-2:], mode="bilinear", align_corners=True)[:, :4]
    positive = with_cond("sd15", "effnet", REGULAR(drawer(6)(1, 16, 9, 12)))
    assert_windows_see_their_part(load("sd15"), resized, positive, tiling={})


def test_references_of_the_pictures_size_are_cut_and_others_pass_whole():
    same, other = drawer(6)(1, 16, H, W), drawer(7)(1, 16, 20, 12)
    others = []

    def predict(call: Call) -> torch.Tensor:
        others.append(call.conds["ref_latents"][1])
        return as_cells(call.conds["ref_latents"][0], call)
    positive = with_cond("flux_dev", "ref_latents", comfy.conds.CONDList([same, other]))
    latent = load("flux_dev").latent(8 * H, 8 * W)
    assert_windows_see_their_part(load("flux_dev"), predict, positive, latent=latent, tiling=dict(tile_batch_size=3), cfg=4.0)
    assert all(torch.equal(row, other[0]) for value in others for row in value)


def test_a_mask_of_the_attention_has_the_windows_tokens_on_both_axes():
    text, tokens = 64, (H // 2) * (W // 2)
    bias = drawer(6)(1, text + tokens, text + tokens)

    def predict(call: Call) -> torch.Tensor:
        mask = call.conds["attention_mask"]
        own, of_text, to_text = mask[:, text:, text:].diagonal(dim1=1, dim2=2), mask[:, 3, text:], mask[:, text:, 5]
        height, width = (length // 2 for length in call.x.shape[-2:])
        planes = torch.stack([own, of_text, to_text], 1).unflatten(2, (height, width))
        return spread(planes.repeat_interleave(2, -2).repeat_interleave(2, -1), 16)
    masked_by = {"attention_mask": bias, "attention_mask_img_shape": (H // 2, W // 2)}
    positive = [[value, extras | masked_by] for value, extras in load("flux_dev").positive(8 * H, 8 * W)]
    latent = load("flux_dev").latent(8 * H, 8 * W)
    for size in (1, 3):
        assert_windows_see_their_part(load("flux_dev"), predict, positive, latent=latent, tiling=dict(tile_batch_size=size), percents=(0.3,))


def noted(patcher, latent, positive) -> list:
    calls = []
    denoised(with_prediction(tiled(patcher, 8 * H, 8 * W), lambda call: calls.append(call) or call.x), latent, positive)
    return calls


class Unheard(comfy.conds.CONDRegular):
    """A conditioning of another pack: neither a tensor nor a list of them."""

    def __init__(self, cond):
        self.cond = cond

    def process_cond(self, batch_size, **kwargs):
        return self

    def can_concat(self, other):
        return self.cond is other.cond

    def concat(self, others):
        return self.cond

    def size(self):
        return [1]


STRANGE = {
    "of another size": (REGULAR(torch.ones(1, 4, 7, 9)), "conditioning 'strange' of shape (1, 4, 7, 9)"),
    "of a list": (comfy.conds.CONDList([torch.ones(1, 4, 7, 9)]), "conditioning 'strange' of shape (1, 4, 7, 9)"),
    "of an object": (comfy.conds.CONDConstant({"places": object}), "conditioning 'strange'"),
    "of an unheard class": (Unheard({"places": object}), "conditioning 'strange'"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_conditioning_that_nobody_knows_passes_whole_with_one_line(what, caplog):
    caplog.set_level("INFO")
    cond, called = STRANGE[what]
    calls = noted(load("sd15").patcher, load("sd15").latent(8 * H, 8 * W), with_cond("sd15", "strange", cond))
    assert len(calls) > 1
    for call in calls:
        value = call.conds["strange"]
        expected = cond.cond
        if torch.is_tensor(expected) or what == "of a list":
            value, expected = (value[0], expected[0]) if what == "of a list" else (value, expected)
            assert torch.equal(value, expected.expand_as(value)) and value.shape[1:] == expected.shape[1:]
        else:
            assert value is expected
    lines = [record.getMessage() for record in caplog.records if "strange" in record.getMessage()]
    assert lines == [f"{called} is not known to belong to a part of the picture: every window sees the whole of it"]


@pytest.mark.parametrize("cond", [
    REGULAR(torch.ones(1, 77, 64)), REGULAR(torch.ones(1, 64)), REGULAR(torch.tensor([3.5])), comfy.conds.CONDCrossAttn(torch.ones(1, 77, 64)),
    comfy.conds.CONDConstant(25), comfy.conds.CONDConstant("index"), comfy.conds.CONDConstant([1.0, 2.0]), comfy.conds.CONDConstant(None),
])
def test_texts_and_numbers_pass_whole_without_a_line(cond, caplog):
    caplog.set_level("INFO")
    for call in noted(load("sd15").patcher, load("sd15").latent(8 * H, 8 * W), with_cond("sd15", "strange", cond)):
        value = call.conds["strange"]
        assert torch.equal(value, cond.cond.expand_as(value)) if torch.is_tensor(value) else value == cond.cond
    assert "strange" not in caplog.text


def test_pictures_without_a_place_pass_whole_even_if_they_are_of_the_latents_size(caplog):
    caplog.set_level("INFO")
    face = drawer(6)(1, 3, 9, H, W)
    for call in noted(load("sd15").patcher, load("sd15").latent(8 * H, 8 * W), with_cond("sd15", "face_pixel_values", REGULAR(face))):
        assert torch.equal(call.conds["face_pixel_values"], face.expand_as(call.conds["face_pixel_values"]))
    assert "face_pixel_values" not in caplog.text


def test_uuids_name_the_window_and_stay_the_same_at_every_step():
    calls = []
    patcher = with_prediction(tiled(load("sd15").patcher, tile_batch_size=1), lambda call: calls.append(tuple(call.transformer_options["uuids"])) or call.x)
    denoised(patcher, load("sd15").latent(HEIGHT_PX, WIDTH_PX), prompt("sd15", 1.0), percents=(0.2, 0.4, 0.6))
    assert len(calls) == 3 * len(set(calls)) and len(set(calls)) == 12
    assert calls[:12] == calls[12:24] == calls[24:]


def with_boxes(model, boxes, base=None) -> list:
    """Boxes (name, height, width, top, left) in cells, as GLIGENTextBoxApply leaves them."""
    placed = [(drawer(name)(1, 64), *box) for name, *box in boxes]
    return [[tokens, extras | {"gligen": ("position", model, placed)}] for tokens, extras in base or prompt("sd15", 1.0)]


def drawn(call: Call) -> torch.Tensor:
    """The denoised value is how many boxes lie over a cell."""
    (patch,) = call.transformer_options["patches"]["middle_patch"]
    height, width = call.x.shape[-2:]
    canvas = torch.zeros(height, width)
    for left, top, right, bottom in patch.boxes.tolist():
        canvas[max(round(top * height), 0):round(bottom * height), max(round(left * width), 0):round(right * width)] += 1
    return canvas.expand_as(call.x).contiguous()


BOXES = [(1, 20, 16, 4, 6), (2, 9, 40, 30, 20), (3, 51, 3, 0, 64), (4, 30, 30, 40, -8), (5, 2, 2, 17, 33)]


@every_batching
@pytest.mark.parametrize("where", ["the picture", "an area"])
def test_boxes_are_moved_and_clipped_to_their_window(where, tiling):
    positive = with_boxes(controls.echo_gligen(), BOXES)
    positive = positive if where == "the picture" else area(positive, 320, 240, 96, 72)
    assert_windows_see_their_part(load("sd15"), drawn, positive, tiling=tiling, cfg=1.0)


def test_a_window_without_boxes_is_a_picture_without_boxes():
    counts = []

    def count(call):
        counts.append(len(call.transformer_options["patches"]["middle_patch"][0].boxes))
        return call.x
    positive = with_boxes(controls.echo_gligen(), [(1, 4, 4, 0, 0)])
    denoised(with_prediction(tiled(load("sd15").patcher), count), load("sd15").latent(HEIGHT_PX, WIDTH_PX), positive, percents=(0.3,))
    assert sorted(set(counts)) == [0, 1] and counts.count(1) == 1


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("boxes", [
    [(1, 8, 8, 2, 20), (2, 12, 12, 10, 10)],
    [(1, 6, 6, 4, 4), (2, 6, 6, 20, 20)],  # at one place of two windows
])
def test_boxes_act_on_a_real_window_as_on_that_part_alone(boxes, windows):
    model, gligen = load("sd15"), controls.gligen()

    def part_of(cells, px):
        top, left = (0, 0) if cells is ... else (cells[1].start, cells[2].start)
        size = 32 if cells is ... else 16
        clipped = []
        for name, height, width, y, x in boxes:
            first, last = (max(y - top, 0), max(x - left, 0)), (min(y + height - top, size), min(x + width - left, size))
            if first[0] < last[0] and first[1] < last[1]:
                clipped.append((name, last[0] - first[0], last[1] - first[1], *first))
        positive = model.positive(256, 256)
        return model.patcher, with_boxes(gligen, clipped, positive), model.negative(256, 256)
    assert_windows_are_their_parts_alone(model, part_of, model.latent(256, 256), windows=windows)


def part_of_value(value, cells, px, side: int, cell_px: int):
    """The part of everything in a conditioning that is as large as the latent, or as the picture."""
    if isinstance(value, list):
        return [part_of_value(one, cells, px, side, cell_px) for one in value]
    if torch.is_tensor(value) and value.ndim >= 3 and cells is not ...:
        if tuple(value.shape[-2:]) == (side, side):
            return value[cells]
        if tuple(value.shape[-2:]) == (side * cell_px, side * cell_px):
            return value[px]
    return value


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("name", [
    "sd15_inpaint", "flux_fill", "flux_kontext", "flux2_edit", "qwen_image_edit", "z_image_omni", "wan21_i2v", "wan21_vace", "wan22_i2v"])
def test_a_window_of_a_real_network_is_conditioned_as_that_part_alone(name, windows):
    model = load(name)
    side = 32 * model.cell_px

    def part_of(cells, px):
        conds = []
        for ((tokens, extras),) in (model.positive(side, side), model.negative(side, side)):
            conds.append([[tokens, {key: part_of_value(value, cells, px, 32, model.cell_px) for key, value in extras.items()}]])
        return model.patcher, *conds
    assert_windows_are_their_parts_alone(model, part_of, model.latent(side, side), windows=windows)


@pytest.mark.parametrize("name", ["wan22_5b", "ltxv"])
def test_a_mask_of_the_latent_inside_the_conditionings_is_cut(name):
    model = load(name)
    side = 32 * model.cell_px
    latent = model.latent(side, side)
    mask = torch.nn.functional.interpolate(picture(side, side)[..., 0][None], (32, 32), mode="area").expand(1, 3, 32, 32).unsqueeze(1).clone()
    mask[:, :, 0] = 0
    conds = model.positive(side, side), model.negative(side, side)
    tiling = dict(min_window=8 * model.cell_px, max_window=8 * model.cell_px, tile_overlap=2 * model.cell_px)
    assert_windows_see_their_part(model, given("denoise_mask"), *conds, latent=latent, tiling=tiling, noise_mask=mask)
    assert_windows_are_their_parts_alone(model, lambda cells, px: (model.patcher, *conds), latent, windows=4, noise_mask=mask)


class GuideVAE:
    """A VAE for LTX-Video whose cell has values of its own 32 x 32 px only, of every eighth frame."""

    downscale_index_formula = (8, 32, 32)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return spread(torch.nn.functional.pixel_unshuffle(pixels[::8].movedim(-1, 1), 32), 128).movedim(0, 1).unsqueeze(0)


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("guide", [
    dict(frames=1), dict(frames=9), *(pytest.param(guide, marks=needs("guides with masks and scales of their own", GUIDES_HAVE_MASKS)) for guide in (
        dict(frames=1, factor=2), dict(frames=9, masked=True), dict(frames=1, factor=2, masked=True)))], ids=str)
def test_guides_of_a_video_belong_to_their_place(guide, windows):
    """LTXVAddGuide appends frames to the latent, and lists every token of theirs."""
    model, frames = load("ltxv"), guide["frames"]
    image = torch.cat([picture(512, 512, seed=seed) for seed in range(frames)])
    mask = picture(512, 512, seed=20)[..., 0] if guide.get("masked") else None
    parameters = {"iclora_parameters": {"reference_downscale_factor": guide["factor"]}} if "factor" in guide else {}

    def guided(cells, px) -> tuple:
        conds = model.positive(512, 512), model.negative(512, 512)
        part = (slice(None), *px[1:]) if px is not ... else ...
        node = LTXVAddGuide.execute(
            *conds, GuideVAE(), {"samples": model.latent(512, 512)[cells]}, image[part], 0, 0.7, **parameters,
            **({} if mask is None else {"attention_mask": mask[part]}))
        return node.result
    latent = guided(..., ...)[2]
    assert_windows_are_their_parts_alone(
        model, lambda cells, px: (model.patcher, *guided(cells, px)[:2]), latent["samples"], windows=windows, noise_mask=latent["noise_mask"], edge=8)


def tiny(name: str, config: type, sizes: dict) -> TinyModel:
    model = build(config, sizes)
    model.load_model_weights(seeded_weights(model.diffusion_model), "")
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=controls.CPU, offload_device=controls.CPU)
    return TinyModel(name, Family(config, sizes), patcher)


def svd() -> TinyModel:
    """Stable Video Diffusion: the frames are the rows of the batch."""
    sizes = UNET | dict(
        in_channels=8, num_classes="sequential", adm_in_channels=768, use_temporal_resblock=True, use_temporal_attention=True, use_linear_in_transformer=True,
        extra_ff_mix_layer=True, use_spatial_context=True, merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1])
    return tiny("svd", supported.SVD_img2vid, sizes)


@pytest.mark.parametrize("windows", [1, 4])
def test_a_model_whose_batch_is_time_keeps_its_frames(windows):
    model, frames = svd(), 3
    first = drawer(8)(1, 4, 32, 32)

    def part_of(cells, px):
        extras = {"pooled_output": drawer(9)(1, 512), "motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0, "concat_latent_image": first[cells]}
        return model.patcher, *([[drawer(seed)(1, 1, 64), extras]] for seed in (2, 3))
    assert_windows_are_their_parts_alone(model, part_of, drawer(1)(frames, 4, 32, 32), windows=windows)


@pytest.mark.parametrize("windows", [1, 4])
def test_hooks_change_the_weights_of_their_conditioning_in_windows(windows):
    model = load("sd15")
    weights = {"diffusion_model.out.2.weight": ("diff", (drawer(4)(4, 32, 3, 3),))}

    def part_of(cells, px):
        positive, negative = model.positive(256, 256), model.negative(256, 256)
        return model.patcher.clone(), comfy.hooks.set_hooks_for_conditioning(positive, comfy.hooks.create_hook_lora(weights, 1.0, 0.0)), negative
    assert_windows_are_their_parts_alone(model, part_of, model.latent(256, 256), windows=windows)


def hidream_o1() -> TinyModel:
    sizes = dict(
        image_model="hidream_o1",
        text_config_overrides=dict(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1),
        vision_config_overrides=dict(hidden_size=32, num_heads=2, intermediate_size=32, depth=1, deepstack_visual_indexes=()))
    return tiny("hidream_o1", supported.HiDreamO1, sizes)


@needs("HiDream-O1", of_host("comfy.supported_models", "HiDreamO1"))
@pytest.mark.parametrize("references", [0, 1])
def test_hidream_o1_lists_the_tokens_of_the_window(references):
    model = hidream_o1()
    ids = torch.arange(100, 116).unsqueeze(0)
    extras = {"text_input_ids": ids} | ({"reference_latents": [picture(96, 64)]} if references else {})
    calls = []
    settings = dict(min_window=128, max_window=128, tile_overlap=0, tile_batch_size=2)
    patcher = with_prediction(tiled(model.patcher, 256, 256, **settings), lambda call: calls.append(call) or call.x)
    denoised(patcher, torch.zeros(1, 3, 256, 256) + 0.1, [[None, extras]], percents=(0.3,))
    expected = model.patcher.model.extra_conds(**extras, noise=torch.zeros(1, 3, 128, 128), device=controls.CPU)
    assert [tuple(call.x.shape) for call in calls] == [(2, 3, 128, 128)] * 2
    for call in calls:
        for key, cond in expected.items():
            value = call.conds[key]
            assert torch.equal(value, cond.cond.expand_as(value)) if torch.is_tensor(value) else value == cond.cond


def test_a_guide_of_fewer_tokens_has_those_whose_cells_lie_in_the_window():
    """Of 12 x 20 cells with a token at every second one; the window of rows 3 to 8 and columns 5 to 11 holds those of cells 4, 6, 8 and 6, 8, 10."""
    canvas = Canvas(load("ltxv").patcher.model, (1, 128, 2, 12, 20), torch.device("cpu"), 1, {}, {})
    small = 100.0 * torch.arange(6)[:, None] + torch.arange(10)
    mask = small.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 1, 2, -1, -1)
    guide = {"pre_filter_count": 2 * 12 * 20, "latent_shape": [2, 6, 10], "pixel_mask": mask, "strength": 0.7}
    found = _guide_in_window(guide, Rect(3, 5, 9, 12), canvas)
    assert (found["pre_filter_count"], found["latent_shape"], found["strength"]) == (2 * 6 * 7, [2, 3, 3], 0.7)
    assert torch.equal(found["pixel_mask"], small[2:5, 3:6].expand(1, 1, 2, -1, -1))
    assert _guide_in_window({**guide, "pixel_mask": None}, Rect(3, 5, 9, 12), canvas)["pixel_mask"] is None

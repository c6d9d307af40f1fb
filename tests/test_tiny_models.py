"""The small models are what the other tests take them for: real, of their family, and blind to nothing."""

from __future__ import annotations

import comfy.clip_vision
import comfy.sample
import comfy.samplers
import pytest
import torch

from tiny_models import FAMILIES, drawer, load, recorded, with_prediction

SHAPES = {
    "flux_dev": (8, (1, 16, 16, 24)),
    "flux_schnell": (8, (1, 16, 16, 24)),
    "flux_fill": (8, (1, 16, 16, 24)),
    "flux_kontext": (8, (1, 16, 16, 24)),
    "flux2": (16, (1, 128, 16, 24)),
    "flux2_edit": (16, (1, 128, 16, 24)),
    "chroma": (8, (1, 16, 16, 24)),
    "radiance": (1, (1, 3, 64, 96)),
    "sd15": (8, (1, 4, 16, 24)),
    "sd15_inpaint": (8, (1, 4, 16, 24)),
    "sdxl": (8, (1, 4, 16, 24)),
    "sd3": (8, (1, 16, 16, 24)),
    "qwen_image": (8, (1, 16, 1, 16, 24)),
    "qwen_image_edit": (8, (1, 16, 1, 16, 24)),
    "wan21_t2v": (8, (1, 16, 3, 16, 24)),
    "wan21_i2v": (8, (1, 16, 3, 16, 24)),
    "wan21_vace": (8, (1, 16, 3, 16, 24)),
    "wan22_i2v": (8, (1, 16, 3, 16, 24)),
    "wan22_5b": (16, (1, 48, 3, 16, 24)),
    "hunyuan_video": (8, (1, 16, 3, 16, 24)),
    "ltxv": (32, (1, 128, 3, 16, 24)),
    "lumina2": (8, (1, 16, 16, 24)),
    "z_image": (8, (1, 16, 16, 24)),
    "z_image_omni": (8, (1, 16, 16, 24)),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def picture(name: str) -> tuple[int, int]:
    """Height and width in px of the picture whose latent SHAPES gives."""
    cell_px, shape = SHAPES[name]
    return shape[-2] * cell_px, shape[-1] * cell_px


def denoised(name: str, cond: list, latent: torch.Tensor) -> torch.Tensor:
    """The model's first denoised value at seven tenths of the noise, as a sampler of the host sees it."""
    patcher, seen = load(name).patcher, []
    sigma = patcher.get_model_object("model_sampling").percent_to_sigma(0.3)
    noise = drawer(5)(*latent.shape)
    comfy.sample.sample_custom(
        patcher,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor([sigma, 0.0]),
        cond,
        cond,
        latent,
        callback=lambda step, value, x, steps: seen.append(value.clone()),
        disable_pbar=True,
    )
    return seen[0]


def other(value):
    """The value of a conditioning, changed."""
    if torch.is_tensor(value):
        return 1 - value if value.min() >= 0 else -value
    if isinstance(value, comfy.clip_vision.Output):
        changed = comfy.clip_vision.Output()
        for key, entry in vars(value).items():
            changed[key] = other(entry)
        return changed
    return value + 2


def changed_extras(extras: dict):
    """(name, extras) with one value changed at a time; each entry of a list is one."""
    for key, value in extras.items():
        if not isinstance(value, list):
            yield key, extras | {key: other(value)}
            continue
        for index, entry in enumerate(value):
            yield f"{key}[{index}]", extras | {key: [*value[:index], other(entry), *value[index + 1 :]]}


def relative_change(changed: torch.Tensor, reference: torch.Tensor) -> float:
    return float((changed - reference).std() / reference.std())


@every_family
def test_a_family_samples_with_the_hosts_own_ksampler(name):
    model, (height_px, width_px) = load(name), picture(name)
    latent = model.latent(height_px, width_px)
    prompts = model.positive(height_px, width_px), model.negative(height_px, width_px)
    samples = comfy.sample.sample(
        model.patcher, drawer(5)(*latent.shape), 2, 2.0, "euler", "simple", *prompts, latent, seed=5, disable_pbar=True
    )
    assert samples.shape == latent.shape
    assert samples.isfinite().all()


@every_family
def test_a_latent_has_the_size_and_shape_of_its_family(name):
    model = load(name)
    assert (model.cell_px, tuple(model.latent(*picture(name)).shape)) == SHAPES[name]
    assert model.latent(*picture(name), batch=2).shape[0] == 2


@every_family
def test_a_latent_has_unit_variance_inside_the_model(name):
    model = load(name)
    inside = model.patcher.model.process_latent_in(model.latent(*picture(name)))
    assert float(inside.std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.detected])
def test_the_hosts_loader_reads_the_family_from_the_weights(name):
    assert type(load(name).patcher.model.model_config) is FAMILIES[name].config


@every_family
def test_no_weight_is_left_unset_or_zero(name):
    for key, value in load(name).patcher.model.diffusion_model.state_dict().items():
        assert value.isfinite().all() and value.abs().max() > 0.01, key


@every_family
def test_the_denoised_value_depends_on_the_prompt(name):
    model, size = load(name), picture(name)
    latent, ((prompt, extras),) = model.latent(*size), model.positive(*size)
    assert (
        relative_change(denoised(name, [[-prompt, extras]], latent), denoised(name, [[prompt, extras]], latent)) > 0.02
    )


@every_family
def test_the_denoised_value_depends_on_every_other_conditioning(name):
    model, size = load(name), picture(name)
    latent, ((prompt, extras),) = model.latent(*size), model.positive(*size)
    reference = denoised(name, [[prompt, extras]], latent)
    for key, changed in changed_extras(extras):
        assert relative_change(denoised(name, [[prompt, changed]], latent), reference) > 0.02, key


@every_family
def test_moving_a_latent_by_a_patch_does_more_than_move_the_denoised_value(name):
    model, size = load(name), picture(name)
    latent, cond = model.latent(*size), model.positive(*size)
    moved = denoised(name, cond, latent.roll(model.patch_cells, -1)).roll(-model.patch_cells, -1)
    assert relative_change(moved, denoised(name, cond, latent)) > 1e-3


def test_a_prediction_of_ones_own_takes_the_networks_place():
    model = load("sd15")
    latent, prompt = model.latent(64, 64), model.positive(64, 64)
    patcher = with_prediction(model.patcher, lambda call: torch.full_like(call.x, 3.0))
    samples = comfy.sample.sample(
        patcher, torch.randn(latent.shape), 2, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True
    )
    assert torch.allclose(patcher.model.process_latent_in(samples), torch.tensor(3.0))


def test_a_recording_holds_every_call_with_its_cells():
    model = load("qwen_image")
    latent, prompt = model.latent(64, 96, batch=2), model.positive(64, 96)
    patcher, calls = recorded(model.patcher)
    comfy.sample.sample(
        patcher, torch.randn(latent.shape), 3, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True
    )
    assert [call.cells for call in calls] == [2 * 8 * 12] * 3

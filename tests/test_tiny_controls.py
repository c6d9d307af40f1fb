"""The small controls do what the other tests take for granted: they act, and by their hint. An echo shows all of it."""

from __future__ import annotations

import comfy.latent_formats
import comfy.sample
import comfy.samplers
import pytest
import tiny_controls as controls
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_controlnet import ControlNetInpaintingAliMamaApply
from comfy_extras.nodes_model_patch import QwenImageDiffsynthControlnet, ZImageFunControlnet
from nodes import ControlNetApplyAdvanced
from tiny_controls import echoed, picture
from tiny_models import drawer, load, recorded, with_prediction

HEIGHT_PX, WIDTH_PX = 128, 192
CONTROLS = {
    "sd15_controlnet": ("sd15", None),
    "sdxl_controlnet": ("sdxl", None),
    "flux_controlnet": ("flux_dev", controls.vae),
    "flux_pixel_controlnet": ("flux_dev", None),
    "sd3_controlnet": ("sd3", controls.vae),
    "qwen_controlnet": ("qwen_image", controls.video_vae),
    "t2i_adapter": ("sd15", None),
    "t2i_adapter_xl": ("sdxl", None),
    "t2i_adapter_light": ("sd15", None),
}
PATCHES = {
    "qwen_diffsynth_patch": ("qwen_image", controls.video_vae, QwenImageDiffsynthControlnet),
    "z_image_fun_patch": ("z_image", controls.vae, ZImageFunControlnet),
}


def denoised(patcher, name: str, cond: list) -> torch.Tensor:
    """The first denoised value of a one-step run, in the model's own scale."""
    latent, seen = load(name).latent(HEIGHT_PX, WIDTH_PX), []
    sigma = patcher.get_model_object("model_sampling").percent_to_sigma(0.3)
    comfy.sample.sample_custom(
        patcher,
        drawer(5)(*latent.shape),
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


def prompt(name: str) -> list:
    return load(name).positive(HEIGHT_PX, WIDTH_PX)


def controlled(name: str, control, image: torch.Tensor, vae=None) -> list:
    return ControlNetApplyAdvanced().apply_controlnet(prompt(name), [], control, image, 1.0, 0.0, 1.0, vae=vae)[0]


def assert_hint_matters(plain: torch.Tensor, one: torch.Tensor, another: torch.Tensor, least: float = 0.02) -> None:
    assert float((one - plain).std() / plain.std()) > 0.05
    assert float((one - another).std() / plain.std()) > least


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_changes_the_denoised_value_by_its_hint(kind):
    name, make_vae = CONTROLS[kind]
    control, vae = getattr(controls, kind)(), make_vae and make_vae()
    hinted = [
        denoised(load(name).patcher, name, controlled(name, control, picture(HEIGHT_PX, WIDTH_PX, seed=seed), vae))
        for seed in (7, 8)
    ]
    assert_hint_matters(denoised(load(name).patcher, name, prompt(name)), *hinted)


@pytest.mark.parametrize("kind, name", [("flux_controlnet", "flux_dev"), ("sd3_controlnet", "sd3")])
def test_an_inpainting_control_sees_its_mask(kind, name):
    control, vae, image = getattr(controls, kind)(inpaint=True), controls.vae(), picture(HEIGHT_PX, WIDTH_PX)
    half = torch.ones(1, HEIGHT_PX, WIDTH_PX)
    half[..., WIDTH_PX // 2 :] = 0
    arguments = control, vae, image
    conds = [
        ControlNetInpaintingAliMamaApply.execute(prompt(name), [], *arguments, mask, 1.0, 0.0, 1.0)[0]
        for mask in (half, 1 - half)
    ]
    patcher = load(name).patcher
    assert_hint_matters(denoised(patcher, name, prompt(name)), *(denoised(patcher, name, cond) for cond in conds))


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("kind", PATCHES)
def test_a_model_patch_changes_the_denoised_value_by_its_image(kind, inpaint):
    name, make_vae, node = PATCHES[kind]
    patch, vae = getattr(controls, kind)(inpaint), make_vae()
    mask = picture(HEIGHT_PX, WIDTH_PX, seed=9)[..., 0].round() if inpaint else None
    plain = load(name).patcher
    patched = [
        node().diffsynth_controlnet(plain, patch, vae, picture(HEIGHT_PX, WIDTH_PX, seed=seed), 1.0, mask=mask)[0]
        for seed in (7, 8)
    ]
    assert_hint_matters(
        denoised(plain, name, prompt(name)), *(denoised(patcher, name, prompt(name)) for patcher in patched)
    )


def with_box(model: ModelPatcher, top: int, left: int) -> list:
    ((tokens, extras),) = prompt("sd15")
    return [[tokens, extras | {"gligen": ("position", model, [(drawer(4)(1, 64), 8, 12, top, left)])}]]


def test_gligen_changes_the_denoised_value_by_its_box():
    model, patcher = controls.gligen(), load("sd15").patcher
    boxes = [denoised(patcher, "sd15", with_box(model, *corner)) for corner in ((0, 0), (8, 12))]
    assert_hint_matters(denoised(patcher, "sd15", prompt("sd15")), *boxes, least=0.003)  # one token of thirty


def test_an_echo_of_gligen_holds_the_box_in_fractions_of_the_latent():
    patcher, calls = recorded(load("sd15").patcher)
    denoised(patcher, "sd15", with_box(controls.echo_gligen(), 8, 6))
    patch = calls[0].transformer_options["patches"]["middle_patch"][0]
    assert patch.boxes.tolist() == [[0.25, 0.5, 0.75, 1.0]]  # a latent of 16 x 24 cells


def test_an_echo_of_a_pixel_hint_is_the_pixels_of_every_cell():
    image = picture(HEIGHT_PX, WIDTH_PX)
    value = denoised(
        with_prediction(load("sd15").patcher, echoed), "sd15", controlled("sd15", controls.echo_control(), image)
    )
    assert torch.equal(value[0, 0], image[0, ::8, ::8, 0])
    assert torch.equal(value[0, 3], image[0, 7::8, 7::8, 2])


def test_an_echo_of_an_adapter_is_the_pixels_of_every_cell():
    image = picture(HEIGHT_PX, WIDTH_PX)
    value = denoised(
        with_prediction(load("sd15").patcher, echoed), "sd15", controlled("sd15", controls.echo_adapter(), image)
    )
    assert torch.equal(value[0, 0], image[0, ::8, ::8, 0])


def test_an_echo_of_a_hint_behind_a_vae_is_its_latent():
    image, vae, latent_format = picture(HEIGHT_PX, WIDTH_PX), controls.EchoVAE(), comfy.latent_formats.Flux()
    control = controls.echo_control(compression_ratio=1, latent_format=latent_format)
    value = denoised(
        with_prediction(load("flux_dev").patcher, echoed), "flux_dev", controlled("flux_dev", control, image, vae)
    )
    assert torch.equal(value, latent_format.process_in(controls.EchoVAE().encode(image)))
    assert vae.sizes == [(HEIGHT_PX, WIDTH_PX)]

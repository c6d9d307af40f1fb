"""The demo's models do what their card says, loaded by the host's own nodes."""
from __future__ import annotations

import folder_paths
import numpy as np
import pytest
import torch
from comfy import model_management
from comfy_extras.nodes_lotus import LotusConditioning
from conftest import ROOT, load_module
from nodes import ConditioningZeroOut, UNETLoader, VAELoader

DEMO = ROOT / "demo"
MODELS = DEMO / "models"
WEIGHTS = ("autoencoder.safetensors", "denoiser.safetensors")

measures = load_module("qtd_demo_measures", DEMO / "measures.py")
photos = load_module("qtd_demo_photos", DEMO / "photos.py")


@pytest.fixture(scope="module", autouse=True)
def demo_models_are_listed():
    folder_paths.add_model_folder_path("diffusion_models", str(MODELS))
    folder_paths.add_model_folder_path("vae", str(MODELS))


@pytest.fixture(scope="module")
def vae(demo_models_are_listed):
    return VAELoader().load_vae("autoencoder.safetensors")[0]


@pytest.fixture(scope="module")
def images():
    """Held-out photos as the host's IMAGE: 1 x height x width x 3."""
    return {name: torch.from_numpy(photos.to_array(photo))[None] for name, photo in photos.held_out_photos().items()}


@pytest.fixture(scope="module")
def latents(vae, images):
    return {name: vae.encode(image) for name, image in images.items()}


@pytest.fixture(scope="module")
def decoded(vae, latents):
    return {name: vae.decode(latent) for name, latent in latents.items()}


@pytest.fixture(scope="module")
def model(demo_models_are_listed):
    patcher = UNETLoader().load_unet("denoiser.safetensors", "default")[0]
    model_management.load_models_gpu([patcher])
    return patcher.model


@pytest.fixture(scope="module")
def conditioning():
    """Text that says nothing, from core nodes alone."""
    return ConditioningZeroOut().zero_out(LotusConditioning.execute().result[0])[0]


def test_the_weights_are_small_enough_for_a_git_repository():
    assert sum((MODELS / name).stat().st_size for name in WEIGHTS) <= 12_000_000


def test_the_host_recognises_the_models_as_flux_and_a_tiny_autoencoder_of_16_channels(model, vae):
    assert type(model).__name__ == "Flux"
    assert type(vae.first_stage_model).__name__ == "TAESD"
    assert (vae.latent_channels, vae.downscale_ratio) == (16, 8)


def test_no_held_out_photo_is_among_the_training_photos():
    assert not set(photos.HELD_OUT) & set(photos.TRAINING)


@pytest.mark.parametrize(
    ("name", "linear_codec_db"),
    # The 16 principal components of 8 x 8 px blocks of nine of the training photos.
    [("astronaut", 28.5), ("camera", 29.8), ("coffee", 27.6)],
)
def test_each_held_out_photo_survives_the_autoencoder_at_29_db_and_better_than_a_linear_codec(name, linear_codec_db, images, decoded):
    assert measures.psnr(decoded[name], images[name]) >= max(29.0, linear_codec_db + 1.0)


def step_energy(picture, borders):
    """Mean absolute difference of the two pixels on either side of each vertical border."""
    return (picture[:, :, borders] - picture[:, :, borders - 1]).abs().mean().item()


@pytest.mark.parametrize("name", photos.HELD_OUT)
def test_no_grid_of_cells_shows_in_what_the_autoencoder_decodes(name, images, decoded):
    error = decoded[name] - images[name]
    columns = np.arange(8, error.shape[2])
    on_grid = step_energy(error, columns[columns % 8 == 0])
    assert on_grid / step_energy(error, columns[columns % 8 != 0]) <= 1.1


def test_latents_reach_the_model_with_about_unit_power(model, latents):
    power = np.mean([model.process_latent_in(latent).square().mean().item() for latent in latents.values()])
    assert 0.7 < power < 1.4


@pytest.mark.parametrize("sigma", measures.SCORED_SIGMAS)
def test_the_denoiser_beats_the_noisy_latent_and_its_best_gaussian_blur(sigma, model, latents, conditioning):
    text = conditioning[0][0]

    def denoise(x, level):
        return model.apply_model(x, torch.full((1,), level), c_crossattn=text)

    with torch.inference_mode():
        gains = measures.denoising_gains(denoise, [model.process_latent_in(latent) for latent in latents.values()], (sigma,))
    assert gains[f"over_noisy_{sigma}"] > 2.0
    assert gains[f"over_blur_{sigma}"] > 1.5

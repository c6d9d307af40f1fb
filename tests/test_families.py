"""Every family of models with every method: small networks of the host's own classes, through the host's sampler."""
from __future__ import annotations

import functools

import comfy.sample
import pytest
import torch
from sampling import patched, sample, with_prediction
from tiny_models import FAMILIES, load, recorded

from qtd_pack.quadtree import Quadtree
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.model_facts import patch_cells
from qtd_pack.tiled_diffusion import KEY
from qtd_pack.blending import METHODS

# Family: (px of a cell, cells of a patch). A UNet halves its input three times.
SCALES = {
    "flux_dev": (8, 2), "flux_schnell": (8, 2), "flux_fill": (8, 2), "flux_kontext": (8, 2), "flux2": (16, 1), "flux2_edit": (16, 1),
    "chroma": (8, 2), "radiance": (1, 16), "sd15": (8, 8), "sd15_inpaint": (8, 8), "sdxl": (8, 8), "sd3": (8, 2),
    "qwen_image": (8, 2), "qwen_image_edit": (8, 2), "wan21_t2v": (8, 2), "wan21_i2v": (8, 2), "wan21_vace": (8, 2), "wan22_i2v": (8, 2),
    "wan22_5b": (16, 2), "hunyuan_video": (8, 2), "ltxv": (32, 1), "lumina2": (8, 2), "z_image": (8, 2), "z_image_omni": (8, 2),
}
# Cells of a patch: (height, width) in cells of a picture that takes several windows each way.
CANVASES = {1: (12, 12), 2: (16, 16), 8: (40, 32), 16: (128, 96)}
ODD_CANVASES = {1: (13, 12), 2: (17, 19), 8: (41, 35), 16: (129, 135)}

# Frames, tokens of text and width of the network, which a window's cost depends on. FLUX.2 pads its prompt.
COSTS = {
    "flux_dev": (1, 64, 128), "flux2": (1, 512, 128), "chroma": (1, 64, 128), "radiance": (1, 64, 128), "sd3": (1, 64, 128),
    "qwen_image": (1, 64, 64), "wan21_t2v": (3, 64, 128), "wan22_5b": (3, 64, 128), "hunyuan_video": (3, 64, 128), "ltxv": (3, 64, 128),
    "lumina2": (1, 64, 96), "z_image": (1, 64, 256),
}

every_family = pytest.mark.parametrize("name", FAMILIES)
first, *others = METHODS
every_method = pytest.mark.parametrize("method", [pytest.param(first, marks=pytest.mark.short), *others])


def size_px(name: str, canvases=CANVASES) -> tuple[int, int]:
    cell_px, patch = SCALES[name]
    height, width = canvases[patch]
    return height * cell_px, width * cell_px


def left_cells(name: str) -> int:
    """The columns of cells that belong to a tree's left part."""
    return CANVASES[SCALES[name][1]][1] // 2


def tree(name: str, left: float, right: float, canvases=CANVASES) -> Quadtree:
    """A strength for the left part and one for the rest."""
    mask = torch.full((1, *size_px(name, canvases)), right)
    mask[..., :left_cells(name) * SCALES[name][0]] = left
    return quadtree_from_mask(mask, min_leaf=8, max_leaf=64)


def tiled(name: str, method: str, quadtree: Quadtree, **settings):
    """The model in windows of half the picture's width, which see a patch more on every side."""
    side = left_cells(name) * SCALES[name][0]
    return patched(load(name), quadtree, **dict(method=method, min_window=side, max_window=side, tile_overlap=8) | settings)


def run(name: str, patcher, latent, *, size=None, **options) -> torch.Tensor:
    return sample(load(name), patcher, latent, size=size or size_px(name), **dict(steps=2, cfg=3.0) | options)


@functools.lru_cache(maxsize=None)
def plain(name: str) -> torch.Tensor:
    """What the host makes of the whole picture."""
    return run(name, load(name).patcher, load(name).latent(*size_px(name)))


def test_every_family_is_in_the_table():
    assert SCALES.keys() == FAMILIES.keys()


@every_family
def test_cells_and_patches_are_those_of_the_family(name):
    model = load(name).patcher.model
    assert (model.latent_format.spacial_downscale_ratio, patch_cells(model)) == SCALES[name]


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_a_window_is_that_of_the_family(name):
    patcher, calls = recorded(tiled(name, "MultiDiffusion", tree(name, 1.0, 1.0)))
    run(name, patcher, load(name).latent(*size_px(name)), steps=1)
    cost = calls[0].transformer_options[KEY].facts.cost_of
    assert (cost.frames, cost.text_tokens, cost.width, cost.patch) == (*COSTS[name], SCALES[name][1])


@pytest.mark.parametrize("canvases", [CANVASES, ODD_CANVASES], ids=["whole patches", "odd size"])
@every_family
@every_method
def test_strength_0_is_kept_and_strength_1_is_repainted(name, method, canvases):
    size, left = size_px(name, canvases), left_cells(name)
    latent = load(name).latent(*size)
    patcher, calls = recorded(tiled(name, method, tree(name, 0.0, 1.0, canvases)))
    out = run(name, patcher, latent, size=size)
    assert torch.equal(out[..., :left], latent[..., :left])
    assert (out - latent)[..., left:].flatten(-2).std(-1).min() > 0.1 * latent.std()
    # Several windows for each of cond and uncond, none as large as the picture.
    assert all(call.x.shape[-2:] != latent.shape[-2:] for call in calls) and sum(call.x.shape[0] for call in calls) > 2 * 2
    assert {side % SCALES[name][1] for call in calls for side in call.x.shape[-2:]} == {0}


@every_family
@every_method
def test_one_window_is_plain_sampling_bit_for_bit(name, method):
    everything = max(size_px(name))
    patcher = tiled(name, method, tree(name, 1.0, 1.0), min_window=everything, max_window=everything)
    assert torch.equal(run(name, patcher, load(name).latent(*size_px(name))), plain(name))


@every_family
@every_method
def test_windows_of_a_model_that_answers_cell_by_cell_leave_no_seam(name, method):
    def halve(x, sigma):
        return 0.5 * x
    latent = load(name).latent(*size_px(name))
    windows = run(name, with_prediction(tiled(name, method, tree(name, 1.0, 1.0)), halve), latent)
    whole = run(name, with_prediction(load(name).patcher, halve), latent)
    assert (windows - whole).abs().max() < 1e-5 * latent.std()


@every_family
def test_two_images_of_a_batch_are_each_as_if_alone(name):
    model = load(name)
    latent = torch.cat([model.latent(*size_px(name), seed=1), model.latent(*size_px(name), seed=2)])
    noise = comfy.sample.prepare_noise(latent, 5)
    patcher = tiled(name, "Mixture of Diffusers", tree(name, 1.0, 1.0))
    together = run(name, patcher, latent, noise=noise, steps=1)
    for row in range(2):
        alone = run(name, patcher, latent[row:row + 1], noise=noise[row:row + 1], steps=1)
        assert (together[row:row + 1] - alone).abs().max() < 1e-3 * latent.std()


@pytest.mark.parametrize("name", ["flux_dev", "flux2", "ltxv"])
def test_a_tree_of_the_uncropped_picture_lies_where_the_vae_has_cropped(name):
    cell_px, (height, width) = SCALES[name][0], size_px(name)
    mask = torch.zeros(height // 8 + 4, width // 8 + 4).bernoulli_().repeat_interleave(8, 0).repeat_interleave(8, 1)
    mask = mask[:height + cell_px - 1, :width + cell_px - 1]
    rows, cols = ((cell_px - 1) // 2 + cell_px // 2 + torch.arange(side // cell_px) * cell_px for side in (height, width))
    latent = load(name).latent(height, width)
    out = run(name, tiled(name, METHODS[0], quadtree_from_mask(mask, min_leaf=8, max_leaf=64)), latent)
    assert torch.equal((out == latent).all(1).reshape(-1, *out.shape[-2:])[0], mask[rows][:, cols] == 0)

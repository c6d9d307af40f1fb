"""What a model sees, of the whole picture and window by window."""
from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from sampling import even_tree
from tiny_models import Call, TinyModel, drawer, with_prediction

from qtd_pack.tiled_diffusion import TiledDiffusion

# Not a multiple of any window, in cells of 8 px 51 x 67: the last windows are moved inside, by an odd number of cells.
HEIGHT_PX, WIDTH_PX = 408, 536

# One window at a time, a few, and as many as there are of one shape; with and without overlap.
every_batching = pytest.mark.parametrize("tiling", [
    dict(tile_batch_size=1), dict(tile_batch_size=3), dict(), dict(method="SpotDiffusion", tile_batch_size=2),
], ids=["1 window", "3 windows", "all windows", "without overlap"])


def denoised(
    patcher, latent: torch.Tensor, positive: list, negative: list | None = None, *, cfg: float = 1.0, percents=(0.3, 0.6), noise=None, noise_mask=None,
) -> torch.Tensor:
    """The denoised values of a sampling run at these places of the schedule, one after another, in the model's own scale."""
    seen = []
    sampling = patcher.get_model_object("model_sampling")
    sigmas = torch.tensor([*(float(sampling.percent_to_sigma(percent)) for percent in percents), 0.0])
    comfy.sample.sample_custom(
        patcher, drawer(5)(*latent.shape) if noise is None else noise, cfg, comfy.samplers.sampler_object("euler"), sigmas, positive,
        negative or positive, latent, callback=lambda step, value, x, steps: seen.append(value.clone()),
        noise_mask=noise_mask, disable_pbar=True)
    return torch.stack(seen)


def tiled(patcher, height_px: int = HEIGHT_PX, width_px: int = WIDTH_PX, **settings):
    """The patcher in windows of about 128 px, everything redrawn."""
    settings = {"min_window": 128, "max_window": 128, "tile_overlap": 24} | settings
    return TiledDiffusion(even_tree(1.0, height_px, width_px), **settings).patched(patcher)


def assert_windows_see_their_part(
    model: TinyModel, predict, positive: list, negative: list | None = None, *, tiling, latent=None, cfg=1.0, patcher=None, **options,
) -> None:
    """With a model that gives back what it was given, windows add up to what the whole is given.

    Where windows overlap all of them have to agree, for their weighted sum to be right everywhere.
    """
    latent = model.latent(HEIGHT_PX, WIDTH_PX) if latent is None else latent
    rows = []

    def counted(call: Call) -> torch.Tensor:
        rows.append(tuple(call.x.shape))
        return predict(call)

    size = [length * model.cell_px for length in latent.shape[-2:]]
    patcher = patcher or model.patcher
    whole = denoised(with_prediction(patcher, predict), latent, positive, negative, cfg=cfg, **options)
    parts = denoised(with_prediction(tiled(patcher, *size, **tiling), counted), latent, positive, negative, cfg=cfg, **options)
    assert len({shape[-2:] for shape in rows} - {tuple(latent.shape[-2:])}) > 0, "one window saw everything"
    assert whole.std() > 0.02, "there is nothing to see"
    assert (parts - whole).abs().max() < 1e-5


def assert_windows_are_their_parts_alone(model: TinyModel, part_of, latent: torch.Tensor, *, windows: int, cfg=3.0, noise_mask=None, edge=16) -> None:
    """Without overlap, a window of a real network is what the host makes of that part as a picture of its own.

    part_of(cells, px): the patcher, positive and negative for a part, both slices of (..., height, width). The canvas is
    2 x 2 windows of so many cells.
    """
    noise, edge_px = drawer(5)(*latent.shape), edge * model.cell_px
    settings = dict(min_window=edge_px, max_window=edge_px, tile_overlap=0, tile_batch_size=windows)
    patcher, *conds = part_of(..., ...)
    # Later steps start from their neighbours' results, too: only the first is the part's own.
    options = dict(cfg=cfg, percents=(0.3,))
    out = denoised(tiled(patcher, 2 * edge_px, 2 * edge_px, **settings), latent, *conds, noise=noise, noise_mask=noise_mask, **options)
    assert out.std() > 0.02
    for top, left in ((0, 0), (0, edge), (edge, 0), (edge, edge)):
        cells = ..., slice(top, top + edge), slice(left, left + edge)
        px = ..., *(slice(start * model.cell_px, (start + edge) * model.cell_px) for start in (top, left))
        patcher, *conds = part_of(cells, px)
        mask = noise_mask if noise_mask is None or noise_mask.shape[-1] == 1 else noise_mask[cells]
        alone = denoised(patcher, latent[cells], *conds, noise=noise[cells], noise_mask=mask, **options)
        assert (out[cells] - alone).abs().max() < 1e-4

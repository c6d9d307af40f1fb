"""Full-size models on CUDA: seconds per step and peak memory. Random weights: speed does not depend on them."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from measuring import synchronize, table, timed
from qtd_pack.tiled_diffusion import TiledDiffusion
from sampling import even_tree, with_prediction

from full_size import FLUX, SDXL
from plans import BUDGETS, photo_tree


@dataclass(frozen=True)
class FullSize:
    """name, configuration class and sizes as the host's detector writes them; cfg and the shapes of the text."""

    name: str
    config: type
    sizes: dict
    cfg: float
    text: tuple[int, int]
    pooled: int


MODELS = (
    FullSize("FLUX.1-dev", comfy.supported_models.Flux, FLUX, 1.0, (512, 4096), 768),
    FullSize("SDXL", comfy.supported_models.SDXL, SDXL, 5.0, (77, 2048), 1280),
)
TINY = (
    FullSize(
        "FLUX.1-dev, tiny", comfy.supported_models.Flux,
        FLUX | dict(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, context_in_dim=64, vec_in_dim=64), 1.0, (64, 64), 64),
    FullSize(
        "SDXL, tiny", comfy.supported_models.SDXL,
        SDXL | dict(model_channels=32, transformer_depth=[0, 0, 0, 0, 0, 1], transformer_depth_output=[0, 0, 0, 0, 0, 0, 0, 0, 1], transformer_depth_middle=1,
                    context_dim=64, adm_in_channels=64 + 6 * 256), 5.0, (77, 64), 64),
)


@torch.no_grad()
def made(full: FullSize, device: torch.device, dtype: torch.dtype):
    """The host's model of this size on the device, filled there."""
    config = full.config(dict(full.sizes))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    generator = torch.Generator(device).manual_seed(0)
    for value in model.diffusion_model.parameters():
        value.normal_(0, 1 / math.sqrt(max(math.prod(value.shape[1:]), 1)) if value.ndim > 1 else 0.02, generator=generator)
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def sampled(full: FullSize, patcher, height: int, width: int, steps: int) -> None:
    """What KSampler does."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, patcher.model.latent_format.latent_channels, height // 8, width // 8, generator=generator)
    conds = [[torch.randn(1, *full.text, generator=generator), {"pooled_output": torch.randn(1, full.pooled, generator=generator), "guidance": 3.5}]]
    comfy.sample.sample(patcher, torch.randn(latent.shape, generator=generator), steps, full.cfg, "euler", "simple", conds, conds, latent, disable_pbar=True, seed=1)


def measured(full: FullSize, patcher, size: tuple[int, int], steps: int) -> tuple[float, float] | None:
    """Seconds per step and peak bytes beyond what is allocated before; None if it does not fit."""
    on_cuda = torch.cuda.is_available()
    try:
        sampled(full, patcher, *size, 1)
        synchronize()
        before = torch.cuda.memory_allocated() if on_cuda else 0
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: sampled(full, patcher, *size, steps))
        return seconds / steps, (torch.cuda.max_memory_allocated() - before if on_cuda else 0)
    except comfy.model_management.OOM_EXCEPTION:
        comfy.model_management.soft_empty_cache()
        return None


def variants(patcher, side: int, window: int) -> dict:
    """Name to (patched model, size in px, steps)."""
    tree_of = functools.partial(photo_tree, "astronaut", side)
    grid = dict(min_window=window, max_window=window)
    tiled = lambda tree, **settings: TiledDiffusion(tree, **{"min_window": window // 4, "max_window": window} | settings).patched(patcher)
    whole = even_tree(1.0, side, side)
    identity = with_prediction(tiled(whole, **grid), lambda x, sigma: x)
    return {
        "one window": (patcher, (window + 128, window + 128), 4), "plain": (patcher, (side, side), 3), "full grid": (tiled(whole, **grid), (side, side), 4),
        "full grid, one window at a time": (tiled(whole, **grid, tile_batch_size=1), (side, side), 4), "the patch alone": (identity, (side, side), 8),
        **{f"budget {budget}": (tiled(tree_of(budget)), (side, side), 20) for budget in BUDGETS},
    }


def rows_of(full: FullSize, patcher, side: int, window: int) -> list[tuple]:
    found = {name: measured(full, model, size, steps) for name, (model, size, steps) in variants(patcher, side, window).items()}
    whole = found["full grid"]
    rows = []
    for name, result in found.items():
        if result is None:
            rows.append((full.name, side, name, "does not fit", "-", "-"))
        else:
            share = f"{result[0] / whole[0]:.3f}" if whole else "-"
            rows.append((full.name, side, name, f"{result[0]:.4f}", share, f"{result[1] / 2**30:.2f}" if torch.cuda.is_available() else "-"))
    return rows


def cuda_part(tiny: bool) -> str:
    """Part e."""
    title = "## e. Full-size models on CUDA\n\n"
    if not torch.cuda.is_available() and not tiny:
        return title + "Left out: this machine has no CUDA device. `python run.py bench cuda` measures it where there is one.\n"
    device = comfy.model_management.get_torch_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = []
    for full in TINY if tiny else MODELS:
        patcher = made(full, device, dtype)
        for side in (256,) if tiny else (2048, 4096):
            rows += rows_of(full, patcher, side, side // 4 if tiny else 1024)
        del patcher
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
    return title + table(("model", "side, px", "", "seconds per step", "of the full grid", "peak beyond the model, GiB"), rows) + (
        "\nRandom weights, bf16. Plain sampling and the grid over 3 and 4 steps, budgets over 20. The patch alone: the full grid with the model left out; "
        "its limit is 0.01 of the full grid. Peak memory by the allocator; its limit is that of one window and three latents, to 10 %.\n")

"""Do windows that blend evenly lock each other into a collage at full strength? Measured where the right answer is known.

The model is an ideal one: it knows that every picture is one wave, and only not where the wave begins, its phase. What it
is given, a window's cells and the part of a reference that conditioning.py cuts for it, it weighs as Bayes would. The
whole canvas in one window is of one phase; windows that have each made up their own, and keep to it, are a collage.
"""
from __future__ import annotations

import math
from dataclasses import replace

import comfy.patcher_extension
import comfy.sample
import torch
from qtd_pack.blending import shift_offsets
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion
from sampling import even_tree, load
from tiny_models import with_prediction

PICTURE_PX = 768
WINDOW_PX = 256
CELL_PX = 8
OVERLAPS_PX = (0, 16, 32, 64, 128)
STEPS = 20
SEEDS = 4
PHASES = 16
PERIOD = 32
# A wave so faint that a window has made up its mind after the first steps, and not in the first.
HEIGHT = 0.05
# How well a reference tells the phase: the noise on it, in heights of the wave.
REFERENCES = {"none": math.inf, "faint": 110.0, "clear": 20.0}
GRIDS = ("Mixture of Diffusers", "MultiDiffusion", "Mixture of Diffusers, moving", "SpotDiffusion")


def waves(width: int) -> torch.Tensor:
    """All that the model holds possible, as one row of cells each, since a wave runs across: (phases, 16, width)."""
    turns = torch.arange(width) / PERIOD + torch.arange(PHASES)[:, None] / PHASES
    return HEIGHT * torch.cos(2 * math.pi * (turns[:, None] + torch.arange(16)[:, None] / 16))


def likelihoods(seen: torch.Tensor, possible: torch.Tensor, scale: float, noise: float) -> torch.Tensor:
    """Logarithms, up to a constant, of what is seen, (rows, 16, height, width), being scale times each possible picture in noise: (rows, phases)."""
    products = torch.einsum("rcx,pcx->rp", seen.sum(-2), possible)
    return (scale * products - scale ** 2 * seen.shape[-2] * possible.square().sum((1, 2)) / 2) / noise ** 2


def ideal(blur: float):
    """The denoiser; blur: the noise on the reference, in heights of the wave."""
    def predict(call):
        sigma = float(call.sigma.flatten()[0])
        possible = waves(call.x.shape[-1])
        found = likelihoods(call.x, possible, 1 - sigma, sigma)
        for reference in call.conds["ref_latents"] if math.isfinite(blur) else ():
            found = found + likelihoods(reference, possible, 1.0, blur * HEIGHT)
        return torch.einsum("rp,pcx->rcx", found.softmax(-1), possible)[:, :, None].expand_as(call.x).clone()
    return predict


def with_moving_grid(patcher, seed: int):
    """The windows' grid moves at every step, as SpotDiffusion's does, and windows blend as ever."""
    clone = patcher.clone()

    def move(executor, x, sigma, model_options, *args, **kwargs):
        run = model_options["transformer_options"][KEY]
        offsets = shift_offsets("fibonacci", STEPS, WINDOW_PX // CELL_PX, 2, seed)
        run.facts = replace(run.facts, offsets=offsets)
        return executor(x, sigma, model_options, *args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "with_moving_grid", move)
    return clone


def painted(model, settings: TiledDiffusion, blur: float, seed: int, moving: bool = False) -> torch.Tensor:
    """What is sampled at strength 1, (16, height, width), in the model's scale."""
    scale = model.patcher.model.latent_format
    generator = torch.Generator().manual_seed(seed)
    size = settings.tree.height, settings.tree.width
    cells = [length // CELL_PX for length in size]
    wave = waves(cells[1])[seed % PHASES][None, :, None].expand(1, 16, *cells)
    reference = wave + HEIGHT * min(blur, 1e3) * torch.randn(wave.shape, generator=generator)
    patcher = settings.patched(with_prediction(model.patcher, ideal(blur)))
    patcher = with_moving_grid(patcher, seed) if moving else patcher
    (text, values), = model.positive(*size)
    conds = [[text, values | {"reference_latents": [scale.process_out(reference)]}]]
    latent = model.latent(*size)
    samples = comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(latent, seed), STEPS, 1.0, "euler", "simple", conds, conds, latent, seed=seed, disable_pbar=True)
    return scale.process_in(samples)[0]


def phases(found: torch.Tensor, side: int) -> torch.Tensor:
    """The phase of each square of so many cells, (rows, cols)."""
    products = (waves(found.shape[-1])[:, :, None] * found).sum(1)
    return products.unfold(-2, side, side).unfold(-2, side, side).sum((-1, -2)).argmax(0)


def apart(phase: torch.Tensor) -> float:
    """The share of neighbours whose phases differ by more than an eighth of a turn."""
    return float(are_apart(torch.cat([phase.diff(dim=0).flatten(), phase.diff(dim=1).flatten()])).double().mean())


def are_apart(steps: torch.Tensor) -> torch.Tensor:
    return torch.minimum(steps % PHASES, -steps % PHASES) > PHASES // 8


def apart_at_random() -> float:
    """apart, if every window's phase is its own."""
    return float(are_apart(torch.arange(PHASES)).double().mean())


def collage_of(model, grid: str, overlap: int, blur: float) -> float:
    """apart, mean of the seeds."""
    method, _, moving = grid.partition(", ")
    settings = TiledDiffusion(
        even_tree(1.0, PICTURE_PX, PICTURE_PX), method=method, min_window=WINDOW_PX, max_window=WINDOW_PX, tile_overlap=overlap, window_shapes="square", shift_method="fibonacci")
    found = [apart(phases(painted(model, settings, blur, seed, bool(moving)), WINDOW_PX // CELL_PX)) for seed in range(SEEDS)]
    return sum(found) / len(found)


def collage_rows() -> list[list]:
    """A row for each grid and overlap: the share of neighbours that are apart, for each reference."""
    model = load("flux_kontext")
    rows = []
    for grid in GRIDS:
        for overlap in OVERLAPS_PX if grid != "SpotDiffusion" else (0,):
            rows.append([grid, overlap, *(f"{collage_of(model, grid, overlap, blur):.2f}" for blur in REFERENCES.values())])
    return rows


COLUMNS = "windows | overlap, px | no reference | a faint one | a clear one"


def collage_text() -> str:
    """What stands in QUALITY.md."""
    from quality import table

    return (
        f"The share of neighbouring windows that end in different pictures at strength 1; {apart_at_random():.2f} if each made up its own. The model is an ideal one of pictures that are one wave, "
        "and what it does not know is where the wave begins; the truth, the whole canvas in one window, is 0.00. A reference latent shows it where, through noise: each window sees its part. Windows of "
        f"{WINDOW_PX} px in {PICTURE_PX} px, {STEPS} steps, {SEEDS} seeds. Moving: the grid is another one at every step, and blends.\n\n{table(COLUMNS, collage_rows())}")

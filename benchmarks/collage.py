"""Do windows that blend evenly lock each other into a collage at full strength? Measured where the right answer is known.

The model is an ideal one: it knows that every picture is one wave, and only not where the wave begins, its phase. What it
is given, a window's cells and the part of a reference that conditioning.py cuts for it, it weighs as Bayes would. The
whole canvas in one window is of one phase; windows that have each made up their own, and keep to it, are a collage.

How large it is shown a picture, a model sees by what there is in it. A wave does not tell; so the ideal one is told, by a
sigma that is none of the schedule's, when it sees the whole small.
"""
from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import comfy.patcher_extension
import comfy.sample
import torch
from qtd_pack.blending import shift_offsets
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion
from sampling import even_tree, load
from tiny_models import with_prediction

CELL_PX = 8
STEPS = 20
PHASES = 16
PERIOD = 32
WINDOWS = 3
# A wave so faint that a window has made up its mind after the first steps, and not in the first.
HEIGHT = 0.05
# How well a reference tells the phase: the noise on it, in heights of the wave.
REFERENCES = {"none": math.inf, "faint": 110.0, "clear": 20.0}


@dataclass(frozen=True)
class Way:
    """How windows are laid and joined; so many of them side by side are the picture. moving: the grid is another one at every step, and blends."""

    window_px: int
    overlap_px: int
    method: str = "Mixture of Diffusers"
    moving: bool = False
    hold_layout: float = 0.0

    def settings(self) -> TiledDiffusion:
        tree = even_tree(1.0, WINDOWS * self.window_px, WINDOWS * self.window_px)
        return TiledDiffusion(
            tree, method=self.method, min_window=self.window_px, max_window=self.window_px, tile_overlap=self.overlap_px, window_shapes="square",
            shift_method="fibonacci", hold_layout=self.hold_layout)


WAYS = (
    *(Way(256, overlap) for overlap in (0, 16, 32, 64, 96, 128)), Way(256, 64, "MultiDiffusion"), Way(256, 32, moving=True), Way(256, 64, moving=True),
    Way(256, 0, "SpotDiffusion"), *(Way(512, overlap) for overlap in (64, 128, 192)),
    *(Way(px, overlap, hold_layout=hold) for px, overlap in ((256, 0), (256, 32), (512, 64)) for hold in (0.5, 1.0)), Way(256, 0, "SpotDiffusion", hold_layout=1.0))


def waves(width: int, factor: int = 1) -> torch.Tensor:
    """All that the model holds possible, as one row of cells each, since a wave runs across: (phases, 16, width). factor: how many cells are seen as one."""
    turns = torch.arange(width * factor) / PERIOD + torch.arange(PHASES)[:, None] / PHASES
    return HEIGHT * torch.cos(2 * math.pi * (turns[:, None] + torch.arange(16)[:, None] / 16)).unflatten(-1, (width, factor)).mean(-1)


def likelihoods(seen: torch.Tensor, possible: torch.Tensor, scale: float, noise: float) -> torch.Tensor:
    """Logarithms, up to a constant, of what is seen, (rows, 16, height, width), being scale times each possible picture in noise: (rows, phases)."""
    products = torch.einsum("rcx,pcx->rp", seen.sum(-2), possible)
    return (scale * products - scale ** 2 * seen.shape[-2] * possible.square().sum((1, 2)) / 2) / noise ** 2


def ideal(blur: float):
    """The denoiser; blur: the noise on the reference, in heights of the wave."""
    def predict(call):
        sigma = float(call.sigma.flatten()[0])
        factor = 1 if bool((call.transformer_options["sample_sigmas"] == call.sigma.flatten()[0]).any()) else WINDOWS
        possible = waves(call.x.shape[-1], factor)
        found = likelihoods(call.x, possible, 1 - sigma, sigma)
        for reference in call.conds["ref_latents"] if math.isfinite(blur) else ():
            found = found + likelihoods(reference, possible, 1.0, blur * HEIGHT / factor)
        return torch.einsum("rp,pcx->rcx", found.softmax(-1), possible)[:, :, None].expand_as(call.x).clone()
    return predict


def with_moving_grid(patcher, side: int, seed: int):
    """The windows' grid moves at every step, as SpotDiffusion's does, and windows blend as ever. side: of a window, in cells."""
    clone = patcher.clone()

    def move(executor, x, sigma, model_options, *args, **kwargs):
        run = model_options["transformer_options"][KEY]
        run.facts = replace(run.facts, offsets=shift_offsets("fibonacci", STEPS, side, 2, seed))
        return executor(x, sigma, model_options, *args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "with_moving_grid", move)
    return clone


def painted(model, way: Way, blur: float, seed: int) -> torch.Tensor:
    """What is sampled from a picture that the model holds possible, (16, height, width), in the model's scale."""
    scale, settings = model.patcher.model.latent_format, way.settings()
    size = settings.tree.height, settings.tree.width
    cells = [length // CELL_PX for length in size]
    original = waves(cells[1])[seed % PHASES][None, :, None].repeat(1, 1, cells[0], 1)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed))
    patcher = settings.patched(with_prediction(model.patcher, ideal(blur)))
    patcher = with_moving_grid(patcher, way.window_px // CELL_PX, seed) if way.moving else patcher
    (text, values), = model.positive(*size)
    conds = [[text, values | {"reference_latents": [scale.process_out(original + HEIGHT * min(blur, 1e3) * noise)]}]]
    latent = scale.process_out(original)
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


def collage_of(way: Way, reference: str = "none", seeds: int = 8) -> float:
    """apart, mean of the seeds."""
    model, side = load("flux_kontext"), way.window_px // CELL_PX
    return statistics.mean(apart(phases(painted(model, way, REFERENCES[reference], seed), side)) for seed in range(seeds))


def collage_rows() -> list[list]:
    """A row for each way: the share of neighbours that are apart, for each reference."""
    return [
        [way.method + ", moving" * way.moving, way.window_px, way.overlap_px, way.hold_layout, *(f"{collage_of(way, reference):.2f}" for reference in REFERENCES)]
        for way in WAYS]


COLUMNS = "way | window, px | overlap, px | hold_layout | no reference | a faint one | a clear one"


def draw_collage() -> None:
    """The same noise without a look at the whole, and with one: the first channel, grey where the wave is 0."""
    from quality import save_strip

    found = [painted(load("flux_kontext"), Way(512, 64, hold_layout=hold), math.inf, 0)[0, :, :, None].expand(-1, -1, 3) for hold in (0.0, 1.0)]
    save_strip("quality_collage.png", [0.5 + 0.5 * cells / HEIGHT for cells in found], 2)


def collage_text() -> str:
    """What stands in QUALITY.md; its picture is written beside it."""
    from quality import table

    draw_collage()
    return (
        f"The share of neighbouring windows that end in different pictures at strength 1; {apart_at_random():.2f} if each made up its own. The model is an ideal one of pictures that are one wave, "
        "and what it does not know is where the wave begins; the truth, the whole canvas in one window, is 0.00. A reference latent shows it where, through noise: each window sees its part. "
        f"Three windows by three, {STEPS} steps, eight seeds. Moving: the grid is another one at every step, and blends.\n\n{table(COLUMNS, collage_rows())}\n\n"
        "![Without hold_layout, with](quality_collage.png)\n\n*Three windows of 512 px by three, overlap 64 px, one noise: without hold_layout, and with 1.*")

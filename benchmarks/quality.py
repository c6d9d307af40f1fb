"""How visible are windows and leaves? Measured with the demo's model on photos it was not trained on.

    python run.py bench quality [SECTION ...]

Writes QUALITY.md, or sections of it, and the crops it shows. Pictures are 384 px and windows 192 px unless a table says otherwise, so that
every picture has borders of every kind and a processor is enough. Three measures are this file's own:

Seams. A picture made in one window has no seams, so a seam is a line in the difference between the tiled picture and
that one. The energy of a line is the squared step between the pixels on its two sides, three pixels deep. What a
border adds is its energy in the difference, less that of the nearest parallel lines, two, four and six cells away,
which are no border. The ratio is one and what all borders add over what the picture itself has beside them: the
gradient energy on borders over that elsewhere, freed of the content that happens to lie there. 1.00 is no seam. Both
sums are over several draws of the noise where little but noise is in a picture: at strength 1 single details beside a
border scatter the ratio of one draw by 0.03 and more.

Leaf borders. The same where two leaves differ in strength. The picture without a line there is made of those sampled
evenly with the one strength and the other, faded into each other over four cells.

Edges of kept parts. The energy of the lines around them over that of the same lines in the original.

Ghosts. How much of the original's fine detail is still in leaves of one strength: the slope of the regression of the
result on the original, both less their local mean. What plain img2img of that strength keeps is the level.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "demo" / "models"
CELL_PX = 8
PICTURE_PX = 384
WINDOW_PX = PICTURE_PX // 2


if "comfy" not in sys.modules:
    from measuring import import_host

    import_host()
import comfy.patcher_extension  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402

from qtd_pack.compositing import composite  # noqa: E402
from qtd_pack.drawing import draw_quadtree  # noqa: E402
from qtd_pack.placement import strength_raster  # noqa: E402
from qtd_pack.quadtree import Quadtree, build_quadtree  # noqa: E402
from qtd_pack.strengths import quadtree_from_mask  # noqa: E402
from qtd_pack import blending, sampling_run, tiled_diffusion, tones  # noqa: E402
from qtd_pack.denoise_schedule import eased  # noqa: E402
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion  # noqa: E402

SPEC = importlib.util.spec_from_file_location("qtd_demo_photos", ROOT / "demo" / "photos.py")
photos = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(photos)


@dataclass(frozen=True)
class Painting:
    """latent, picture: the result. run: the patch's state when it ended, or None without the patch."""

    latent: torch.Tensor
    picture: torch.Tensor
    run: object


@dataclass(frozen=True)
class Painter:
    """The demo's model and autoencoder, and the conditioning they are used with."""

    patcher: object
    vae: object
    steps: int = 8

    @torch.no_grad()
    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(picture)

    @torch.no_grad()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent).clone()

    @torch.no_grad()
    def paint(self, latent: torch.Tensor, settings: TiledDiffusion | None = None, *, start_step: int = 0, seed: int = 0) -> Painting:
        """Sample as KSampler does, through the patch if there are settings."""
        patcher, runs = (self.patcher, []) if settings is None else watched(settings.patched(self.patcher))
        text = [[torch.zeros(1, 2, 1024), {}]]
        samples = comfy.sample.sample(
            patcher, comfy.sample.prepare_noise(latent, seed), self.steps, 1.0, "euler", "simple", text, text, latent,
            start_step=start_step, seed=seed, disable_pbar=True)
        return Painting(samples, self.decode(samples), runs[0] if runs else None)

    def img2img(self, latent: torch.Tensor, strength: float, seed: int = 0) -> Painting:
        """The whole canvas without the patch."""
        return self.paint(latent, start_step=self.steps - round(strength * self.steps), seed=seed)


def load_painter() -> Painter:
    patcher = comfy.sd.load_diffusion_model(str(MODELS / "denoiser.safetensors"), {"dtype": torch.float32})
    return Painter(patcher, comfy.sd.VAE(comfy.utils.load_torch_file(str(MODELS / "autoencoder.safetensors"))))


def watched(patcher) -> tuple:
    """The patcher, and a list that gets the patch's state of each run."""
    runs: list = []

    def note(executor, model, conds, x, sigma, model_options):
        run = model_options["transformer_options"][KEY]
        if run not in runs:
            runs.append(run)
        return executor(model, conds, x, sigma, model_options)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "watched", note)
    return patcher, runs


def held_out(largest_px: int = PICTURE_PX) -> dict[str, torch.Tensor]:
    """Name to picture, (1, H, W, 3) in 0..1, both sides whole patches of the model."""
    return {name: torch.from_numpy(photos.to_array(photo)[:largest_px, :largest_px])[None] for name, photo in photos.held_out_photos().items()}


def even_tree(picture: torch.Tensor, strength: float) -> Quadtree:
    """Every leaf of one strength."""
    return quadtree_from_mask(torch.full(picture.shape[1:3], strength), min_leaf=64, max_leaf=512)


def patchwork(picture: torch.Tensor, strengths: tuple[float, ...], leaf: int, seed: int) -> Quadtree:
    """Leaves of one size with strengths at random, so that their borders have nothing to do with the content."""
    height, width = picture.shape[1:3]
    grid = torch.randint(len(strengths), (math.ceil(height / leaf), math.ceil(width / leaf)), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor(strengths)[grid].repeat_interleave(leaf, 0).repeat_interleave(leaf, 1)[:height, :width]
    return quadtree_from_mask(mask, min_leaf=leaf, max_leaf=leaf)


def detail_tree(picture: torch.Tensor) -> Quadtree:
    """The tree that the nodes' defaults make, with leaves scaled to the size of the picture."""
    return build_quadtree(picture, min_leaf=64, max_leaf=256)


def one_window(settings: TiledDiffusion) -> TiledDiffusion:
    """The same without windows."""
    return replace(settings, min_window=4096, max_window=4096)


def line_energy(picture: torch.Tensor) -> torch.Tensor:
    """Energy of the line above and of the line left of each cell, (2, rows, cols); 0 at the picture's border.

    picture: (1, H, W, 3) in 0..1. The energy is on the 0..255 scale.
    """
    levels = picture[0].double() * 255
    found = []
    for axis in (0, 1):
        steps = torch.zeros(levels.shape[:2], dtype=levels.dtype)
        steps.narrow(axis, 1, steps.shape[axis] - 1).copy_(levels.diff(dim=axis).square().mean(-1))
        deep = steps + steps.roll(1, axis) + steps.roll(-1, axis)
        lines = deep[::CELL_PX] if axis == 0 else deep[:, ::CELL_PX]
        lines = lines.unflatten(1 - axis, (-1, CELL_PX)).mean(2 - axis)
        lines.narrow(axis, 0, 1).zero_()
        found.append(lines)
    return torch.stack(found)


def shifted(values: torch.Tensor, axis: int, cells: int) -> torch.Tensor:
    """The values moved along an axis, zeros moved in."""
    moved = torch.zeros_like(values)
    size = values.shape[axis] - abs(cells)
    if size > 0:
        moved.narrow(axis, max(cells, 0), size).copy_(values.narrow(axis, max(-cells, 0), size))
    return moved


def elsewhere(energy: torch.Tensor, axis: int, borders: torch.Tensor) -> torch.Tensor:
    """Mean energy of the parallel lines two, four and six cells away that are no border, of both sides alike.

    NaN where a side has none.
    """
    inside = torch.ones_like(borders)
    inside.narrow(axis, 0, 1).zero_()
    free = inside & ~borders
    sides = []
    for direction in (-1, 1):
        total, count = (sum(shifted(values, axis, direction * cells) for cells in (2, 4, 6)) for values in (energy * free, free.double()))
        sides.append(total / count)
    return (sides[0] + sides[1]) / 2


def added_by(borders: torch.Tensor, picture: torch.Tensor, reference: torch.Tensor, all_borders: torch.Tensor) -> tuple[float, float]:
    """The energy that borders add to the reference, and the picture's own beside them, both summed over the borders.

    borders: bool, (2, rows, cols), see line_energy. all_borders: every line that is not elsewhere.
    """
    own, changed = line_energy(picture), line_energy(picture - reference)
    added = level = 0.0
    for axis in (0, 1):
        here = changed[axis] - elsewhere(changed[axis], axis, all_borders[axis])
        there = elsewhere(own[axis], axis, all_borders[axis])
        counted = borders[axis] & here.isfinite()
        added += float(here[counted].sum())
        level += float(there[counted].sum())
    return added, level


def window_borders(run, *, cores: bool) -> torch.Tensor:
    """Lines, (2, rows, cols), where a window of any step begins or ends; with `cores` its core instead."""
    height, width = run.facts.strengths.shape
    found = torch.zeros(2, height + 1, width + 1, dtype=torch.bool)
    for plan, *_ in run.plans.values():
        for window in plan.windows:
            part = window.core if cores else window.rect
            for row in (part.top, part.bottom):
                found[0, row, part.left:part.right] = True
            for col in (part.left, part.right):
                found[1, part.top:part.bottom, col] = True
    found = found[:, :height, :width]
    found[0, 0] = found[1, :, 0] = False
    return found


def seam_sums(painting: Painting, whole: torch.Tensor) -> torch.Tensor:
    """What the windows' edges, and their cores' edges, add and the level beside them, (2, 2); whole: the picture in one window.

    Sums of several paintings add up to those of all: in one smooth painting a single detail beside a border counts as much as a seam.
    """
    edges, cores = (window_borders(painting.run, cores=cores) for cores in (False, True))
    return torch.tensor([added_by(borders, painting.picture, whole, edges | cores) for borders in (edges, cores)], dtype=torch.float64)


def pooled(pairs: list[tuple[Painting, torch.Tensor]]) -> torch.Tensor:
    """The seam_sums of several paintings, each with its whole, as of one."""
    return sum(seam_sums(painting, whole) for painting, whole in pairs)


def worst_ratio(sums: torch.Tensor) -> float:
    """1 and what borders add over the level, of the worse kind of border; 1 where there is none."""
    return max([1.0, *(1 + added / level for added, level in sums.tolist() if level)])


def seam_ratio(painting: Painting, whole: torch.Tensor) -> float:
    return worst_ratio(seam_sums(painting, whole))


def sides_of_lines(tree: Quadtree, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Strengths before and after each line, each (2, rows, cols); equal at the picture's border."""
    after = strength_raster(tree, height, width).expand(2, -1, -1)
    before = torch.stack([after[axis].roll(1, axis) for axis in (0, 1)])
    before[0, 0], before[1, :, 0] = after[0, 0], after[1, :, 0]
    return before, after


def close(strengths: torch.Tensor, strength: float) -> torch.Tensor:
    """Equal to the precision of a tree made from a mask."""
    return (strengths - strength).abs() < 0.6 / 255


def faded(tree: Quadtree, evenly: dict[float, torch.Tensor]) -> torch.Tensor:
    """The pictures sampled evenly, each where the tree has its strength, faded into each other over four cells.

    evenly: strength to picture, (1, H, W, 3), for each strength in the tree.
    """
    levels = sorted(evenly)
    height, width = evenly[levels[0]].shape[1:3]
    strengths = eased(strength_raster(tree, height // CELL_PX, width // CELL_PX), 4)
    strengths = functional.interpolate(strengths[None, None], (height, width), mode="bilinear")[0, 0, :, :, None]
    picture = evenly[levels[0]]
    for lower, upper in zip(levels, levels[1:]):
        picture = torch.lerp(picture, evenly[upper], ((strengths - lower) / (upper - lower)).clamp(0, 1))
    return picture


def added_by_leaves(picture: torch.Tensor, tree: Quadtree, evenly: dict[float, torch.Tensor]) -> tuple[float, float]:
    """What the borders between leaves of different strengths add, and the level beside them, see added_by.

    evenly: the picture sampled with one strength, for each strength in the tree; for 0 the original.
    """
    before, after = sides_of_lines(tree, picture.shape[1] // CELL_PX, picture.shape[2] // CELL_PX)
    borders = before != after
    return added_by(borders, picture, faded(tree, evenly), borders)


def kept_edge_ratio(result: torch.Tensor, original: torch.Tensor, tree: Quadtree) -> float:
    """Energy of the lines between kept and changed leaves over that of the same lines in the original.

    One side of them is the original, so nothing but an edge can differ.
    """
    before, after = sides_of_lines(tree, original.shape[1] // CELL_PX, original.shape[2] // CELL_PX)
    edges = (before == 0) != (after == 0)
    return float(line_energy(result)[edges].sum() / line_energy(original)[edges].sum())


def fine_detail(picture: torch.Tensor, radius: int = 8) -> torch.Tensor:
    """The picture less its local mean, (1, 3, H, W)."""
    planes = picture.movedim(-1, 1)
    mean = functional.avg_pool2d(planes, 2 * radius + 1, 1, radius, count_include_pad=False)
    return planes - mean


def ghost(picture: torch.Tensor, original: torch.Tensor, where: torch.Tensor) -> float:
    """The share of the original's fine detail that is in the picture; where: bool, (rows, cols) of cells."""
    inside = where.repeat_interleave(CELL_PX, 0).repeat_interleave(CELL_PX, 1)
    new, old = fine_detail(picture)[..., inside], fine_detail(original)[..., inside]
    return float((new * old).sum() / old.square().sum())


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    error = float((picture.double() - reference.double()).square().mean())
    return 10 * math.log10(1 / error) if error else math.inf


def ms_ssim(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Multi-scale structural similarity of the luma, five scales (Wang, Simoncelli and Bovik 2003)."""
    planes = [(values[0] @ torch.tensor([0.299, 0.587, 0.114]))[None, None].double() for values in (picture, reference)]
    taps = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
    blur = functools.partial(functional.conv2d, weight=(taps[:, None] * taps / taps.sum() ** 2)[None, None])
    found = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        x, y = planes if scale == 0 else [functional.avg_pool2d(plane, 2) for plane in planes]
        planes = [x, y]
        mean_x, mean_y = blur(x), blur(y)
        variance = blur(x * x) - mean_x ** 2 + blur(y * y) - mean_y ** 2
        similar = (2 * (blur(x * y) - mean_x * mean_y) + 0.03 ** 2) / (variance + 0.03 ** 2)
        if scale == 4:
            similar = similar * (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
        found *= float(similar.mean().clamp_min(0)) ** weight
    return found


@contextlib.contextmanager
def instead(module, name: str, value):
    """Measure with another value of something that is not a setting."""
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)


def gaussian_weight(method: str, height: int, width: int, overlap: int) -> torch.Tensor:
    """The weight of the Mixture of Diffusers paper: a Gaussian of variance 0.01 in units of the side."""
    falloffs = [torch.exp(-((torch.arange(length) + 0.5) / length - 0.5).square() / 0.02) for length in (height, width)]
    return falloffs[0][:, None] * falloffs[1]


@dataclass(frozen=True)
class Bench:
    """What is painted, and everything painted once that several tables compare with."""

    painter: Painter
    pictures: dict[str, torch.Tensor]
    cache: dict

    def once(self, key, make):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def latent(self, name: str) -> torch.Tensor:
        return self.once(("latent", name), lambda: self.painter.encode(self.pictures[name]))

    def img2img(self, name: str, strength: float, draw: int = 0) -> torch.Tensor:
        """The whole canvas sampled evenly by the host alone; at 0 the original as the autoencoder gives it back."""
        if strength == 0:
            return self.once(("decoded", name), lambda: self.painter.decode(self.latent(name)))
        seed = noise_seed(name, draw)
        return self.once(("img2img", name, strength, draw), lambda: self.painter.img2img(self.latent(name), strength, seed).picture)

    def evenly(self, name: str, strength: float, schedule: str) -> torch.Tensor:
        """The whole canvas sampled evenly by a schedule."""
        if schedule == "img2img" or strength == 0:
            return self.img2img(name, strength)
        settings = one_window(TiledDiffusion(even_tree(self.pictures[name], strength), schedule=schedule))
        return self.once(("evenly", name, strength, schedule), lambda: self.paint(name, settings).picture)

    def paint(self, name: str, settings: TiledDiffusion, draw: int = 0) -> Painting:
        return self.painter.paint(self.latent(name), settings, seed=noise_seed(name, draw))

    def even_pairs(self, name: str, strength: float, draws: int, settings: TiledDiffusion) -> list[tuple[Painting, torch.Tensor]]:
        """A picture sampled evenly with several draws of its noise, each beside the same in the whole canvas."""
        return [(self.paint(name, settings, draw), self.img2img(name, strength, draw)) for draw in range(draws)]


def noise_seed(name: str, draw: int) -> int:
    """Each picture has its own noise: at strength 1 it is all that there is."""
    return sum(name.encode()) + 1000 * draw


def in_windows(tree: Quadtree, **settings) -> TiledDiffusion:
    """The default settings, with windows small enough for the pictures."""
    return TiledDiffusion(tree, **{"min_window": WINDOW_PX, "max_window": WINDOW_PX} | settings)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


DRAWS = 6
WINDOWS_PX = (96, 192, 288)
OVERLAPS_PX = (16, 32, 64)


@dataclass(frozen=True)
class Way:
    """One way to sample in windows; weight: what stands in for the pack's own, or None."""

    label: str
    window_px: int
    overlap_px: int
    method: str
    weight: object = None

    def settings(self, tree: Quadtree) -> TiledDiffusion:
        return TiledDiffusion(tree, method=self.method, tile_overlap=self.overlap_px, min_window=self.window_px, max_window=self.window_px)


def all_ways() -> list[Way]:
    ways = []
    for window_px in WINDOWS_PX:
        ways.append(Way("grid without overlap", window_px, 0, "MultiDiffusion"))
        ways.append(Way("SpotDiffusion", window_px, 0, "SpotDiffusion"))
        for overlap_px in OVERLAPS_PX:
            ways.append(Way("MultiDiffusion", window_px, overlap_px, "MultiDiffusion"))
            ways.append(Way("Mixture, Gaussian", window_px, overlap_px, "Mixture of Diffusers", gaussian_weight))
            ways.append(Way("Mixture, cosine", window_px, overlap_px, "Mixture of Diffusers"))
    return ways


def seams_and_agreement(pairs_by_picture: list[list[tuple[Painting, torch.Tensor]]]) -> list[str]:
    """Three cells of a table: seams of all pictures, those of the worst one, and the PSNR to the wholes."""
    sums = [pooled(pairs) for pairs in pairs_by_picture]
    agreement = mean(psnr(painting.picture, whole) for pairs in pairs_by_picture for painting, whole in pairs)
    return [f"{worst_ratio(sum(sums)):.3f}", f"{max(map(worst_ratio, sums)):.3f}", f"{agreement:.1f}"]


def compare_windows(bench: Bench, strength: float = 1.0) -> list[list]:
    """A row for each way to sample a picture evenly: seams (of all and worst), agreement, cost."""
    rows = []
    for way in all_ways():
        with instead(blending, "blend_weight", way.weight or blending.blend_weight):
            pairs_by_picture = [bench.even_pairs(name, strength, 2, way.settings(even_tree(picture, strength))) for name, picture in bench.pictures.items()]
        found = [pair for pairs in pairs_by_picture for pair in pairs]
        cost = mean(painting.run.ledger.cost / whole_cost(painting.run) for painting, _ in found)
        rows.append([
            way.label, way.window_px, way.overlap_px, *seams_and_agreement(pairs_by_picture),
            f"{mean(ms_ssim(painting.picture, whole) for painting, whole in found):.4f}", f"{cost:.2f}"])
    return rows


def compare_methods(bench: Bench, strength: float = 0.5) -> list[list]:
    """A row for each method and schedule at the default overlap: seams (of all and worst) and agreement with one window."""
    rows = []
    for method in sampling_run.METHODS:
        for schedule in sampling_run.SCHEDULES:
            pairs_by_picture = [
                [(bench.paint(name, in_windows(even_tree(picture, strength), method=method, schedule=schedule)), bench.evenly(name, strength, schedule))]
                for name, picture in bench.pictures.items()
            ]
            rows.append([method, schedule, *seams_and_agreement(pairs_by_picture)])
    return rows


def whole_cost(run) -> float:
    """The cost of the same calls with the whole canvas in one window."""
    return run.ledger.calls * run.facts.cost_of.of(*run.facts.strengths.shape)


HOLDS = (0.0, 0.5, 1.0)
LAYOUT_DRAWS = 3


def window_colours(picture: torch.Tensor, reference: torch.Tensor, side: int = WINDOWS_PX[0]) -> float:
    """How far the mean colours of squares differ, RMS on the 0..255 scale."""
    return 255 * float(functional.avg_pool2d((picture - reference).movedim(-1, 1), side).square().mean().sqrt())


def compare_tones(bench: Bench) -> list[list]:
    """A row for each strength and hold_tones in small windows: beside one window with the same hold, beside the whole canvas without, ghosts."""
    rows = []
    for strength in (1.0, 0.875, 0.75):
        for hold in HOLDS:
            figures = [tones_of(bench, name, strength, hold) for name in bench.pictures]
            rows.append([str(strength), str(hold), *(f"{mean(values):.{digits}f}" for values, digits in zip(zip(*figures), (1, 1, 1, 1, 3, 3)))])
    return rows


def tones_of(bench: Bench, name: str, strength: float, hold: float) -> tuple[float, ...]:
    picture, plain = bench.pictures[name], bench.img2img(name, strength)
    settings = TiledDiffusion(even_tree(picture, strength), tile_overlap=16, min_window=WINDOWS_PX[0], max_window=WINDOWS_PX[0], hold_tones=hold)
    tiled = bench.paint(name, settings).picture
    # The low pass is as wide as a window; here the whole canvas is held as the small windows are.
    with instead(tiled_diffusion, "low_pass", lambda value, side, wraps: tones.low_pass(value, WINDOWS_PX[0] // CELL_PX, wraps)):
        held = bench.paint(name, one_window(settings)).picture
    everywhere = torch.ones(picture.shape[1] // CELL_PX, picture.shape[2] // CELL_PX, dtype=torch.bool)
    agreement = [figure(tiled, reference) for reference in (held, plain) for figure in (psnr, window_colours)]
    return *agreement, ghost(tiled, picture, everywhere), ghost(plain, picture, everywhere)


def compare_layouts(bench: Bench) -> list[list]:
    """A row for each window, strength and hold_layout: seams, agreement with the whole canvas, its cost."""
    rows = []
    for side, overlap in ((WINDOWS_PX[0], 16), (WINDOWS_PX[1], 32)):
        for strength in (1.0, 0.75):
            for hold in HOLDS:
                rows.append([side, str(strength), str(hold), *layout_figures(bench, side, overlap, strength, hold)])
    return rows


def layout_figures(bench: Bench, side: int, overlap: int, strength: float, hold: float) -> list[str]:
    make = lambda name: TiledDiffusion(even_tree(bench.pictures[name], strength), tile_overlap=overlap, min_window=side, max_window=side, hold_layout=hold)
    pairs_by_picture = [bench.even_pairs(name, strength, LAYOUT_DRAWS, make(name)) for name in bench.pictures]
    pairs = [pair for pairs in pairs_by_picture for pair in pairs]
    colours = mean(window_colours(painting.picture, whole, side) for painting, whole in pairs)
    ledgers = [painting.run.ledger for painting, _ in pairs]
    cost = sum(ledger.cost for ledger in ledgers) / sum(ledger.grid_cost for ledger in ledgers)
    return [*seams_and_agreement(pairs_by_picture), f"{colours:.1f}", f"{cost:.2f}"]


EASINGS = (("img2img", 4), ("img2img", 2), ("img2img", 0), ("blend", 4), ("ramp", 4))
PATCH_STRENGTHS = (0.0, 0.25, 0.5, 1.0)


def compare_schedules(bench: Bench) -> list[list]:
    """A row for each schedule and easing: leaf borders and ghosts in patchworks."""
    rows = []
    for schedule, cells in EASINGS:
        with instead(sampling_run, "EASE_CELLS", cells):
            borders, ghosts, levels = zip(*(leaf_figures(bench, name, schedule) for name in bench.pictures))
        rows.append([schedule, str(cells), f"{mean(borders):.3f}", f"{max(borders):.3f}", *(f"{mean(shares):.2f}" for shares in zip(*ghosts))])
    rows.append(["whole canvas, img2img", "", "1.000", "1.000", *(f"{mean(shares):.2f}" for shares in zip(*levels))])
    return rows


def leaf_figures(bench: Bench, name: str, schedule: str = "img2img") -> tuple[float, list[float], list[float]]:
    """Leaf-border ratio over patchworks of 64 px and 128 px in one window, ghosts of each strength above 0, their level."""
    picture = bench.pictures[name]
    evenly = {strength: bench.evenly(name, strength, schedule) for strength in PATCH_STRENGTHS}
    added = level = 0.0
    for leaf in (64, 128):
        tree = patchwork(picture, PATCH_STRENGTHS, leaf, seed=leaf)
        painting = bench.paint(name, one_window(TiledDiffusion(tree, schedule=schedule)))
        sums = added_by_leaves(painting.picture, tree, evenly)
        added, level = added + sums[0], level + sums[1]
    # Of the last, since only leaves of 128 px have a middle that others hardly reach.
    middles = {strength: close(painting.run.facts.strengths.cpu(), strength) for strength in PATCH_STRENGTHS[1:]}
    ghosts = [ghost(painting.picture, picture, where) for where in middles.values()]
    return 1 + added / level, ghosts, [ghost(bench.img2img(name, strength), picture, where) for strength, where in middles.items()]


def detail_painting(bench: Bench, name: str) -> tuple[Quadtree, Painting]:
    """A picture by the nodes' default settings, in small windows."""
    tree = detail_tree(bench.pictures[name])
    return tree, bench.once(("detail", name), lambda: bench.paint(name, in_windows(tree)))


def show_defaults(bench: Bench) -> list[list]:
    """A row for each picture: seams of even and detail trees, leaf borders at random and by detail."""
    rows = []
    for name, picture in bench.pictures.items():
        seams = [worst_ratio(pooled(bench.even_pairs(name, strength, DRAWS, in_windows(even_tree(picture, strength))))) for strength in (0.5, 1.0)]
        tree, painting = detail_painting(bench, name)
        seams.append(seam_ratio(painting, bench.paint(name, one_window(TiledDiffusion(tree))).picture))
        added, level = added_by_leaves(painting.picture, tree, {leaf.strength: bench.img2img(name, leaf.strength) for leaf in tree.leaves})
        rows.append([name, *(f"{ratio:.3f}" for ratio in (*seams, leaf_figures(bench, name)[0], 1 + added / level))])
    return rows


def show_kept(bench: Bench) -> list[list]:
    """A row for each picture: what happens to kept pixels, and the lines around them, without and with the composite."""
    rows = []
    for name, picture in bench.pictures.items():
        tree, painting = detail_painting(bench, name)
        kept = strength_raster(tree, *picture.shape[1:3]) == 0
        row = [name, f"{100 * float(kept.double().mean()):.0f} %"]
        for result in (painting.picture, composite(picture, painting.picture, tree)):
            same = (result == picture)[0][kept].all(-1).double().mean()
            row += [f"{100 * float(same):.2f} %", f"{255 * float((result - picture)[0][kept].abs().max()):.1f}", f"{kept_edge_ratio(result, picture, tree):.3f}"]
        rows.append(row)
    return rows


def cut(picture: torch.Tensor, top: int, left: int, side: int = 192) -> torch.Tensor:
    return picture[0, top:top + side, left:left + side]


def save_strip(name: str, crops: list[torch.Tensor], scale: int = 1) -> None:
    """Crops beside each other, in a PNG next to this file."""
    gap = torch.ones(crops[0].shape[0], 4, 3)
    parts = [part for crop in crops for part in (crop, gap)][:-1]
    strip = photos.to_picture(torch.cat(parts, 1).numpy())
    strip.resize((strip.width * scale, strip.height * scale), Image.NEAREST).save(Path(__file__).with_name(name), optimize=True)


def draw_seams(bench: Bench) -> None:
    """Where four windows meet: the grid without overlap, the default, the whole canvas."""
    name, picture = next(iter(bench.pictures.items()))
    ways = [in_windows(even_tree(picture, 1.0), **settings) for settings in (dict(method="MultiDiffusion", tile_overlap=0), {})]
    save_strip("quality_seams.png", [cut(found, 96, 96) for found in [*(bench.paint(name, way).picture for way in ways), bench.img2img(name, 1.0)]])


def draw_leaves(bench: Bench) -> None:
    """Leaves of several strengths: the original, without easing, with it."""
    name, picture = next(iter(bench.pictures.items()))
    tree = patchwork(picture, PATCH_STRENGTHS, 64, seed=64)
    found = [picture]
    for cells in (0, sampling_run.EASE_CELLS):
        with instead(sampling_run, "EASE_CELLS", cells):
            found.append(bench.paint(name, one_window(TiledDiffusion(tree))).picture)
    save_strip("quality_leaves.png", [cut(each, 64, 128) for each in found])


def draw_ghosts(bench: Bench) -> None:
    """An even strength of 0.5: the original, blend, img2img."""
    name, picture = next(iter(bench.pictures.items()))
    save_strip("quality_ghosts.png", [cut(found, 64, 128) for found in (picture, bench.evenly(name, 0.5, "blend"), bench.img2img(name, 0.5))])


def draw_kept(bench: Bench) -> None:
    """By detail: the original with its leaves, the result, the result after Quadtree Composite."""
    name, picture = next(iter(bench.pictures.items()))
    tree, painting = detail_painting(bench, name)
    found = (draw_quadtree(picture, tree, opacity=0.3), painting.picture, composite(picture, painting.picture, tree))
    save_strip("quality_kept.png", [cut(each, 96, 128) for each in found])


def table(header: str, rows: list[list]) -> str:
    names = header.split(" | ")
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in row) + " |" for row in lines)


WINDOW_COLUMNS = "way | window, px | overlap, px | seams, all | worst picture | PSNR to the whole canvas, dB | MS-SSIM | cost"
TONE_COLUMNS = "strength | hold_tones | PSNR to one window held alike, dB | windows' colours | PSNR to the whole canvas without, dB | windows' colours | ghosts | of the whole canvas"
LAYOUT_COLUMNS = "window, px | strength | hold_layout | seams, all | worst picture | PSNR to the whole canvas, dB | windows' colours | cost, of the full grid's"
METHOD_COLUMNS = "method | schedule | seams, all | worst picture | PSNR to one window, dB"
SCHEDULE_COLUMNS = "schedule | eased over, cells | leaf borders, mean | worst | ghosts at 0.25 | at 0.5 | at 1"
DEFAULT_COLUMNS = "picture | seams at 0.5 | at 1 | by detail | leaf borders, at random | by detail"
KEPT_COLUMNS = "picture | kept | exact | largest error | edges | exact, composite | largest error | edges"


TONES = (
    "Windows' colours: by how much their means differ, in steps of 1/255. At strength 1 the whole canvas without hold_tones knows "
    "nothing of the original's tones, so that holding them leads away from it.")


def windows_text(bench: Bench) -> str:
    draw_seams(bench)
    return (
        f"The truth is the whole canvas in one window; cost is relative to it.\n\n{table(WINDOW_COLUMNS, compare_windows(bench))}\n\n"
        "![Grid without overlap, default settings, whole canvas](quality_seams.png)\n\n*Where four windows meet: grid without overlap, default settings, whole canvas.*")


def agreement_text(bench: Bench) -> str:
    import agreement  # it measures with what is here

    return agreement.agreement_text(bench, Path(__file__).with_name("agreement.png"))


def collage_text(bench: Bench) -> str:
    import collage

    return collage.collage_text()


def schedules_text(bench: Bench) -> str:
    draw_leaves(bench)
    draw_ghosts(bench)
    return (
        f"Leaves of 64 and 128 px with strengths 0, 0.25, 0.5 and 1 at random, in one window.\n\n{table(SCHEDULE_COLUMNS, compare_schedules(bench))}\n\n"
        "![Original, without easing, with easing](quality_leaves.png)\n\n*Leaves of four strengths: original, without easing, with easing.*\n\n"
        "![Original, blend, img2img](quality_ghosts.png)\n\n*Strength 0.5 everywhere: original, blend, img2img.*")


def kept_text(bench: Bench) -> str:
    draw_kept(bench)
    return (
        f"By detail, decoded, then with Quadtree Composite. Errors in steps of 1/255.\n\n{table(KEPT_COLUMNS, show_kept(bench))}\n\n"
        "![Leaves, decoded, with Quadtree Composite](quality_kept.png)\n\n*Leaves (violet is kept), decoded result, with Quadtree Composite.*")


# By the word that names it: heading, and what is measured.
SECTIONS = {
    "defaults": (f"Default settings, windows of {WINDOW_PX} px", lambda bench: table(DEFAULT_COLUMNS, show_defaults(bench))),
    "windows": ("Windows at strength 1", windows_text),
    "agreement": ("Tight windows and squares", agreement_text),
    "tones": ("Tones that hold", lambda bench: f"Windows of {WINDOWS_PX[0]} px, overlap 16 px. {TONES}\n\n{table(TONE_COLUMNS, compare_tones(bench))}"),
    "layout": (
        "Windows that follow one layout",
        lambda bench: f"Windows' colours as above; overlap 16 and 32 px; {LAYOUT_DRAWS} noises each.\n\n{table(LAYOUT_COLUMNS, compare_layouts(bench))}"),
    "collage": ("One picture or a collage", collage_text),
    "methods": (
        "Methods and schedules",
        lambda bench: f"Strength 0.5 everywhere, windows of {WINDOW_PX} px, the default overlap.\n\n{table(METHOD_COLUMNS, compare_methods(bench))}"),
    "schedules": ("Schedules and easing", schedules_text),
    "kept": ("Kept pixels", kept_text),
}


def head(bench: Bench) -> str:
    sizes = ", ".join(f"{name} ({picture.shape[2]} x {picture.shape[1]})" for name, picture in bench.pictures.items())
    return f"# Quality, measured\n\nWritten by `python run.py bench quality`. Held-out photos: {sizes}. The demo's model, Euler, {bench.painter.steps} steps.\n{MEASURES}\n"


def measured(bench: Bench, name: str) -> str:
    """A section of QUALITY.md; its crops are written beside it."""
    heading, text = SECTIONS[name]
    start = time.monotonic()
    section = f"## {heading}\n\n{text(bench)}\n"
    print(f"{section}\n[{name}: {time.monotonic() - start:.0f} s]\n", flush=True)
    return section


MEASURES = """
- Seams and leaf borders: gradient energy on the borders over that elsewhere, content taken out; 1.00 is none. The even strengths of the first table are sampled with six noises, those of the second with two.
- Ghosts: the share of the original's fine detail that is still in leaves of a strength.
- Exact: pixels that are the original's, bit for bit, among those of strength 0."""


def main(words: list[str]) -> int:
    from measuring import with_section

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of QUALITY.md, to be measured anew; all if none is named: {', '.join(SECTIONS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("QUALITY.md"))
    arguments = parser.parse_args(words)
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(arguments.threads)
    bench = Bench(load_painter(), held_out(), {})
    text = arguments.out.read_text("utf-8") if arguments.sections else head(bench)
    for name in arguments.sections or SECTIONS:
        text = with_section(text, measured(bench, name))
    arguments.out.write_text(text, "utf-8")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

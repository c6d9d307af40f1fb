"""Sampling runs of all kinds through the host's own samplers: what has to hold for each.

An echo answers cell by cell, so that windows have to add up to what one window gives; small networks of the host's classes
answer otherwise.
"""
from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import comfy.hooks
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_hooks import ConditioningSetDefaultAndCombine
from comfy_extras.nodes_video_model import ConditioningSetAreaPercentageVideo
from fuzzing import Unproven, hold, pick
from nodes import ConditioningSetArea, ConditioningSetAreaPercentage, ConditioningSetAreaStrength, ConditioningSetMask, ConditioningSetTimestepRange, ControlNetApplyAdvanced
from tiny_controls import echo_control, echoed, picture, sd15_controlnet
from tiny_models import FAMILIES, Call, drawer, load, with_prediction

from qtd_pack.blending import METHODS, SHIFTS
from qtd_pack.denoise_schedule import SCHEDULES
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion
from qtd_pack.windows import WINDOW_SHAPES, WRAPS

ECHOES = ("sd15", "sdxl", "sd3", "flux_schnell", "flux2", "qwen_image", "lumina2", "wan21_t2v", "ltxv")
SIGMAS = ("falling", "ends above 0", "repeated", "rising", "0 in front", "begins late", "restarts", "single")
CONDS = ("area", "percent", "mask", "bounds", "mask in area", "early", "late", "hook", "weak", "control", "default")

# With a 0 in front the host's tree of noise for these never comes to an end, with or without the patch.
BROWNIAN = tuple(f"{name}{device}" for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde") for device in ("", "_gpu"))

# Its steps are as long as the whole latent's error allows, so that the last bit of one cell moves all others.
ADAPTIVE = "dpm_adaptive"


@dataclass(frozen=True)
class RunCase:
    """rows, cols: of the latent, in cells. leaf, windows, overlap: px. levels: the strengths that leaves have. conds: entries beside the plain one."""

    seed: int = 0
    family: str = "sd15"
    network: bool = False
    rows: int = 8
    cols: int = 8
    batch: int = 1
    leaf: int = 32
    levels: tuple = (1.0,)
    min_window: int = 64
    max_window: int = 64
    overlap: int = 0
    shapes: str = "square"
    wrap: str = "none"
    method: str = "MultiDiffusion"
    shift: str = "random"
    batch_size: int = 0
    hold_tones: float = 0.0
    skip: float = 0.0
    schedule: str = "img2img"
    sampler: str = "euler"
    sigmas: str = "falling"
    steps: int = 1
    cfg: float = 1.0
    conds: tuple = ()
    noise_mask: str = ""
    empty: bool = False
    stage: bool = False
    hold_layout: float = 0.0

    @property
    def ends_clean(self) -> bool:
        """Whether the last sigma is 0, after a step at least."""
        return self.sigmas not in ("ends above 0", "rising", "single")


def draw_run_case(seed: int) -> RunCase:
    draw = random.Random(seed)
    network = draw.random() < 0.15
    family = pick(draw, *FAMILIES) if network else pick(draw, *ECHOES)
    most = 16 if network or family in ("ltxv", "flux2") else 40
    max_window = 64 * pick(draw, 1, 1, 2, 2, 3, 4)
    conds = tuple(draw.sample(CONDS, pick(draw, 0, 0, 1, 2, 3))) if not network or family == "sd15" else ()
    levels = tuple(pick(draw, 0.0, 1.0, 0.5, draw.random()) for _ in range(draw.randint(1, 4)))
    sigmas = pick(draw, "falling", *SIGMAS)
    sampler = pick(draw, *(name for name in comfy.samplers.KSampler.SAMPLERS if sigmas not in ("rising", "0 in front") or name not in BROWNIAN))
    return RunCase(
        seed, family, network, draw.randint(4, most), draw.randint(4, most), pick(draw, 1, 1, 2, 3), pick(draw, 8, 16, 32, 64, 96), levels,
        pick(draw, 64, max_window), max_window, 8 * draw.randint(0, 8), pick(draw, *WINDOW_SHAPES), pick(draw, "none", *WRAPS), pick(draw, *METHODS),
        pick(draw, *SHIFTS), draw.randint(0, 4), pick(draw, 0.0, 0.0, draw.random()), pick(draw, 0.0, 0.0, draw.random()), pick(draw, *SCHEDULES),
        sampler, sigmas, draw.randint(1, 6), pick(draw, 1.0, 3.0), conds,
        pick(draw, "", "", "blobs", "soft"), draw.random() < 0.06, draw.random() < 0.1,
        pick(draw, 0.0, 0.0, 0.0, draw.random()))


@dataclass(frozen=True, eq=False)
class Scene:
    """What a case is made of. kept: (rows, cols), where every run has to give the original back."""

    case: RunCase
    model: object
    latent: torch.Tensor
    given: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    tree: object
    kept: torch.Tensor

    @property
    def size_px(self) -> tuple[int, int]:
        return self.case.rows * self.model.cell_px, self.case.cols * self.model.cell_px


def scene_of(case: RunCase) -> Scene:
    model = load(case.family)
    height, width = case.rows * model.cell_px, case.cols * model.cell_px
    latent = model.latent(height, width, case.batch, case.seed)
    latent = torch.zeros_like(latent) if case.empty else latent
    noise = drawer(case.seed + 1)(*latent.shape)
    strengths = _blocks(case, height, width)
    mask = strengths.repeat_interleave(case.leaf, 0).repeat_interleave(case.leaf, 1)[:height, :width]
    centres = [((torch.arange(length) + 0.5) * model.cell_px / case.leaf).long() for length in (case.rows, case.cols)]
    kept = strengths[centres[0]][:, centres[1]]
    kept = (kept < 0.5 / 255) | (kept < case.skip - 0.01)
    given = latent + 0.3 * noise if case.stage else latent
    noise = torch.zeros_like(noise) if case.stage else noise
    tree = quadtree_from_mask(mask, min_leaf=case.leaf, max_leaf=case.leaf * 4)
    return Scene(case, model, latent, given, noise, _sigmas(case, model), tree, kept)


def _blocks(case: RunCase, height: int, width: int) -> torch.Tensor:
    """The strength of each leaf of the smallest size."""
    grid = torch.randint(len(case.levels), (-(-height // case.leaf), -(-width // case.leaf)), generator=torch.Generator().manual_seed(case.seed))
    return torch.tensor(case.levels)[grid]


def _sigmas(case: RunCase, model) -> torch.Tensor:
    sampling = model.patcher.get_model_object("model_sampling")
    falling = comfy.samplers.calculate_sigmas(sampling, "simple", case.steps + 1)
    # The host's Brownian samplers never end if a flow's first sigma, 1, is repeated.
    middle = max(len(falling) // 2, 2)
    return {
        "falling": lambda: falling, "ends above 0": lambda: falling[:-1], "repeated": lambda: torch.cat([falling[:middle], falling[middle - 1:]]),
        "rising": lambda: falling.flip(0), "0 in front": lambda: torch.cat([torch.zeros(1), falling]), "begins late": lambda: falling[1:],
        "restarts": lambda: torch.cat([falling[:-1], falling[middle - 1:]]), "single": lambda: falling[:1]}[case.sigmas]()


def conds_of(scene: Scene) -> tuple[list, list]:
    """Positive and negative, fresh for each run: the host writes into what it is given."""
    positive, negative = scene.model.positive(*scene.size_px), scene.model.negative(*scene.size_px)
    for number, name in enumerate(scene.case.conds):
        positive, negative = _with_entry(scene, name, positive, negative, scene.model.conds(*scene.size_px, seed=10 + number))
    return positive, negative


def _with_entry(scene: Scene, name: str, positive: list, negative: list, other: list) -> tuple[list, list]:
    """The conditionings with one entry more, placed by the case's seed."""
    draw = random.Random(f"{scene.case.seed} {name}")
    height, width = scene.size_px
    top, left = (8 * draw.randint(0, side // 8 - 1) for side in (height, width))
    area = (8 * draw.randint(1, width // 8), 8 * draw.randint(1, height // 8), left, top)
    mask = (picture(height, width, seed=scene.case.seed)[..., 0] > draw.random()).float()
    early = (0.0, draw.random()) if name == "early" else (draw.random(), 1.0)
    if name == "control":
        if "sd" not in scene.case.family or scene.case.family == "sd3":
            return positive, negative
        control = sd15_controlnet() if scene.case.network else echo_control()
        return ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, picture(height, width), draw.uniform(0.2, 1.5), *sorted((draw.random(), 1.0)))
    is_video = scene.latent.ndim == 5
    if name == "percent" and is_video:
        sides = [draw.uniform(0.2, 1) for _ in range(3)] + [draw.uniform(0, 0.8) for _ in range(3)]
        return positive + ConditioningSetAreaPercentageVideo().append(other, *sides, 1.0)[0], negative
    if name == "bounds" and is_video:
        return positive, negative  # the host finds none in frames
    if name == "default":
        return ConditioningSetDefaultAndCombine().set_default_and_combine(positive, other)[0], negative
    found = {
        "area": lambda: ConditioningSetArea().append(other, *area, draw.uniform(0.2, 2))[0],
        "percent": lambda: ConditioningSetAreaPercentage().append(other, draw.uniform(0.2, 1), draw.uniform(0.2, 1), draw.uniform(0, 0.8), draw.uniform(0, 0.8), 1.0)[0],
        "mask": lambda: ConditioningSetMask().append(other, mask, "default", draw.uniform(0.1, 2))[0],
        "bounds": lambda: ConditioningSetMask().append(other, mask, "mask bounds", 1.0)[0],
        "mask in area": lambda: ConditioningSetArea().append(ConditioningSetMask().append(other, mask, "default", 1.0)[0], *area, 1.0)[0],
        "early": lambda: ConditioningSetTimestepRange().set_range(other, *early)[0],
        "late": lambda: ConditioningSetTimestepRange().set_range(other, *early)[0],
        "hook": lambda: comfy.hooks.set_hooks_for_conditioning(other, comfy.hooks.create_hook_lora({}, 1.0, 1.0)),
        "weak": lambda: ConditioningSetAreaStrength().append(other, draw.choice((0.0, 0.3)))[0]}[name]()
    return (positive + found, negative) if draw.random() < 0.7 else (positive, negative + found)


def echo(call: Call) -> torch.Tensor:
    """Cell by cell: of the latent, the prompt and what controls say."""
    said = 0.0 if call.context is None else call.context.mean((1, 2)).view(-1, *[1] * (call.x.ndim - 1))
    return (call.x / (1 + call.sigma.view(-1, *[1] * (call.x.ndim - 1)))).tanh() + 5 * said + 0.3 * echoed(call)


@dataclass
class Seen:
    """cells: of all rows that the model was given. planned: what the windows of each evaluation come to, at least and at most."""

    cells: int = 0
    least: int = 0
    most: int = 0


def run(scene: Scene, settings: dict | None, predict=None) -> tuple[torch.Tensor, Seen]:
    """Sample the scene, through the patch if there are settings. predict: in place of the network."""
    case, seen = scene.case, Seen()
    patcher = scene.model.patcher.clone() if settings is None else _settings(scene, settings).patched(scene.model.patcher)

    def counted(executor, x, *args, **kwargs):
        seen.cells += x.numel() // x.shape[1]
        return executor(x, *args, **kwargs)

    def planned(executor, model, conds, x, sigma, model_options):
        found = executor(model, conds, x, sigma, model_options)
        state = model_options["transformer_options"].get(KEY)
        if state is not None:
            _count(seen, state.plan(state.progress)[0], conds, x, sigma)
            if case.hold_layout:
                # A look at the whole picture has no more cells than a window.
                seen.most += sum(len(entries or ()) for entries in conds) * x.shape[0] * math.prod(x.shape[2:-2]) * state.facts.sizes.sides[-1] ** 2
        return found

    if predict is not None:
        patcher = with_prediction(patcher, predict)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "counted", counted)
    wrappers = patcher.wrappers[WrappersMP.APPLY_MODEL]
    patcher.wrappers[WrappersMP.APPLY_MODEL] = {"counted": wrappers.pop("counted")} | wrappers
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "planned", planned)
    torch.manual_seed(case.seed)
    positive, negative = conds_of(scene)
    out = comfy.sample.sample_custom(
        patcher, scene.noise.clone(), case.cfg, comfy.samplers.sampler_object(case.sampler), scene.sigmas.clone(), positive, negative, scene.given,
        noise_mask=_noise_mask(scene), disable_pbar=True, seed=case.seed)
    return out, seen


def _settings(scene: Scene, changed: dict) -> TiledDiffusion:
    case = scene.case
    wired = scene.latent if case.stage else None
    return TiledDiffusion(**{
        "tree": scene.tree, "method": case.method, "schedule": case.schedule, "tile_overlap": case.overlap, "tile_batch_size": case.batch_size,
        "skip_diffusion_below": case.skip, "min_window": case.min_window, "max_window": case.max_window, "shift_method": case.shift, "seed": case.seed,
        "original": wired, "wrap": case.wrap, "hold_tones": case.hold_tones, "hold_layout": case.hold_layout, "window_shapes": case.shapes, **changed})


def _noise_mask(scene: Scene) -> torch.Tensor | None:
    if not scene.case.noise_mask:
        return None
    soft = picture(*scene.size_px, seed=scene.case.seed + 3)[..., 0]
    return (soft > 0.5).float() if scene.case.noise_mask == "blobs" else soft


def _count(seen: Seen, plan, conds, x: torch.Tensor, sigma: torch.Tensor) -> None:
    """Add what the windows of one evaluation come to: an entry where its area is, and when; one with a mask may be left out."""
    for entry in (entry for entries in conds for entry in entries or ()):
        if entry.get("timestep_start", math.inf) < sigma[0] or entry.get("timestep_end", -math.inf) > sigma[0] or "default" in entry:
            continue
        cells = sum(_shared(window.rect, entry.get("area"), x.shape[2:]) for window in plan.windows) * x.shape[0]
        seen.most += cells
        seen.least += 0 if "mask" in entry or entry.get("strength", 1.0) == 0 else cells


def _shared(rect, area, size) -> int:
    """Cells, of all frames, that a window and an area have in common, over the border, too."""
    frames = math.prod(size[:-2])
    if area is None:
        return rect.height * rect.width * frames
    dims = len(area) // 2
    spans = [(area[dims + place], area[dims + place] + area[place]) for place in range(dims)]
    if dims == len(size) > 2:
        frames = min(spans[0][1], size[0]) - spans[0][0]
    lengths = []
    for first, last, start, end, length in ((rect.top, rect.bottom, *spans[-2], size[-2]), (rect.left, rect.right, *spans[-1], size[-1])):
        lengths.append(sum(start <= place % length < end for place in range(first, last)))
    return lengths[0] * lengths[1] * frames


def check_run_case(case: RunCase) -> None:
    """Raise for whatever does not hold. What the host cannot sample without the patch proves nothing."""
    scene, predict = scene_of(case), None if case.network else echo
    untouched = scene.given.clone()
    try:
        plain, _ = run(scene, None, predict)
    except Exception as problem:
        raise Unproven(str(problem)) from problem
    out, seen = run(scene, {}, predict)
    hold(torch.equal(scene.given, untouched), "the latent that came in is not changed")
    hold(out.shape == plain.shape, "the samples have the latent's shape")
    if plain.isfinite().all():
        hold(out.isfinite().all(), "samples are finite where they are without the patch")
        check_kept(scene, out, seen)
        check_one_window(scene, out, plain, predict)
    check_counts(case, seen)


def check_kept(scene: Scene, out: torch.Tensor, seen: Seen) -> None:
    case, kept = scene.case, scene.kept
    if case.empty or case.sigmas == "single" or not kept.any():
        return
    if case.ends_clean:
        hold(torch.equal(out[..., kept], scene.latent[..., kept]), "kept cells are the original's, bit for bit")
        hold(not kept.all() or seen.cells == 0, "the model is not run where everything is kept")
    elif case.sampler != ADAPTIVE:
        original = scene.model.patcher.model.process_latent_in(scene.latent)
        noisy, _ = run(replace_conds(scene), None, lambda call: original.repeat(call.x.shape[0] // original.shape[0], *[1] * (original.ndim - 1)))
        if noisy.isfinite().all():
            off = (out - noisy)[..., kept].abs().max() / noisy.std()
            hold(off < 1e-3, f"kept cells hold the original and the noise that is left: {off:.2g} off")


def replace_conds(scene: Scene) -> Scene:
    return replace(scene, case=replace(scene.case, conds=(), cfg=1.0))


def check_one_window(scene: Scene, out: torch.Tensor, plain: torch.Tensor, predict) -> None:
    """Windows add up to one window, and one window at strength 1 is what the host does without the patch."""
    # On a ring an overlap makes two windows of it: one alone is the host's, to which the picture ends at its border.
    case, largest = scene.case, dict(min_window=1 << 14, max_window=1 << 14, tile_overlap=64, hold_tones=0.0, method="MultiDiffusion")
    if predict is not None and case.sampler != ADAPTIVE and not case.hold_tones and not case.hold_layout:
        whole, _ = run(scene, largest, predict)
        off = (out - whole).abs().max() / whole.std().clamp(min=1e-3)
        hold(off < 1e-3, f"windows add up to one window: {off:.2g} off")
    if case.levels == (1.0,) and case.wrap == "none" and not case.empty and not case.stage:
        whole, _ = run(scene, largest, predict)
        hold(torch.equal(whole, plain), "one window at strength 1 is plain sampling, bit for bit")


def check_counts(case: RunCase, seen: Seen) -> None:
    if "default" not in case.conds:
        hold(seen.least <= seen.cells <= seen.most, f"the model sees the cells that are planned: {seen}")

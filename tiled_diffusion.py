"""The patch: samples the latent window by window, so that each part changes exactly as much as it was told.

Works in cells of the latent, and with `denoised`, the estimate of the clean latent that the host's models return in
every family. With s the share of a cell at a sigma and `original` the latent that came in,

    denoised = (1 - s) * original + s * model_denoised

is the blend of two velocities, (x - original) / sigma, which preserves, and (x - model_denoised) / sigma, since denoised
is affine in the velocity, in eps and in v.
"""
from __future__ import annotations

import contextlib
import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

import comfy.model_management
import comfy.patcher_extension
import comfy.utils

from .canvas import Canvas, cut_latent
from .conditioning import REFERENCES, cut_conds, kind_of_window
from .control import check_controls
from .denoise_schedule import EASE_CELLS, SCHEDULES, Clock, eased, falling_part, on_steps, share_at, txt2img_share_at
from .foreign import Watch
from .patches import apply_model, windows_are_alone, with_windows
from .quadtree import Quadtree, find_placement, strength_raster, way_to_the_tree
from .windows import (
    METHODS, SHIFTS, WRAPS, Blend, TilePlan, WindowCost, WindowSizes, full_grid, group_windows, pieces, plan_blend, plan_windows, shift_offsets, slices,
    window_sizes)

KEY = "quadtree_tiled_diffusion"

# More windows at once fill no accelerator better, and a cancelled run would wait for all of them.
LARGEST_BATCH = 16

# The most by which samples differ from the original, in the model's scale, where no noise is left in them.
NO_NOISE = 1e-4

# Encoded pictures have a standard deviation of about 1 in the model's scale; above this a latent is mostly noise.
NOISY = 2.0

# The host's samplers that take steps of their own.
OWN_STEPS = ("dpm_fast", "dpm_adaptive")

# Between two lines on the node, in seconds.
TELL_EVERY = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TiledDiffusion:
    """What the user chose. Sizes are pixels of the picture that is sampled; tile_batch_size 0 is as memory allows.

    original, sigmas: the clean latent, as the host's nodes pass it, and the whole schedule, for a stage of several.
    tell: is given lines for the user, how far a step is and in the end what the run did, each with its numbers by name.
    wrap: along which axes the picture goes on over its border, one of WRAPS.
    """

    tree: Quadtree
    method: str = "Mixture of Diffusers"
    schedule: str = "img2img"
    tile_overlap: int = 64
    tile_batch_size: int = 0
    skip_diffusion_below: float = 0.0
    min_window: int = 512
    max_window: int = 1024
    shift_method: str = "random"
    seed: int = 0
    original: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None
    tell: Callable[..., None] | None = None
    wrap: str = "none"

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("schedule", SCHEDULES), ("shift_method", SHIFTS), ("wrap", WRAPS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}.")
        check_windows(self.min_window, self.max_window)
        if self.tile_overlap < 0 or self.tile_batch_size < 0:
            raise ValueError(f"tile_overlap and tile_batch_size: expected 0 or more, got {self.tile_overlap} and {self.tile_batch_size}.")
        if not 0 <= self.skip_diffusion_below <= 1:
            raise ValueError(f"skip_diffusion_below: expected a strength from 0 to 1, got {self.skip_diffusion_below}.")

    def patched(self, model):
        """A clone of the model that samples by this tree, in place of any other tree on it."""
        types = comfy.patcher_extension.WrappersMP
        model = model.clone()
        for kind, wrapper in (
            (types.OUTER_SAMPLE, self._outer_sample), (types.PREPARE_SAMPLING, self._prepare_sampling), (types.SAMPLER_SAMPLE, _sampler_sample),
            (types.CALC_COND_BATCH, _calc_cond_batch), (types.PREDICT_NOISE, _predict_noise), (types.APPLY_MODEL, apply_model),
        ):
            model.remove_wrappers_with_key(kind, KEY)
            model.add_wrapper_with_key(kind, KEY, wrapper)
        # Around all others, so that what they give back is restored, too.
        outer = model.wrappers[types.OUTER_SAMPLE]
        model.wrappers[types.OUTER_SAMPLE] = {KEY: outer.pop(KEY)} | outer
        return model

    def sizes(self, model) -> WindowSizes:
        """The windows' sizes in cells of this model's latents."""
        cell_px = model.latent_format.spacial_downscale_ratio
        overlap = 0 if self.method == "SpotDiffusion" else self.tile_overlap
        return window_sizes(self.min_window // cell_px, self.max_window // cell_px, math.ceil(overlap / cell_px), patch_cells(model), WRAPS[self.wrap])

    def _outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Give the run its state; afterwards put back what was to be kept.

        Here and not where the sampler ends: the latent's way into the model's scale and back costs the last bit.
        """
        with self._named_errors():
            return self._sampled(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _sampled(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        _check_latent(latent_image, kwargs.get("latent_shapes"))
        model = executor.class_obj.model_patcher.model
        _check_canvas(self.tree, latent_image, model.latent_format.spacial_downscale_ratio)
        run = Run(self, noise, latent_image, sigmas)
        # In this run the guider's options are a copy, made by CFGGuider.sample.
        options = executor.class_obj.model_options["transformer_options"]
        options[KEY] = run
        _put_in_place(options["wrappers"])
        samples = run.restored(executor(noise, latent_image, sampler, sigmas, *args, **kwargs), model)
        samples.flatten()[:1].tolist()  # waits for the device, so that the run's time is whole
        run.report()
        return samples

    @contextlib.contextmanager
    def _named_errors(self):
        """Let errors of this pack say whose they are: the host shows them on the sampler's node, so this node says them, too."""
        try:
            yield
        except ValueError as problem:
            *_, (frame, _) = traceback.walk_tb(problem.__traceback__)
            if frame.f_globals.get("__package__") != __package__:
                raise
            if self.tell is not None:
                self.tell(str(problem), failed=True)
            raise ValueError(f"Quadtree Tiled Diffusion, {problem}") from problem

    def _prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """Report the shape of one window batch, so that memory is set aside for it and not for the canvas."""
        sizes = self.sizes(model.model)
        height, width = sizes.shape(sizes.sides[-1], *noise_shape[-2:])
        shape = [noise_shape[0] * max(self.tile_batch_size, 1), *noise_shape[1:-2], height, width]
        return executor(model, min(shape, list(noise_shape), key=math.prod), conds, *args, **kwargs)


class Run:
    """The state of one sampling run; it lives in that run's transformer_options and nowhere else."""

    def __init__(self, settings: TiledDiffusion, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor):
        self.settings = settings
        self.latent = latent
        self.with_noise = bool(torch.count_nonzero(noise))
        # As they are now: some samplers (uni_pc) overwrite their last sigma.
        self.sigmas = tuple(sigmas.tolist())
        self.clock: Clock | None = None
        self.original: torch.Tensor | None = None
        self.is_restored = False
        self.plans: dict = {}
        self.prepared: dict = {}
        self.copies: dict = {}
        self.copied_rows = 0
        self.fitting: dict = {}
        self.batch_limit = settings.tile_batch_size or LARGEST_BATCH
        self.whole_x: torch.Tensor | None = None
        self.warned: set = set()
        self.calls = self.windows = self.grid_windows = 0
        self.cost = self.grid_cost = 0.0
        self.told = self.began = time.monotonic()

    def begin(self, model, sampler, conds, sigmas, noise, latent) -> None:
        """Learn what this run is about: the original, the strengths, the schedule and the windows' sizes.

        A chain of samplers begins several times, each time with a part of the sigmas.
        """
        self.began = time.monotonic()  # the model is loaded
        settings = self.settings
        self.shape = tuple(latent.shape)
        self.clock = self._start_clock(sampler, tuple(sigmas.tolist()))
        steps = len(self.schedule) - 1
        self.leaf_strengths = strengths_in_cells(settings.tree, *latent.shape[-2:], settings.skip_diffusion_below, cell_px=model.latent_format.spacial_downscale_ratio)
        self.original = self._find_original(model, noise, latent)
        if self.original is not None:
            self.leaf_strengths = on_steps(settings.schedule, self.leaf_strengths, steps)
        # At most half the smallest leaf, so that every leaf reaches its strength.
        ease = min(EASE_CELLS, settings.tree.min_leaf * latent.shape[-1] // settings.tree.width // 2)
        self.strengths = eased(self.leaf_strengths, ease, WRAPS[settings.wrap]).to(latent.device)
        self.levels = self.leaf_strengths.unique()
        self.sizes = settings.sizes(model)
        self.cost_of = window_cost(model, conds, latent.shape)
        self.grid = full_grid(*latent.shape[-2:], self.sizes, self.cost_of)
        self.plans = {}
        self.offsets = shift_offsets(settings.shift_method, steps, self.sizes.sides[-1], patch_cells(model), settings.seed) if settings.method == "SpotDiffusion" else [None] * steps

    def _start_clock(self, sampler, sigmas: tuple[float, ...]) -> Clock:
        """The whole schedule is the one that is wired, or else the node's, if the sampler was given a part of it."""
        whole = self.sigmas if self.settings.sigmas is None else tuple(self.settings.sigmas.tolist())
        if self.settings.sigmas is None and not all(any(math.isclose(sigma, other, rel_tol=1e-4) for other in whole) for sigma in sigmas):
            whole = sigmas
        self.schedule = falling_part(whole)
        return Clock(sigmas, self.schedule, counts=not _has_own_steps(sampler))

    def _find_original(self, model, noise, latent):
        """The clean latent in the model's scale, or None where there is none to preserve."""
        wired = self.settings.original
        if wired is not None:
            wired = _fit_original(wired, latent)
            return model.process_latent_in(wired) if bool(torch.count_nonzero(wired)) else None
        if not bool(torch.count_nonzero(self.latent)):
            log.info("the latent is empty, so there is nothing to preserve: every part is sampled, flat ones more gently")
            return None
        original = model.process_latent_in(self.latent.to(latent))
        if not self.with_noise and not bool(torch.count_nonzero(noise)):
            log.warning("this stage starts without noise, so it cannot know the original: nothing is preserved. Connect the encoded picture to `original`.")
            self.leaf_strengths.fill_(1)
        elif float(original.std()) > NOISY:
            log.warning(
                "the latent that came in looks half-sampled, not like an encoded picture (its standard deviation is %.1f, where 1 is usual): "
                "what is kept is kept with its noise. Connect the encoded picture to `original`.", float(original.std()))
        return original

    @property
    def progress(self) -> float:
        """That of the sampler's last call of the model."""
        return self.clock.progress

    def share(self, progress: float, strengths: torch.Tensor) -> torch.Tensor:
        if self.original is None:
            return txt2img_share_at(strengths, progress, len(self.schedule) - 1)
        return share_at(self.settings.schedule, strengths, progress)

    def least_share(self, progress: float) -> float:
        """The least share of any cell; asks the CPU, and no device."""
        return float(self.share(progress, self.levels).min())

    def plan(self, progress: float) -> tuple[TilePlan, Blend]:
        """The windows and their weights at a progress: made once for each set of active leaves and each shift."""
        active = int((self.share(progress, self.levels) > 0).sum())
        offset = self.offsets[min(int(progress * len(self.offsets) + 1e-5), len(self.offsets) - 1)]
        if (active, offset) not in self.plans:
            cells = self.share(progress, self.leaf_strengths) > 0
            plan = plan_windows(cells, self.sizes, self.cost_of, offset)
            self.plans[active, offset] = plan, plan_blend(self.settings.method, plan, self.sizes.overlap, self.strengths.device)
        return self.plans[active, offset]

    @property
    def is_one_window(self) -> bool:
        """True if no step of the schedule has more than the canvas for a window."""
        steps = len(self.schedule) - 1
        plans = (self.plan(step / steps)[0] for step in range(steps))
        return all(plan.is_whole or not plan.windows for plan in plans)

    def count(self, plan: TilePlan) -> None:
        self.calls += 1
        self.windows += len(plan.windows)
        self.grid_windows += len(self.grid.windows)
        self.cost += plan.cost
        self.grid_cost += self.grid.cost

    def canvas(self, model, x, plan: TilePlan) -> Canvas:
        """What windows are cut from. Copies made for other rows, or for windows that are no longer in the plan, are dropped."""
        wanted = {window.rect for window in plan.windows} if x.shape[0] == self.copied_rows else set()
        self.copies = {key: value for key, value in self.copies.items() if wanted.issuperset(key[1])}
        self.copied_rows = x.shape[0]
        return Canvas(model, tuple(x.shape), x.device, patch_cells(model), self.prepared, self.copies, self.sizes.wraps)

    def sees_one_window(self) -> bool:
        """Whether the model is given the same window at every step, and no other."""
        steps = len(self.schedule) - 1
        views = {tuple(window.rect for window in self.plan(step / steps)[0].windows) for step in range(steps)}
        return len(views) == 1 and len(views.pop()) == 1

    def original_of(self, x: torch.Tensor, model_options) -> torch.Tensor | None:
        """The original's rows and frames for an x that a node asks about; None if x is not, or not known to be, of this canvas."""
        if x.ndim != len(self.shape) or tuple(x.shape[-2:]) != self.shape[-2:]:
            return None
        in_context_window = model_options["transformer_options"].get("context_window") is not None
        if not in_context_window and tuple(x.shape[1:]) != self.shape[1:]:
            return None
        if self.original is None:
            return x
        if in_context_window or x.shape[0] % self.shape[0] == 0:
            return _like(_frames(self.original, x, model_options), x)
        whole = () if self.whole_x is None else self.whole_x
        rows = [next((kept for kept, row in zip(self.original, whole) if torch.equal(part, row)), None) for part in x]
        return None if any(row is None for row in rows) else torch.stack(rows).to(x)

    def unsampled(self, strengths: torch.Tensor) -> torch.Tensor:
        """Where nothing but the original was used up to now."""
        return self.share(self.progress, strengths) == 0

    def restored(self, samples: torch.Tensor, model) -> torch.Tensor:
        """The samples with the original, bit for bit, in the cells that were never sampled, unless noise belongs there.

        model: the host's, for its scale. What a sampler leaves when it is stopped has to keep its noise, whatever its last sigma.
        """
        if self.original is None:
            return samples
        if samples.shape != self.latent.shape:
            log.warning("a node after Quadtree Tiled Diffusion gave the samples another size, %s: what was to be kept is not put back.", tuple(samples.shape))
            return samples
        original = self.latent.to(samples) if self.settings.original is None else _fit_original(self.settings.original, samples)
        kept = self.unsampled(self.strengths).to(samples.device)
        noise = (model.process_latent_in(samples) - model.process_latent_in(original))[..., kept]
        left = float(noise.square().mean().sqrt()) if noise.numel() else 0.0
        if left > NO_NOISE and (self.sigmas[-1] > 0 or not self._is_finished(left)):
            if self.sigmas[-1] == 0:
                log.warning(
                    "the sampler ended before its last step, so what was to be kept still holds noise and is left so. "
                    "To go on from here, connect the encoded picture to `original` and the whole schedule to `sigmas`.")
            return samples
        self.is_restored = True
        return torch.where(kept, original, samples)

    def _is_finished(self, left: float) -> bool:
        """Whether the sampler came to its end. left: how much noise there is in what was kept."""
        # One with steps of its own, of which nothing is known: no more than the noise of the last step.
        return self.clock.at_end or (not self.clock.counts and left <= 2 * self.clock.sigmas[-2])

    def report(self) -> None:
        """The run's one line, in the log and on the node."""
        if not self.calls:
            return
        # By leaves: at the border of one, strengths ease, and the least of them may have no step.
        kept = float(self.unsampled(self.leaf_strengths).double().mean()) if self.original is not None else 0.0
        line = (
            f"{self.windows} windows over {len(self.schedule) - 1} steps, {self.cost / self.grid_cost:.2f} of the cost of the full grid's {self.grid_windows}; "
            f"{100 * kept:.0f} % of the picture {'kept exactly' if self.is_restored or not kept else 'not sampled'}")
        log.info(line)
        if self.settings.tell is not None:
            self.settings.tell(
                line, windows=self.windows, grid_windows=self.grid_windows, steps=len(self.schedule) - 1, cost=self.cost / self.grid_cost, kept=kept,
                seconds=time.monotonic() - self.began)
        self._warn_if_little_changed()

    def _warn_if_little_changed(self) -> None:
        """Say so where more than half of what was to change was never sampled."""
        wanted = self.leaf_strengths > 0
        missed = wanted & self.unsampled(self.leaf_strengths)
        # Stages that follow sample what this one does not come to.
        if self.original is None or 2 * int(missed.sum()) <= int(wanted.sum()) or (self.settings.sigmas is not None and self.sigmas[-1] > 0):
            return
        steps = len(self.schedule) - 1
        share = 100 * int(missed.sum()) / int(wanted.sum())
        if self.clock.at_end or not self.clock.counts:
            reason = f"{steps} step{'s are' if steps > 1 else ' is'} too few for strengths below {1 / steps:.2f}. Use more steps, raise the strengths, or choose the schedule ramp."
        else:
            reason = "the sampler ended before their first step. Let it run to its last sigma."
        log.warning("%.0f %% of what was to change did not change at all: %s", share, reason)

    def tell_windows(self, progress: float, done: int, amount: int) -> None:
        """Tell how far a step is, now and then; a step that takes no time is not worth a line."""
        if self.settings.tell is None or time.monotonic() < self.told + TELL_EVERY:
            return
        self.told = time.monotonic()
        steps = len(self.schedule) - 1
        step = min(int(progress * steps + 1e-5) + 1, steps)
        self.settings.tell(f"step {step} of {steps}: {done} of {amount} windows", step=step, steps=steps, done=done, amount=amount)


def check_windows(min_window: int, max_window: int) -> None:
    """Raise ValueError unless the sides of windows, in pixels, are in order."""
    if not 0 < min_window <= max_window:
        raise ValueError(
            f"min_window: expected at least 1 px and at most max_window ({max_window}), got {min_window}. Make min_window smaller or max_window larger.")


def _put_in_place(wrappers: dict) -> None:
    """Make the order of nodes irrelevant: others see the whole latent before it is cut, none comes after the blend or before the sampler."""
    types = comfy.patcher_extension.WrappersMP
    for kind in (types.CALC_COND_BATCH, types.SAMPLER_SAMPLE):
        wrappers[kind][KEY] = wrappers[kind].pop(KEY)
    for kind in (types.PREDICT_NOISE, types.APPLY_MODEL):
        others = wrappers[kind]
        wrappers[kind] = {KEY: others.pop(KEY)} | others


def _sampler_sample(executor, guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs):
    """Begin the run, now that the model is loaded and the latent is in its scale, and listen to the sampler's steps."""
    run = _run_of(extra_args["model_options"])
    if run is None:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
    run.begin(guider.inner_model, executor.class_obj, guider.conds.values(), sigmas, noise, latent_image)
    run.watch = Watch(guider.model_patcher, guider.inner_model, run.shape[-2:], lambda: not run.sees_one_window(), run.warned)
    run.watch.look(extra_args["model_options"], guider.conds.values())
    _check_guidance(extra_args["model_options"], run)
    _check_controls(guider.conds.values(), run)

    def told(step, denoised, x, total, *further):
        run.clock.callback(int(step), int(total), (x, denoised))
        if callback is not None:
            callback(step, denoised, x, total, *further)

    return executor(guider, sigmas, extra_args, told, noise, latent_image, *args, **kwargs)


def _predict_noise(executor, x, sigma, model_options={}, *args, **kwargs):
    """Blend the original in, once, after guidance and all that other nodes do to it."""
    run = _run_of(model_options)
    if run is None:
        return executor(x, sigma, model_options, *args, **kwargs)
    _check_size(x, run)
    progress = run.clock.call(float(sigma.flatten()[0]), x)
    run.whole_x = x
    denoised = executor(x, sigma, model_options, *args, **kwargs)
    run.whole_x = None
    if run.least_share(progress) == 1:
        return denoised
    share = run.share(progress, run.strengths).to(denoised)
    return torch.lerp(x if run.original is None else _like(run.original, denoised), denoised, share)


def _calc_cond_batch(executor, model, conds, x, sigma, model_options):
    """Let the host evaluate each batch of windows, and add them up."""
    run = _run_of(model_options)
    original = None if run is None else run.original_of(x, model_options)
    if original is None:
        return executor(model, conds, x, sigma, model_options)
    progress = run.progress
    plan, blend = run.plan(progress)
    run.count(plan)
    run.watch.look(model_options, conds)
    model_options = run.watch.options(model_options)
    if plan.is_whole:
        results = run.watch.evaluate(executor, model, conds, x, sigma, model_options)
    else:
        results = _evaluate_windows(executor, model, conds, x, sigma, model_options, plan, blend, progress)
    if run.original is None or run.least_share(progress) > 0:
        return results
    # Guidance of other nodes reads these results, too: a kept cell is the original in each of them.
    kept = run.share(progress, run.strengths) == 0
    results = list(results)
    for index, cond in enumerate(conds):  # one after another, so that the former ones can go
        if cond is not None:
            results[index] = torch.where(kept, original, results[index])
    return results


def _evaluate_windows(executor, model, conds, x, sigma, model_options, plan, blend, progress) -> list[torch.Tensor]:
    """The weighted sum of the model's results over the windows, one per conditioning."""
    run = _run_of(model_options)
    canvas = run.canvas(model, x, plan)
    totals = [None if cond is None else torch.zeros_like(x) for cond in conds]
    alone = windows_are_alone(model_options, canvas)
    pending = deque(group_windows(plan.windows, lambda window: (kind_of_window(conds, window.rect, canvas.size), window.rect if alone else None)))
    while pending:
        comfy.model_management.throw_exception_if_processing_interrupted()
        group = pending.popleft()
        alone = run.watch.goes_alone(len(plan.windows), run.settings.tile_batch_size)
        limit = 1 if alone else min(run.batch_limit, _fitting(model, conds, x, group, canvas, run.fitting))
        if len(group) > limit:
            pending.appendleft(group[limit:])
            group = group[:limit]
        rects = [window.rect for window in group]
        try:
            results = run.watch.evaluate(
                executor, model, cut_conds(conds, rects, canvas), cut_latent(x, rects), sigma.repeat(len(group)),
                with_windows(model_options, rects, canvas), len(group))
        except comfy.model_management.OOM_EXCEPTION:
            if len(group) == 1:
                raise
            _halve_batches(run, len(group))
            pending.appendleft(group)
            continue
        if results is None:
            pending.appendleft(group)
            continue
        _add_up(totals, results, group, blend)
        del results  # or they would live beside the next batch's
        run.tell_windows(progress, len(plan.windows) - sum(map(len, pending)), len(plan.windows))
    return [torch.zeros_like(x) if total is None else total for total in totals]


def _add_up(totals, results, group, blend: Blend) -> None:
    """Add a batch's results, each by its window's weight, to the totals, in place."""
    parts = [None if total is None else result.chunk(len(group)) for total, result in zip(totals, results)]
    for index, window in enumerate(group):
        weight = blend.weight_of(window, results[0])
        for total, part in zip(totals, parts):
            for here, there in pieces(window.rect, *total.shape[-2:]) if total is not None else ():
                total[slices(here)].addcmul_(part[index][slices(there)], weight[slices(there)])


def _halve_batches(run: Run, size: int) -> None:
    """From here on run half as many windows at once."""
    run.batch_limit = size // 2
    run.copies.clear()
    log.info("out of memory with %d windows at once: going on with %d", size, run.batch_limit)
    comfy.model_management.soft_empty_cache()


def _fitting(model, conds, x, group, canvas, known: dict) -> int:
    """How many of these windows the host would run at once, with all conditionings, by its own estimate.

    known: the answers of this run, since asking takes a cut and the device's memory.
    """
    if len(group) == 1:
        return 1
    rects = [group[0].rect]
    key = (tuple(x.shape), rects[0].height, rects[0].width, *(None if entries is None else len(entries) for entries in conds))
    if key not in known:
        known[key] = _windows_that_fit(model, conds, x, rects, canvas)
    return known[key]


def _windows_that_fit(model, conds, x, rects, canvas) -> int:
    entries = [entry for entries in cut_conds(conds, rects, canvas) if entries is not None for entry in entries]
    rows = x.shape[0] * max(len(entries), 1)
    shapes: dict = {}
    for entry in entries:
        for key, cond in entry["model_conds"].items():
            # The host repeats a conditioning to x's rows before it asks.
            shapes.setdefault(key, []).append([x.shape[0], *cond.size()[1:]])
    needed = model.memory_required([rows, *x.shape[1:-2], rects[0].height, rects[0].width], cond_shapes=shapes) * 1.5
    # Without what the host could free by moving weights out: more windows at once are not worth that.
    return max(1, int(comfy.model_management.get_free_memory(x.device) // max(needed, 1)))


def patch_cells(model) -> int:
    """The side of the model's patch, in cells; 8 for a UNet, which halves its input three times."""
    network = model.diffusion_model
    # SD3 keeps it in its embedder, LTX-Video in its patchifier.
    holders = (network, getattr(network, "x_embedder", None), getattr(network, "patchifier", None))
    patch = next((holder.patch_size for holder in holders if getattr(holder, "patch_size", None)), 8)
    return int(patch[-1] if isinstance(patch, (tuple, list)) else patch)


def window_cost(model, conds, shape) -> WindowCost:
    """The cost of a window for this model: what it says of its width, patch and text, else a middling transformer."""
    network = model.diffusion_model
    is_transformer = not hasattr(network, "input_blocks")
    width = next((getattr(network, name) for name in ("hidden_size", "inner_dim", "dim") if isinstance(getattr(network, name, None), int)), 2048)
    frames, patch = math.prod(shape[2:-2]), patch_cells(model)
    beside = [_tokens_beside(entry["model_conds"], shape, patch) for entries in conds for entry in entries]
    cut, whole = (max(tokens, default=0) for tokens in zip(*beside)) if beside else (0, 0)
    return WindowCost(patch, frames + cut, whole, width) if is_transformer else WindowCost(patch, frames, 0, width)


def _tokens_beside(model_conds, shape, patch: int) -> tuple[int, int]:
    """What a transformer sees beside a window: how many more of its size, cut from references, and tokens that pass whole."""
    cut, whole = 0, model_conds["c_crossattn"].cond.shape[1] if "c_crossattn" in model_conds else 0
    for key in REFERENCES & model_conds.keys():
        value = model_conds[key].cond
        for picture in [value] if torch.is_tensor(value) else value:
            frames, (height, width) = math.prod(picture.shape[2:-2]), picture.shape[-2:]
            if (height, width) == tuple(shape[-2:]):
                cut += frames
            else:
                whole += frames * math.ceil(height / patch) * math.ceil(width / patch)
    return cut, whole


def strengths_in_cells(tree: Quadtree, height: int, width: int, skip_below: float = 0.0, cell_px: int = 1) -> torch.Tensor:
    """The strengths of the leaves over a latent of height x width cells; windows are planned for these."""
    strengths = strength_raster(tree, height, width, cell_px)
    # A mask of 8 bits comes no nearer than half a level to what was typed.
    strengths[strengths < skip_below - 0.5 / 255] = 0
    return strengths


def _run_of(model_options) -> Run | None:
    return model_options.get("transformer_options", {}).get(KEY)


def _like(original: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return comfy.utils.repeat_to_batch_size(original.to(x), x.shape[0])


def _frames(original: torch.Tensor, x: torch.Tensor, model_options) -> torch.Tensor:
    """The original's frames in the host's context window, which evaluates a video piece by piece."""
    context = model_options["transformer_options"].get("context_window")
    if context is None:
        return original
    frames = context.get_tensor(original)
    # Guides follow the window's frames; the host drops what becomes of them.
    guides = x.shape[context.dim] - frames.shape[context.dim] if context.dim else 0
    return torch.cat([frames, x.narrow(context.dim, -guides, guides)], context.dim) if guides else frames


def _fit_original(original: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """The wired original with the latent's rows, dimensions and device."""
    if original.ndim == latent.ndim - 1:
        original = original.unsqueeze(2)
    if original.shape[1:] != latent.shape[1:]:
        raise ValueError(
            f"original: expected a latent like the one that is sampled, {tuple(latent.shape[1:])} (channels, [frames,] height, width), got {tuple(original.shape[1:])}. "
            "Encode the same picture with the same VAE.")
    return comfy.utils.repeat_to_batch_size(original.to(latent), latent.shape[0])


def _has_own_steps(sampler) -> bool:
    """Whether the sampler, or one that is wrapped in its options, takes other steps than those of the schedule."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    inside = getattr(sampler, "extra_options", None) or {}
    return any(own in name for own in OWN_STEPS) or any(_has_own_steps(option) for option in inside.values() if hasattr(option, "sampler_function"))


def _check_canvas(tree: Quadtree, latent: torch.Tensor, cell_px: int) -> None:
    """Raise ValueError unless the latent is of the tree's picture, as large or larger; pictures are cropped to whole cells."""
    height, width = (cells * cell_px for cells in latent.shape[-2:])
    if tree.kept_share == 1:
        return  # an empty mask knows no size
    made = f"quadtree: made for a picture of {tree.width} x {tree.height} px, but what is to be sampled is {width} x {height} px"
    tiles = "Nodes that sample a part at a time (tile upscalers, detailers) cannot use this tree: give them the model from before Quadtree Tiled Diffusion."
    missing = tree.height - height, tree.width - width
    if max(missing) > cell_px and min(missing) < -cell_px:
        raise ValueError(f"{made}, which is another shape. {way_to_the_tree(tree)} {tiles}")
    if max(missing) > cell_px:
        raise ValueError(f"{made}, which is smaller: a part of it, or a smaller version. {tiles} To sample a smaller version, scale the picture first and build the quadtree from that.")
    if find_placement((tree.height, tree.width), (height, width), cell_px) is None:
        raise ValueError(
            f"{made}: enlarged {height / tree.height:.2f} times in height and {width / tree.width:.2f} times in width, which is another aspect. "
            f"Enlarge both sides alike. {way_to_the_tree(tree)} {tiles}")


def _check_guidance(model_options, run: Run) -> None:
    """Raise ValueError for Self-Attention Guidance, which takes the attention of the last call for that of the whole picture."""
    size = tuple(run.strengths.shape)
    functions = model_options.get("sampler_post_cfg_function", [])
    if (any(run.sizes.wraps) or run.sizes.shape(run.sizes.sides[0], *size) != size) and any("SelfAttentionGuidance" in getattr(function, "__qualname__", "") for function in functions):
        raise ValueError(
            "Self-Attention Guidance: expected the whole picture in one window, as it lays one window's attention over all of it. "
            "Remove that node, use Perturbed-Attention Guidance instead, or make min_window as large as the picture and `wrap` none.")


def _check_controls(conds, run: Run) -> None:
    """Raise ValueError for a control that cannot be cut, if there is something to cut it to."""
    try:
        check_controls(conds)
    except ValueError:
        if not run.is_one_window:
            raise


def _check_size(x: torch.Tensor, run: Run) -> None:
    """Raise ValueError if a sampler has given the latent another size on its way (LCM Upscale does)."""
    if x.shape[-2:] != run.strengths.shape:
        height, width = run.strengths.shape
        raise ValueError(
            f"sampler: expected one that keeps the latent's size, {width} x {height} cells, but it went on with {x.shape[-1]} x {x.shape[-2]}. "
            "Choose another sampler, or enlarge the latent between two of them.")


def _check_latent(latent: torch.Tensor, latent_shapes) -> None:
    """Raise ValueError for latents without a height and a width of their own."""
    if latent.ndim < 4 or (latent_shapes is not None and len(latent_shapes) > 1):
        raise ValueError(
            f"latent: expected a picture's or a video's, (batch, channels, [frames,] height, width), got {tuple(latent.shape)}"
            f"{', several packed into one' if latent_shapes is not None and len(latent_shapes) > 1 else ''}. "
            "Packed audio and video, and audio alone, cannot be tiled: remove Quadtree Tiled Diffusion from this model.")

"""The patch: samples the latent window by window, so that each part changes exactly as much as it was told.

Works in cells of the latent, and with `denoised`, the estimate of the clean latent that the host's models return in
every family. With s the share of a cell at a sigma and `original` the latent that came in,

    denoised = (1 - s) * original + s * model_denoised

is the blend of two velocities, (x - original) / sigma, which preserves, and (x - model_denoised) / sigma, since denoised
is affine in the velocity, in eps and in v.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import comfy.model_management
import comfy.patcher_extension

from .blending import Blend
from .canvas import Canvas
from .conditioning import cut_conds, kind_of_window, rows_of
from .devices import Batch, Crew, Work, evened, find_crew, one_by_one, options_of, options_on
from .layout import Look, follow, hindrance, hold_of, look_at
from .loading import load_where_it_fits
from .memory import if_memory
from .model_facts import fills_devices, windows_that_fill, windows_that_fit
from .outcome import concluded
from .patches import apply_model, home_of_patches, windows_are_alone, with_windows
from .prompts import prompts_of_windows
from .refusals import check_canvas, check_controls, check_guidance, check_latent, check_size
from .sampling_run import Call, Run, like
from .settings import Settings
from .tones import hold_at, low_pass
from .utils import cut_latent, pieces, slices
from .windows import group_windows

KEY = "quadtree_tiled_diffusion"

# Of what is told once in a run: that there are no looks at the whole picture, and from then on none is tried.
NO_LOOK = "layout"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TiledDiffusion(Settings):
    """What the user chose, and the model that samples by it."""

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

    def _outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Give the run its state; afterwards put back what was to be kept.

        Here and not where the sampler ends: the latent's way into the model's scale and back costs the last bit.
        """
        with self._named_errors():
            return self._sampled(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _sampled(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        check_latent(latent_image, kwargs.get("latent_shapes"))
        model = executor.class_obj.model_patcher.model
        check_canvas(self.tree, latent_image, model.latent_format.spacial_downscale_ratio)
        call = Call.of(self, noise, latent_image, sigmas)
        # In this run the guider's options are a copy, made by CFGGuider.sample.
        options = executor.class_obj.model_options["transformer_options"]
        options[KEY] = call
        _put_in_place(options["wrappers"])
        return concluded(call, executor(noise, latent_image, sampler, sigmas, *args, **kwargs), model)

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
        shape = min(shape, list(noise_shape), key=math.prod)
        return load_where_it_fits(lambda: executor(model, shape, conds, *args, **kwargs), model, conds)


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
    options = extra_args["model_options"]
    held = options.get("transformer_options", {}).get(KEY)
    if held is None:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
    call = held.call if isinstance(held, Run) else held
    run = options["transformer_options"][KEY] = call.begin(guider, executor.class_obj, sigmas, noise, latent_image)
    run.watch.look(options, guider.conds.values())
    check_guidance(options, run)
    check_controls(guider.conds.values(), run)

    def told(step, denoised, x, total, *further):
        run.clock.callback(int(step), int(total), (x, denoised))
        if callback is not None:
            callback(step, denoised, x, total, *further)

    with _asked_by_all(guider) as asked:
        return executor(asked, sigmas, extra_args, told, noise, latent_image, *args, **kwargs)


@contextlib.contextmanager
def _asked_by_all(guider):
    """A copy of the guider, for the sampler, that blends whoever asks it.

    Guiders that call their own predict_noise, and samplers that call the guider's, go past all PREDICT_NOISE wrappers.
    """
    asked = copy.copy(guider)
    asked.predict_noise = functools.partial(_predict_noise, asked.predict_noise)
    try:
        yield asked
    finally:
        del asked.predict_noise  # which holds its guider


def _predict_noise(executor, x, sigma, model_options={}, *args, **kwargs):
    """Blend the original in, once, after guidance and all that other nodes do to it."""
    run = _run_of(model_options)
    if run is None or run.whole_x is not None:
        return executor(x, sigma, model_options, *args, **kwargs)
    check_size(x, run)
    progress = run.clock.call(float(sigma.flatten()[0]), x)
    run.whole_x = x
    try:
        denoised = executor(x, sigma, model_options, *args, **kwargs)
    finally:
        run.whole_x = None
    run.look_at(denoised)
    original = None if run.facts.original is None else like(run.facts.original, denoised)
    hold = hold_at(run.settings.hold_tones, progress)
    if hold and original is not None:
        denoised = denoised + hold * low_pass(original - denoised, run.facts.sizes.sides[-1], run.facts.sizes.wraps)
    if run.least_share(progress) == 1:
        return denoised
    share = run.share(progress, run.facts.strengths).to(denoised)
    return torch.lerp(x if original is None else original, denoised, share)


def _calc_cond_batch(executor, model, conds, x, sigma, model_options):
    """Let the host evaluate each batch of windows, and add them up."""
    run = _run_of(model_options)
    original = None if run is None else run.original_of(x, model_options)
    if original is None:
        return executor(model, conds, x, sigma, model_options)
    plan, blend, active = run.plan(run.progress)
    run.ledger.count(plan, run.facts.grid)
    run.watch.look(model_options, conds)
    crew, model_options = _crew_of(run, conds, model_options)
    canvas = run.canvas(model, x, plan)
    prompts = prompts_of_windows(conds, [blend.part_of(window) for window in plan.windows], active, sigma, canvas)
    if plan.is_whole:
        ask = lambda key: run.watch.evaluate(executor, model, list(prompts[0]), x, sigma, options_on(model_options, key))
        results = ask(None) if crew is None else crew.of_one_window(ask, fills_devices(plan.windows[0].rect, model, x))
    else:
        totals = [None if cond is None else torch.zeros_like(x) for cond in conds]
        windows = _Windows(run, executor, model, dict(zip(plan.windows, prompts)), x, sigma, model_options, canvas, blend, totals)
        windows.evaluate(crew, conds)
        if len(plan.windows) > 1 and run.follows_layout:
            windows.follow_layout(crew, conds, original, active)
        results = [torch.zeros_like(x) if total is None else total for total in totals]
    if run.facts.original is None or run.least_share(run.progress) > 0:
        return results
    # Guidance of other nodes reads these results, too: a kept cell is the original in each of them.
    kept = run.unsampled(run.facts.strengths)
    results = list(results)
    for index, cond in enumerate(conds):  # one after another, so that the former ones can go
        if cond is not None:
            results[index] = torch.where(kept, original, results[index])
    return results


def _crew_of(run: Run, conds, model_options: dict) -> tuple[Crew | None, dict]:
    """The devices that windows are shared out to, None for one, and the options without those that cannot be used."""
    if "multigpu_clones" not in model_options:
        return None, model_options
    stays = _what_stays(conds, model_options)
    if stays is not None:
        run.tell_once("one device", f"{stays}: windows stay on one device")
        return None, options_of(model_options, ())
    if not run.ledger.crew:
        run.ledger.crew = (find_crew(model_options),)
    crew = run.ledger.crew[0]
    if crew is None:
        return None, options_of(model_options, ())
    return crew, options_of(model_options, [device.key for device in crew.devices])


def _what_stays(conds, model_options: dict) -> str | None:
    """What cannot be used on several devices at once."""
    if "easycache" in model_options["transformer_options"]:
        return "EasyCache compares one call of the model with the one before"
    if any("gligen" in entry for entries in conds for entry in entries or ()):
        return "GLIGEN's model is on one device"
    return None


@dataclass(frozen=True, eq=False)
class _Windows:
    """The windows of one evaluation, and what is needed to evaluate them. prompts: the conditionings of each window.

    totals: the weighted sum of the model's results, one per conditioning, None where there is none.
    """

    run: Run
    executor: Callable
    model: object
    prompts: dict
    x: torch.Tensor
    sigma: torch.Tensor
    model_options: dict
    canvas: Canvas
    blend: Blend
    totals: list[torch.Tensor | None]

    def evaluate(self, crew: Crew | None, conds) -> None:
        """Add the results of all windows to the totals."""
        pending, work = self._batches(), Work(self._ask, self._take, self._halve, self._home)
        if crew is None:
            one_by_one(pending, self._next_batch, work)
            return
        self._forget_left_out(crew)
        self._prepare(conds, pending)
        # What is learnt of foreign code decides which windows are one batch: first as on one device, each when the last is there.
        while pending and self.run.watch.is_learning:
            crew.run([self._next_batch(pending)], work)
        batches = []
        while pending:
            batches.append(self._next_batch(pending))
        if len(batches) == len(self.prompts) == 1 and fills_devices(batches[0].windows[0].rect, self.model, self.x):
            self._take(batches[0], crew.of_one_window(lambda key: self._ask(batches[0], key)(), is_shared_out=True))
            return
        if not self.run.settings.tile_batch_size and not self.run.watch.counts_rows:
            batches = evened(batches, len(crew.devices), lambda batch: windows_that_fill(batch.windows[0].rect, self.model, self.x))
        crew.run(batches, work)

    def _forget_left_out(self, crew: Crew) -> None:
        """Drop the copies of patches on devices that are left out, or windows that have another home since would be taken for theirs."""
        used = {device.key for device in crew.devices}
        for key in [key for key in self.canvas.copies if key[0] == "patches" and key[2] not in used]:
            del self.canvas.copies[key]

    def follow_layout(self, crew: Crew | None, conds, original: torch.Tensor, active: torch.Tensor) -> None:
        """Lead the totals to one look at the whole picture."""
        run, facts, side = self.run, self.run.facts, self.run.facts.sizes.sides[-1]
        if NO_LOOK in run.ledger.warned:
            return
        why = hindrance(conds, self.model_options, self.canvas)
        look = look_at(self.x, self.sigma, conds, active, side, self.canvas, turned=run.step % 2 == 0) if why is None else None
        seen = None if look is None else self._seen(look, crew)
        if seen is None:
            why = why or ("there is no memory for a look at the whole picture" if look else "the picture is too small for it, or the model takes no noise")
            run.tell_once(NO_LOOK, f"hold_layout: {why}, so windows follow no common layout")
            return
        of_a_window = sum(map(rows_of, self.prompts.values())) / len(self.prompts)
        run.ledger.count_look(look.x.shape[-2:], facts.cost_of, rows_of(look.conds) / max(of_a_window, 1))
        hold, active = hold_of(run.settings.hold_layout, facts.strengths, run.progress), active.to(original.device)
        for index, total in enumerate(self.totals):
            if total is not None:
                self.totals[index] = follow(total, seen[index], look, hold, active, original, side, facts.sizes.wraps)

    def _seen(self, look: Look, crew: Crew | None) -> list | None:
        """What the model sees of the whole, on the first device that has the memory; None if none has."""
        for key in [None] if crew is None else [device.key for device in crew.devices]:
            options = options_on(self.model_options, key)
            seen = if_memory(functools.partial(self.run.watch.evaluate, self.executor, self.model, look.conds, look.x, look.sigma, options))
            if seen is not None:
                return seen
        return None

    def _batches(self) -> deque[Batch]:
        """The windows of one kind together, whatever their number."""
        alone = windows_are_alone(self.model_options, self.canvas)
        kind = lambda window: (kind_of_window(self.prompts[window], window.rect, self.canvas), window.rect if alone else None)
        found, first = deque(), 0
        for group in group_windows(list(self.prompts), kind):
            rows = max(rows_of(self.prompts[group[0]]), 1)
            rect = group[0].rect
            found.append(Batch(first, group, len(group) * rows * self.run.facts.cost_of.of(rect.height, rect.width)))
            first += len(group)
        return found

    def _prepare(self, conds, pending: Sequence[Batch]) -> None:
        """Do once, before any device is at work, what loads models or changes their weights."""
        for entry in (entry for entries in conds for entry in entries or ()):
            if entry.get("hooks") is not None:
                self.model.current_patcher.prepare_hook_patches_current_keyframe(self.sigma, entry["hooks"], self.model_options)
        if pending and "hints" not in self.canvas.prepared:
            cut_conds([conds], [pending[0].windows[0].rect], self.canvas)
            self.canvas.prepared["hints"] = True

    def _next_batch(self, pending: deque[Batch]) -> Batch:
        """Take the windows that are to be run next, as many of one kind as may be run at once."""
        batch, run = pending.popleft(), self.run
        alone = run.watch.goes_alone(len(self.prompts), run.settings.tile_batch_size)
        conds = self.prompts[batch.windows[0]]
        limit = 1 if alone else min(run.ledger.batch_limit, windows_that_fit(self.model, conds, self.x, batch.windows, self.canvas, run.ledger.fitting))
        if len(batch.windows) > limit:
            first, rest = batch.split(limit)
            pending.appendleft(rest)
            return first
        return batch

    def _ask(self, batch: Batch, device: torch.device | None) -> Callable:
        rects = [window.rect for window in batch.windows]
        with self.canvas.lock:
            conds = cut_conds([self.prompts[window] for window in batch.windows], rects, self.canvas)
        options = with_windows(options_on(self.model_options, device), rects, self.canvas)
        x, sigma = cut_latent(self.x, rects), self.sigma.repeat(len(rects))
        return lambda: self.run.watch.evaluate(self.executor, self.model, conds, x, sigma, options, len(rects))

    def _take(self, batch: Batch, results) -> None:
        _add_up(self.totals, results, batch.windows, self.blend)
        self.run.tell_windows(batch.first + len(batch.windows), len(self.prompts))

    def _halve(self, size: int) -> int:
        """From here on run half as many windows at once."""
        ledger = self.run.ledger
        if ledger.batch_limit > size // 2:
            ledger.batch_limit = size // 2
            log.info("out of memory with %d windows at once: going on with %d", size, ledger.batch_limit)
        with self.canvas.lock:
            self.canvas.copies.clear()
        comfy.model_management.soft_empty_cache()
        return size // 2

    def _home(self, batch: Batch) -> torch.device | None:
        with self.canvas.lock:
            return home_of_patches(tuple(window.rect for window in batch.windows), self.canvas)


def _add_up(totals, results, group, blend: Blend) -> None:
    """Add a batch's results, each by its window's weight, to the totals, in place."""
    parts = [None if total is None else result.chunk(len(group)) for total, result in zip(totals, results)]
    for index, window in enumerate(group):
        weight = blend.weight_of(window, results[0])
        for total, part in zip(totals, parts):
            for here, there in pieces(window.rect, *total.shape[-2:]) if total is not None else ():
                total[slices(here)].addcmul_(part[index][slices(there)], weight[slices(there)])


def _run_of(model_options) -> Run | None:
    """The run that a call of the model belongs to; None outside of a sampler."""
    run = model_options.get("transformer_options", {}).get(KEY)
    return run if isinstance(run, Run) else None

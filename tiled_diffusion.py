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
import traceback
from collections import deque
from dataclasses import dataclass

import torch

import comfy.model_management
import comfy.patcher_extension

from .blending import Blend
from .conditioning import cut_conds, kind_of_window
from .model_facts import windows_that_fit
from .outcome import concluded
from .patches import apply_model, windows_are_alone, with_windows
from .prompts import prompts_of_windows
from .refusals import check_canvas, check_controls, check_guidance, check_latent, check_size
from .sampling_run import Call, Run, Settings, like
from .tones import hold_at, low_pass
from .utils import cut_latent, pieces, slices
from .windows import group_windows

KEY = "quadtree_tiled_diffusion"

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
        return executor(model, min(shape, list(noise_shape), key=math.prod), conds, *args, **kwargs)


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

    return executor(guider, sigmas, extra_args, told, noise, latent_image, *args, **kwargs)


def _predict_noise(executor, x, sigma, model_options={}, *args, **kwargs):
    """Blend the original in, once, after guidance and all that other nodes do to it."""
    run = _run_of(model_options)
    if run is None:
        return executor(x, sigma, model_options, *args, **kwargs)
    check_size(x, run)
    progress = run.clock.call(float(sigma.flatten()[0]), x)
    run.whole_x = x
    denoised = executor(x, sigma, model_options, *args, **kwargs)
    run.whole_x = None
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
    model_options = run.watch.options(model_options)
    canvas = run.canvas(model, x, plan)
    prompts = prompts_of_windows(conds, [window.rect for window in plan.windows], active, sigma, canvas)
    if plan.is_whole:
        results = run.watch.evaluate(executor, model, list(prompts[0]), x, sigma, model_options)
    else:
        results = _evaluate_windows(executor, model, dict(zip(plan.windows, prompts)), x, sigma, model_options, canvas, blend, conds)
    if run.facts.original is None or run.least_share(run.progress) > 0:
        return results
    # Guidance of other nodes reads these results, too: a kept cell is the original in each of them.
    kept = run.unsampled(run.facts.strengths)
    results = list(results)
    for index, cond in enumerate(conds):  # one after another, so that the former ones can go
        if cond is not None:
            results[index] = torch.where(kept, original, results[index])
    return results


def _evaluate_windows(executor, model, prompts: dict, x, sigma, model_options, canvas, blend: Blend, conds) -> list[torch.Tensor]:
    """The weighted sum of the model's results over the windows, one per conditioning. prompts: the conds of each window."""
    run = _run_of(model_options)
    totals = [None if cond is None else torch.zeros_like(x) for cond in conds]
    alone = windows_are_alone(model_options, canvas)
    pending = deque(group_windows(list(prompts), lambda window: (kind_of_window(prompts[window], window.rect, canvas), window.rect if alone else None)))
    while pending:
        comfy.model_management.throw_exception_if_processing_interrupted()
        group = _next_batch(pending, run, model, prompts, x, canvas)
        rects = [window.rect for window in group]
        try:
            results = run.watch.evaluate(
                executor, model, cut_conds([prompts[window] for window in group], rects, canvas), cut_latent(x, rects), sigma.repeat(len(group)),
                with_windows(model_options, rects, canvas), len(group))
        except comfy.model_management.OOM_EXCEPTION:
            if len(group) == 1:
                raise
            _halve_batches(run, len(group))
            results = None
        if results is None:
            pending.appendleft(group)
            continue
        _add_up(totals, results, group, blend)
        del results  # or they would live beside the next batch's
        run.tell_windows(len(prompts) - sum(map(len, pending)), len(prompts))
    return [torch.zeros_like(x) if total is None else total for total in totals]


def _next_batch(pending: deque, run: Run, model, prompts: dict, x, canvas):
    """Take the windows that are to be run next, as many of one kind as may be run at once."""
    group = pending.popleft()
    alone = run.watch.goes_alone(len(prompts), run.settings.tile_batch_size)
    limit = 1 if alone else min(run.ledger.batch_limit, windows_that_fit(model, prompts[group[0]], x, group, canvas, run.ledger.fitting))
    if len(group) > limit:
        pending.appendleft(group[limit:])
    return group[:limit]


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
    run.ledger.batch_limit = size // 2
    run.ledger.copies.clear()
    log.info("out of memory with %d windows at once: going on with %d", size, run.ledger.batch_limit)
    comfy.model_management.soft_empty_cache()


def _run_of(model_options) -> Run | None:
    """The run that a call of the model belongs to; None outside of a sampler."""
    run = model_options.get("transformer_options", {}).get(KEY)
    return run if isinstance(run, Run) else None

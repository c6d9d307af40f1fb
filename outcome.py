"""What is put back, and what is said, when a sampler node has ended?"""
from __future__ import annotations

import logging
import time

import torch

from .sampling_run import Call, Run, fit_original

# The most by which samples differ from the original, in the model's scale, where no noise is left in them.
NO_NOISE = 1e-4

log = logging.getLogger(__name__)


def concluded(call: Call, samples: torch.Tensor, model) -> torch.Tensor:
    """The samples with what was to be kept put back, and the run's line told. model: the host's, for its scale."""
    if not call.runs:
        return samples
    run = call.runs[-1]
    for one in call.runs:
        one.lookout.tell()
    restored = _restored(call, run, samples, model)
    samples = samples if restored is None else restored
    samples.flatten()[:1].tolist()  # waits for the device, so that the run's time is whole
    if call.ledger.calls:
        _report(call, run, restored is not None)
        _warn_if_little_changed(call, run)
    if call.ledger.lost and call.settings.tell is not None:
        call.settings.tell(call.ledger.lost[0], failed=True)
    return samples


def _restored(call: Call, run: Run, samples: torch.Tensor, model) -> torch.Tensor | None:
    """The samples with the original, bit for bit, in the cells that were never sampled; None where noise belongs there.

    What a sampler leaves when it is stopped has to keep its noise, whatever its last sigma.
    """
    if run.facts.original is None:
        return None
    if samples.shape != call.latent.shape:
        log.warning("a node after Quadtree Tiled Diffusion gave the samples another size, %s: what was to be kept is not put back.", tuple(samples.shape))
        return None
    original = call.latent.to(samples) if call.settings.original is None else fit_original(call.settings.original, samples)
    kept = run.unsampled(run.facts.strengths).to(samples.device)
    noise = (model.process_latent_in(samples) - model.process_latent_in(original))[..., kept]
    left = float(noise.square().mean().sqrt()) if noise.numel() else 0.0
    if left > NO_NOISE and (call.sigmas[-1] > 0 or not _is_finished(run, left)):
        if call.sigmas[-1] == 0:
            log.warning(
                "the sampler ended before its last step, so what was to be kept still holds noise and is left so. "
                "To go on from here, connect the encoded picture to `original` and the whole schedule to `sigmas`.")
        return None
    return torch.where(kept, original, samples)


def _is_finished(run: Run, left: float) -> bool:
    """Whether the sampler came to its end. left: how much noise there is in what was kept."""
    # One with steps of its own, of which nothing is known: no more than the noise of the last step.
    return run.clock.at_end or (not run.clock.counts and left <= 2 * run.clock.sigmas[-2])


def _report(call: Call, run: Run, is_restored: bool) -> None:
    """The run's one line, in the log and on the node."""
    ledger, steps = call.ledger, run.facts.steps
    # By leaves: at the border of one, strengths ease, and the least of them may have no step.
    kept = float(run.unsampled(run.facts.leaf_strengths).double().mean()) if run.facts.original is not None else 0.0
    cost = ledger.cost / ledger.grid_cost
    line = (
        f"{ledger.windows} windows{f' of {len(ledger.shapes)} shapes' if len(ledger.shapes) > 1 else ''} over {steps} steps, {cost:.2f} of the cost of the full grid's {ledger.grid_windows}; "
        f"{100 * kept:.0f} % of the picture {'kept exactly' if is_restored or not kept else 'not sampled'}")
    log.info(line)
    if call.settings.tell is not None:
        call.settings.tell(
            line, windows=ledger.windows, shapes=len(ledger.shapes), grid_windows=ledger.grid_windows, steps=steps, cost=cost, kept=kept,
            exact=is_restored or not kept, seconds=time.monotonic() - call.runs[0].began)


def _warn_if_little_changed(call: Call, run: Run) -> None:
    """Say so where more than half of what was to change was never sampled."""
    wanted = run.facts.leaf_strengths > 0
    missed = wanted & run.unsampled(run.facts.leaf_strengths)
    # Stages that follow sample what this one does not come to.
    is_stage = call.settings.sigmas is not None and call.sigmas[-1] > 0
    if run.facts.original is None or 2 * int(missed.sum()) <= int(wanted.sum()) or is_stage:
        return
    steps = run.facts.steps
    share = 100 * int(missed.sum()) / int(wanted.sum())
    if run.clock.at_end or not run.clock.counts:
        reason = f"{steps} step{'s are' if steps > 1 else ' is'} too few for strengths below {1 / steps:.2f}. Use more steps, raise the strengths, or choose the schedule ramp."
    else:
        reason = "the sampler ended before their first step. Let it run to its last sigma."
    log.warning("%.0f %% of what was to change did not change at all: %s", share, reason)

"""How far do windows go over several devices? Measured on keys of one CPU, and simulated beyond one machine.

The simulation has no network code: it asks how long steps would take. The planner's windows of real photos go from one machine,
which holds the latent and works too, to others over links of a latency and a width, and their results come back. A step
ends when all of them are there, since the next one needs the whole latent.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from measuring import table
from plans import FLUX_DEV, PHOTOS, PlannedRun, photo_tree, planned_run

WORKERS = (2, 4, 8, 16, 32, 64)
STEPS = 20

# What a window sends and brings back: 16 channels of two bytes (bf16). One of 1024 px is 0.5 MB.
BYTES_PER_CELL = 32

# Seconds for a window of 1024 px and its overlap: FLUX.1-dev's 160 * 10^12 operations for it at 450 and at 80 * 10^12 a second.
SECONDS = {"0.35 s a window (a large accelerator)": 0.35, "2 s a window (a desktop's)": 2.0}
WHOLE_WINDOW = FLUX_DEV.of(144, 144)


@dataclass(frozen=True)
class Link:
    """Between the machine that holds the latent and each worker. bytes_per_second: of its own end, shared by all, in each direction."""

    name: str
    latency: float
    bytes_per_second: float


LINKS = (
    Link("NVLink", 10e-6, 300e9), Link("PCIe 4.0 x16", 20e-6, 25e9), Link("10 GbE", 100e-6, 1.1e9), Link("1 GbE", 200e-6, 0.11e9),
    Link("internet, 100 Mbit/s", 30e-3, 12e6))


def step_seconds(windows: Sequence[tuple[float, int]], workers: int, link: Link) -> float:
    """How long a step takes. windows: of each, the seconds that it takes anywhere and the bytes that it is.

    The first worker is where the latent is. Windows go out the longest first, each to the worker from which its result would be
    back first; what a worker gets next is sent while it is at work.
    """
    free, sent, done = [0.0] * workers, 0.0, []
    for seconds, size in sorted(windows, reverse=True):
        there = sent + size / link.bytes_per_second + link.latency
        starts = [free[0], *(max(ready, there) for ready in free[1:])]
        ends = [start + seconds + (link.latency if place else 0.0) for place, start in enumerate(starts)]
        place = min(range(workers), key=ends.__getitem__)
        free[place] = starts[place] + seconds
        if place:
            sent += size / link.bytes_per_second
            done.append((free[place], size))
    back = 0.0
    for end, size in sorted(done):
        back = max(back, end + link.latency) + size / link.bytes_per_second
    return max(free[0], back)


def windows_of(plan, seconds: float) -> list[tuple[float, int]]:
    sizes = [(window.rect.height, window.rect.width) for window in plan.windows]
    return [(seconds * FLUX_DEV.of(height, width) / WHOLE_WINDOW, BYTES_PER_CELL * height * width) for height, width in sizes]


def speed_up(runs: Sequence[PlannedRun], seconds: float, workers: int, link: Link) -> float:
    """How many times as fast as on one device, over the steps of several runs together."""
    steps = [windows_of(plan, seconds) for run in runs for plan in run.plans if plan.windows]
    return sum(sum(one for one, _ in step) for step in steps) / sum(step_seconds(step, workers, link) for step in steps)


def bound(runs: Sequence[PlannedRun]) -> float:
    """What no number of workers exceeds: a step takes as long as its longest window."""
    steps = [windows_of(plan, 1.0) for run in runs for plan in run.plans if plan.windows]
    return sum(sum(one for one, _ in step) for step in steps) / sum(max(one for one, _ in step) for step in steps)


def rows_of(side: int, runs: Sequence[PlannedRun]) -> list[tuple]:
    found = []
    for title, seconds in SECONDS.items():
        for link in LINKS:
            ups = [speed_up(runs, seconds, workers, link) for workers in WORKERS]
            # Where twice as many workers bring less than a tenth more.
            end = next((workers for workers, here, twice in zip(WORKERS, ups, ups[1:]) if twice < 1.1 * here), WORKERS[-1])
            found.append((side, title, link.name, *(f"{up:.1f}" for up in ups), end))
    return found


CARRY = (
    "What an existing engine would have to carry. At the start, to every worker once: the model, the conditionings with all that lies beside them (references, hints, masks; a text of 512 tokens "
    "is 4 MB in bf16), the plan (rectangles) and the options that patches read. In each step, to a worker: the sigma and its windows of the latent; back: as many "
    "bytes for each conditioning. `torch.distributed` has `send` and `recv` of tensors and no more: who gets which window, and what is done when one is gone, would be ours, with one process for each "
    "worker that holds the same graph. Ray has actors that hold a model, futures in order of arrival and retries; it would have to be given the host's patcher, which it cannot pickle (functions "
    "of other packs, hooks), so each actor has to load the workflow's model itself. What the host does between workers of its own, `devices.py` uses; beyond one machine the pack sends nothing.\n")


def sleeping_rows(tiny: bool) -> list[tuple]:
    """A model that sleeps for its tokens, on device keys of one CPU, through the host's sampler, node and threads."""
    from device_keys import on_devices
    from sampling import load, patched, sample, striped_tree
    from tiny_models import with_prediction

    def sleeping(call):
        time.sleep(call.cells / 4 * (2e-5 if tiny else 2e-3))
        return 0.5 * call.x
    found, model, size = [], load("flux_schnell"), (512, 512)
    tree = striped_tree(0.25, 1.0, 0.5, 0.75, leaf=128, height=512)
    for name, settings in (
        ("windows of many shapes", dict(min_window=64, max_window=128)), ("a grid of equal windows", dict(min_window=64, max_window=64, window_shapes="square")),
        ("SpotDiffusion", dict(method="SpotDiffusion", min_window=64, max_window=64)),
    ):
        seconds = []
        for count in (1, 2, 4):
            several = model if count == 1 else on_devices(model, count)
            patcher = with_prediction(patched(several, tree, tile_batch_size=1, **settings), sleeping)
            sample(several, patcher, size=size, steps=1)
            began = time.perf_counter()
            sample(several, patcher, size=size, steps=2 if tiny else 3)
            seconds.append(time.perf_counter() - began)
        found.append((name, f"{seconds[0]:.2f} s", *(f"{taken / seconds[0]:.2f}" for taken in seconds[1:])))
    return found


def workers_part(tiny: bool) -> str:
    """What was measured on keys of one CPU, what was simulated, and what an engine would have to carry."""
    text = "## Windows over several devices\n\n" + table(("windows", "one device", "two, of its time", "four, of its time"), sleeping_rows(tiny)) + (
        "\nMeasured by the clock: a model that sleeps 2 milliseconds for each of its tokens (of 2 x 2 cells) and computes nothing, so that only how windows are shared out counts; 512 px, 3 steps, "
        "one window a batch, device keys of one CPU with the host's own node and threads. Limits: 0.60 and 0.35.\n\n")
    photos, sides = (PHOTOS[:1], (512,)) if tiny else (PHOTOS, (2048, 4096))
    rows, notes = [], []
    for side in sides:
        runs = [planned_run(photo_tree(name, side, 0.4, 64, 0), steps=STEPS) for name in photos]
        rows += rows_of(side, runs)
        counts = [len(plan.windows) for run in runs for plan in run.plans]
        notes.append(f"{side} px: {statistics.mean(counts):.1f} windows a step ({max(counts)} at most), and at most {bound(runs):.1f} times as fast, since a step is never shorter than its longest window")
    return text + table(("side, px", "a device", "link", *(f"{workers} workers" for workers in WORKERS), "worth it up to"), rows) + (
        f"\nSimulated, times as fast as one device: the windows that the planner lays over eight photos (budget 0.4, windows of 256 to 1024 px, {STEPS} steps, FLUX.1-dev), one conditioning. The machine that "
        "holds the latent works too, and sends and takes over one end that all share; every step waits for its last window. Worth it: twice as many bring a tenth more. "
        + ". ".join(notes) + ".\n\n") + CARRY

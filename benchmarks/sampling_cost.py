"""What does the patch add beside the model, and what does it save? Sampled with the tests' small FLUX-architecture model."""
from __future__ import annotations

import contextlib
import statistics
import unittest.mock
from dataclasses import dataclass, field, replace

import torch
import comfy.samplers
import comfy.sd
import tiny_models
from counting import step_bytes
from measuring import busy, milliseconds, table, timed
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion
from sampling import calls_of, even_tree, load, sample, striped_tree, with_prediction

from plans import BUDGETS, PHOTOS, photo_tree, planned_run, sizes_px

STEPS = 10
MODEL = "flux_schnell"
WIDTH = 512


@dataclass
class Clock:
    """Seconds of each step, in all and inside the host's evaluation of windows."""

    steps: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    batches: int = 0

    def around(self, function):
        """The host's step, with a clock around it."""
        def step(*args, **kwargs):
            results = []
            self.inside.append(0.0)
            self.steps.append(timed(lambda: results.append(function(*args, **kwargs))))
            return results[0]
        return step

    def within(self, function):
        """The host's evaluation of a batch of windows, with a clock around it."""
        def evaluate(*args, **kwargs):
            results = []
            self.inside[-1] += timed(lambda: results.append(function(*args, **kwargs)))
            self.batches += 1
            return results[0]
        return evaluate

    @property
    def added(self) -> float:
        """Median seconds that a step takes beside its windows; the first, which plans, is left out."""
        return statistics.median(step - inside for step, inside in zip(self.steps[1:], self.inside[1:]))


@contextlib.contextmanager
def clocked():
    """A clock on all that is sampled inside."""
    clock, guider = Clock(), comfy.samplers.CFGGuider
    with (
        unittest.mock.patch.object(guider, "outer_predict_noise", clock.around(guider.outer_predict_noise)),
        unittest.mock.patch.object(comfy.samplers, "_calc_cond_batch", clock.within(comfy.samplers._calc_cond_batch)),
    ):
        yield clock


def hosts_own(model, side: int, steps: int) -> float:
    """Seconds that a step takes beside the model without the patch: guidance, mostly."""
    with clocked() as clock:
        sample(model, with_prediction(model.patcher, lambda x, sigma: x), size=(side, side), steps=steps)
    return clock.added


def window_seconds(model, side: int) -> float:
    """Seconds of the small model for one window of this side."""
    sample(model, model.patcher, size=(side, side), steps=1)
    return timed(lambda: sample(model, model.patcher, size=(side, side), steps=2)) / 2


def added_row(model, tree, window: int, steps: int, own: float) -> tuple:
    """What the patch adds, with the model left out, and its share of a step with the small model in."""
    overlap = tree.height // 64
    patcher = TiledDiffusion(tree, min_window=window, max_window=window, tile_overlap=overlap, tile_batch_size=1).patched(model.patcher)
    with clocked() as clock:
        sample(model, with_prediction(patcher, lambda x, sigma: x), size=(tree.height, tree.width), steps=steps)
    windows = clock.batches // len(clock.steps)
    added, per_window = max(clock.added - own, 0.0), window_seconds(model, window + 2 * overlap)
    kept = f"{100 * tree.kept_share:.0f} %"
    return window, windows, kept, milliseconds(added), f"{added / windows * 1e3:.2f}", milliseconds(per_window), f"{100 * added / (added + windows * per_window):.2f} %"


def overhead_part(tiny: bool) -> str:
    """Part c."""
    model, side, steps = load(MODEL), 512 if tiny else 4096, 3 if tiny else 8
    own = hosts_own(model, side, steps)
    trees = even_tree(1.0, side, side), striped_tree(*[0.0, 1.0] * 4, leaf=side // 8, height=side)
    rows = [added_row(model, tree, side * window // 4096, steps, own) for window in (1024, 512, 256) for tree in trees]
    text = f"## c. What the patch adds to a step at {side} px\n\n" + table(
        ("window, px", "windows", "kept", "added per step, ms", "per window, ms", "small model per window, ms", "share of the step"), rows)
    return text + (
        "\nAdded: the step (cutting, adding up, blending, guidance) less the time inside the host's evaluation of each window, one window at a time, and less "
        f"what the host's own step takes beside the model ({milliseconds(own)} ms). The limit is 3 % of a step with a model of 20 ms a window or more.\n")


def run_of(patcher) -> tuple:
    """A clone of a patched model and a list that gets what the patch knows of each call of a sampler node."""
    runs, clone = [], patcher.clone()

    def keep(executor, guider, sigmas, extra_args, *args, **kwargs):
        runs.append(extra_args["model_options"]["transformer_options"][KEY])
        return executor(guider, sigmas, extra_args, *args, **kwargs)

    clone.add_wrapper_with_key("sampler_sample", "run_of", keep)
    return clone, runs


def timed_run(model, tree, **settings) -> tuple[float, object, int]:
    """Seconds of a whole run, the patch's state, and the cells that the model saw."""
    patcher, runs = run_of(TiledDiffusion(tree, **settings).patched(model.patcher))
    with calls_of(patcher) as shapes:
        seconds = timed(lambda: sample(model, patcher, size=(tree.height, tree.width), steps=STEPS))
    return seconds, runs[0].runs[-1], sum(shape[0] * shape[-2] * shape[-1] for shape in shapes)


def photo_rows(model, name: str, side: int, budgets) -> list[dict]:
    """One photo at `side` px, everything but the cell scaled with it from 2048 px."""
    scale = 2048 // side
    leaves, overlap, largest = dict(min_leaf=64 // scale, max_leaf=1024 // scale), 64 // scale, 1024 // scale
    trees = {budget: photo_tree(name, side, budget, **leaves) for budget in budgets}
    height, width = trees[budgets[0]].height, trees[budgets[0]].width
    full_grid = lambda: timed_run(model, even_tree(1.0, height, width), min_window=largest, max_window=largest, tile_overlap=overlap)[0]
    grids, rows = [full_grid()], []
    for budget, tree in trees.items():
        seconds, run, cells = timed_run(model, tree, min_window=256 // scale, max_window=largest, tile_overlap=overlap)
        planned = planned_run(tree, steps=STEPS, sizes=run.facts.sizes, cost=run.facts.cost_of)
        at_2048, squares = (planned_run(photo_tree(name, 2048, budget), sizes=sizes_px(256, 1024, shapes=shapes)) for shapes in ("tight", "square"))
        rows.append({
            "photo": name, "side": side, "budget": budget, "strength": at_2048.mean_strength, "planned": at_2048.cost, "squares": squares.cost, "own": run.ledger.cost / run.ledger.grid_cost,
            "seconds": seconds, "agree": cells == planned.cells})
    if side < 2048:
        grids.append(full_grid())  # once before and once after, as a machine's load changes
    whole = statistics.mean(grids)
    return [{**row, "time": row["seconds"] / whole, "whole": whole} for row in rows]


def wide_model() -> tiny_models.TinyModel:
    """The tests' model four times as wide, so that its time lies in the operations that the price of a window counts."""
    narrow = load(MODEL)
    sizes = narrow.family.sizes | {"hidden_size": WIDTH, "num_heads": WIDTH // narrow.family.sizes["hidden_size"]}
    weights = tiny_models.seeded_weights(tiny_models.build(narrow.family.config, sizes).diffusion_model)
    return replace(narrow, patcher=comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32}))


def budget_part(tiny: bool) -> tuple[str, list[dict]]:
    """Part d."""
    model = wide_model()
    sample(model, model.patcher, size=(256, 256), steps=1)
    found = [row for name in (PHOTOS[:1] if tiny else PHOTOS) for row in photo_rows(model, name, 512 if tiny else 1024, BUDGETS)]
    large = photo_rows(model, "coffee", 512 if tiny else 2048, BUDGETS[1:2])
    show = lambda row: (
        row["photo"], row["side"], row["budget"], *(f"{row[key]:.2f}" for key in ("strength", "planned", "squares", "own", "time", "seconds", "whole")),
        "yes" if row["agree"] else "no")
    rows = [show(row) for row in found + large]
    for budget in BUDGETS:
        mine = [row for row in found if row["budget"] == budget]
        mean = {key: statistics.mean(row[key] for row in mine) for key in ("strength", "planned", "squares", "own", "time", "seconds", "whole")}
        rows.append(show({"photo": "**mean**", "side": mine[0]["side"], "budget": budget, "agree": all(row["agree"] for row in mine), **mean}))
    header = ("photo", "sampled at, px", "budget", "mean strength", "planned", "planned, squares", "planned, this model", "measured", "seconds", "full grid, s", "cells as planned")
    text = "## d. Cost against budget\n\n" + table(header, rows)
    return text + (
        "\nPlanned: tokens of a run of 20 steps at 2048 px as FLUX.1-dev counts them, as a share of the full grid of 1024 px windows; tight windows of 256 to 1024 px, "
        f"overlap 64 px; beside it what squares would cost. Measured: seconds of {STEPS} steps of a small model of FLUX's architecture, {WIDTH} wide, whose own planned cost stands beside it; at 1024 px "
        "windows, overlap and leaves are half as large. Limits: planned mean 0.24, 0.40 and 0.62 on the trees of one threshold; at 0.4 the measured mean within a tenth of this model's planned one. "
        "Cells as planned: those counted at `apply_model`. Width matters: in the tests' model, 128 wide, two thirds of a large window's operations are attention's, which a processor does much faster than "
        f"the rest, so that its time goes with tokens and not with operations. {busy()}\n"), found


def memory_part(tiny: bool) -> str:
    """Memory, by counts of live bytes."""
    model, rows = load(MODEL), []
    for window in (512,) if tiny else (512, 1024):
        settings = dict(min_window=window, max_window=window, tile_overlap=32, tile_batch_size=1)
        tree = striped_tree(1.0, *[0.0] * (4096 // window - 1), leaf=window, height=4096)
        batch = step_bytes(model, model.patcher, window + 64)
        whole = step_bytes(model, TiledDiffusion(tree, **settings).patched(model.patcher), 4096)
        bound = batch + 3 * 4 * 16 * 512 * 512
        rows.append((window, f"{batch / 2**20:.0f}", f"{whole / 2**20:.0f}", f"{bound / 2**20:.0f}", f"{whole / bound:.2f}"))
    text = "## Memory of a step at 4096 px\n\n" + table(("window, px", "one window batch, MiB", "the step, MiB", "batch and three latents, MiB", "ratio"), rows)
    return text + "\nThe most bytes of tensors that live at once beyond the model and what the sampler holds, cond and uncond together. The limit is 1.10.\n"

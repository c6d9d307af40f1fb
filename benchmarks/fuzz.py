"""10,000 seeded cases: trees, masks, edits, windows and sampling runs of all kinds. What has to hold is in tests/fuzz_*.py."""
from __future__ import annotations

import itertools
import logging
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from fuzz_plans import check_plan_case, draw_plan_case
from fuzz_runs import check_run_case, draw_run_case
from fuzzing import Unproven, changed, failure, smallest

PLANS = 9600
RUNS = 400

# Line by line what each kind of case is.
KINDS = {
    "plan": "trees of noise, photos, flat and tiny pictures and masks, edited, adjusted, protected, composited; 8 to 16384 px; windows of every setting; three steps each",
    "refusal": "inputs that must be refused: each by its name, before anything else",
    "echo": "runs of the host's samplers with a model that answers cell by cell: schedules, sigmas, batches, frames, prompts, masks, areas, times, hooks, controls",
    "network": "the same with small networks of the host's classes, every family",
}
HELD = {
    "plan": "leaves cover each pixel once; every active cell in one core; weights sum to 1; identities exact; no plan above squares or the grid",
    "refusal": "refused by name",
    "echo": "kept cells exact; windows add up to one window; the model sees the cells that are planned",
    "network": "kept cells exact; one window is plain sampling, bit for bit; the model sees the cells that are planned",
}


def kind_of_case(case) -> str:
    if hasattr(case, "wrong"):
        return "refusal" if case.wrong else "plan"
    return "network" if case.network else "echo"


def count_cases(draw: Callable, check: Callable, seeds: range) -> tuple[Counter, list[str]]:
    """How many cases of each kind were tried, and the smallest of those that broke."""
    tried, broken = Counter(), []
    for seed in seeds:
        case = draw(seed)
        try:
            check(case)
        except Unproven:
            tried["unproven"] += 1
            continue
        except Exception:
            least = smallest(case, check)
            broken.append(f"seed {seed}: {changed(least)}: {failure(least, check)}")
            print(broken[-1], flush=True)
        tried[kind_of_case(case)] += 1
        if seed % 100 == 99:
            print(f"{kind_of_case(case)}: {seed + 1} of {seeds.stop}", flush=True)
    return tried, broken


def counted(shards: list[tuple], workers: int) -> list[tuple[Counter, list[str]]]:
    """The cases of every shard, in as many processes as there may be threads; each has one."""
    torch.set_num_threads(1)
    if workers == 1:
        return list(itertools.starmap(count_cases, shards))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.starmap(count_cases, shards, chunksize=1)


def fuzz_part() -> list[tuple[str, int, str]]:
    """10,000 seeded cases; one that breaks is made smaller until nothing can be left out."""
    logging.disable(logging.WARNING)  # the host warns whenever a clone of a model has gone before the model
    warnings.simplefilter("ignore")
    tried, broken = Counter(), []
    workers = torch.get_num_threads()
    shards = [
        (draw, check, range(first, amount, workers))
        for draw, check, amount in ((draw_run_case, check_run_case, RUNS), (draw_plan_case, check_plan_case, PLANS)) for first in range(workers)]
    for found, failures in counted(shards, workers):
        tried += found
        broken += failures
    if broken:
        raise AssertionError("\n".join(broken))
    rows = [(KINDS[kind], tried[kind], HELD[kind]) for kind in KINDS]
    return [*rows, ("runs that the host cannot sample without the patch either", tried["unproven"], "left out")]

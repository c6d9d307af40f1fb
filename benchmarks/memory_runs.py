"""Memory from run to run: what lives after each of many runs with changing trees."""
from __future__ import annotations

import gc
import random

import comfy.model_management
import torch
from sampling import even_tree, load, patched, sample, striped_tree

RUNS = 50
METHODS = ("Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion")


def living() -> tuple[int, int, int]:
    """How many tensors live, the bytes that they hold, and how many models the host has loaded."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return len(tensors), sum(storages.values()), len(comfy.model_management.current_loaded_models)


def counts_of_runs(name: str, runs: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """What lives after each of so many runs of a tiny model, each with a tree, settings and a number of images of its own."""
    model, draw, counts = load(name), random.Random(seed), []
    for number in range(runs):
        tree = striped_tree(*(draw.choice((0.0, 0.3, 0.6, 1.0)) for _ in range(4)), leaf=64) if number % 5 else even_tree(draw.random())
        patcher = patched(model, tree, method=METHODS[number % 3], tile_overlap=draw.choice((0, 16, 32)), hold_tones=draw.choice((0.0, 0.5)), hold_layout=draw.choice((0.0, 0.5)))
        sample(model, patcher, model.latent(256, 256, draw.choice((1, 2))), steps=2, cfg=draw.choice((1.0, 3.0)), noise_seed=number)
        del tree, patcher
        counts.append(living())
    return counts


def memory_part() -> list[tuple[str, int, str]]:
    """Runs one after another, each with a tree, a method and settings of its own: what lives after the last that did not after the third.

    Raises AssertionError if anything is left.
    """
    found = []
    for name in ("flux_schnell", "sd15", "wan21_t2v"):
        counts = counts_of_runs(name, RUNS)
        assert counts[-1] == counts[2], f"{name}: tensors, bytes and loaded models were {counts[2]} after the third run and {counts[-1]} after the last"
        tensors, size, models = counts[-1]
        found.append((f"runs of {name} with changing trees", RUNS, f"no tensor, no byte and no loaded model more ({tensors} tensors of {size / 2 ** 20:.1f} MiB with the model's own, {models} loaded)"))
    return found

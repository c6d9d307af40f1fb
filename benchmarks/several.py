"""Runs over several devices and runs with faults, in numbers: all are asked for bits."""
from __future__ import annotations

import itertools
import logging
import random
import threading
from collections import Counter

import comfy.model_management
import comfy.patcher_extension
import torch
from device_keys import forget_the_dead, on_devices, seen_calls
from sampling import even_tree, load, patched, sample, striped_tree

FAMILIES = ("flux_schnell", "sd15", "qwen_image", "wan21_t2v", "lumina2")
METHODS = ("Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion")
SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "lms", "uni_pc", "ddim", "res_multistep", "euler_cfg_pp", "er_sde")


def settings_of(family: str, method: str) -> dict:
    # A UNet's windows are multiples of eight cells, and so is their overlap.
    return dict(method=method, tile_batch_size=1, min_window=64, max_window=128, tile_overlap=0 if family == "sd15" else 16)


def devices_part(families=FAMILIES, methods=METHODS, samplers=SAMPLERS, counts=(2,)) -> list[tuple[str, int, str]]:
    """Windows over several device keys of one CPU, made by the host's MultiGPU CFG Split: the samples are one device's, bit for bit.

    Raises AssertionError if a bit differs or a device had nothing to do.
    """
    logging.getLogger("qtd_pack").setLevel(logging.ERROR)
    rows, tree = [], striped_tree(0.5, 1.0)
    for family in families:
        model, batches = load(family), {count: Counter() for count in counts}
        several = {count: on_devices(model, count) for count in counts}
        for method, sampler in itertools.product(methods, samplers):
            forget_the_dead()
            options = dict(steps=2, sampler=sampler)
            one = sample(model, patched(model, tree, **settings_of(family, method)), **options)
            for count, many in several.items():
                forget_the_dead()
                patcher = patched(many, tree, **settings_of(family, method))
                with seen_calls(patcher) as calls:
                    out = sample(many, patcher, **options)
                here = Counter(str(call.device) for call in calls)
                assert torch.equal(out, one), f"{family}, {method}, {sampler} on {count} devices: another result than on one"
                assert len(here) > 1, f"{family}, {method}, {sampler} on {count} devices: only {here}"
                batches[count] += here
        for count, found in batches.items():
            rows.append((
                f"{family}: {len(methods)} methods x {len(samplers)} samplers, {count} devices", len(methods) * len(samplers),
                "equal bit for bit; batches on each: " + ", ".join(f"{key} {number}" for key, number in sorted(found.items()))))
    return rows


FAULTS = {
    "the host's out-of-memory exception": lambda: comfy.model_management.OOM_EXCEPTION("no memory"),
    "an interrupt": comfy.model_management.InterruptProcessingException,
    "an error of a node": lambda: RuntimeError("their licence has expired"),
    "NaN for a window": None,
    "all models unloaded": None,
}


def with_fault(patcher, name: str, at: int):
    """A clone whose at-th call of the model goes wrong."""
    clone, counter, lock = patcher.clone(), Counter(), threading.Lock()

    def around(executor, x, *args, **kwargs):
        with lock:
            counter["calls"] += 1
            is_it = counter["calls"] == at
        if is_it and FAULTS[name] is not None:
            raise FAULTS[name]()
        out = executor(x, *args, **kwargs)
        return out.fill_(float("nan")) if is_it and name.startswith("NaN") else out
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "fault", around)
    return clone


def outcome_of(name: str, model, patcher, at: int) -> str:
    """What a run with a fault came to."""
    steps = {"callback": lambda step, *args: comfy.model_management.unload_all_models() if step == at % 4 else None} if "unloaded" in name else {}
    try:
        out = sample(model, with_fault(patcher, name, at), **steps)
    except BaseException as error:
        return f"ended with {type(error).__name__}"
    return "ended with samples that are numbers" if out.isfinite().all() else "ended with a warning"


def faults_part(repeats: int = 6, counts=(1, 2, 3)) -> list[tuple[str, int, str]]:
    """Faults at the n-th call of the model, n drawn anew each time, on one device and on several; the run after each is compared with a clean one, bit for bit.

    Raises AssertionError if the next run is not the clean one's, a thread is left, or numbers were lost without a word.
    """
    draw, rows, warnings = random.Random(0), [], []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("qtd_pack.finite").addHandler(handler)
    logging.getLogger("qtd_pack").setLevel(logging.ERROR)
    logging.getLogger("qtd_pack.finite").setLevel(logging.WARNING)
    # Alone, a window that was changed is not evaluated a second time, as those of other packs' code may be.
    of = lambda model, name: patched(model, even_tree(1.0), tile_batch_size=1 if "NaN" in name else 2, min_window=64, max_window=64, tile_overlap=0)
    for count in counts:
        model = load("flux_schnell") if count == 1 else on_devices(load("flux_schnell"), count)
        for name in FAULTS:
            clean = sample(load("flux_schnell"), of(load("flux_schnell"), name))
            patcher, found = of(model, name), Counter()
            for _ in range(repeats):
                forget_the_dead()
                warnings.clear()
                threads = threading.active_count()
                what = outcome_of(name, model, patcher, draw.randint(1, 32))
                assert bool(warnings) == (what == "ended with a warning"), (name, count, what, warnings)
                found[what] += 1
                assert threading.active_count() == threads, f"{name}: a thread is left"
                assert torch.equal(sample(model, patcher), clean), f"{name} on {count} devices: the next run is another"
            came = "; ".join(f"{number} {what}" for what, number in found.items())
            rows.append((f"{name}, {count} device{'s' if count > 1 else ''}", repeats, f"{came}; the next run equal bit for bit"))
    logging.getLogger("qtd_pack.finite").removeHandler(handler)
    return rows

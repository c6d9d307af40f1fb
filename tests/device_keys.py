"""Several devices on one CPU: keys for it that are not equal, and a model on each as the host's own node puts it there."""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from unittest import mock

import comfy.model_management
import comfy.patcher_extension
import pytest
import torch
from hosts import of_host
from tiny_models import TinyModel, load

KEYS = (torch.device("cpu"), *(torch.device("cpu", index) for index in range(3)))


def forget_the_dead() -> None:
    """Of clones that are gone while their weights live: on them the host fails, or collects garbage at every run."""
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [one for one in loaded if not one.is_dead()]


def on_devices(model: TinyModel, count: int) -> TinyModel:
    """The model after MultiGPU CFG Split, which finds so many devices. The host asks its loader for a model anew for each."""
    split = of_host("comfy_extras.nodes_multigpu", "MultiGPUCFGSplitNode")
    if not split:
        pytest.skip("this host has no work on several devices")
    forget_the_dead()
    patcher = model.patcher.clone()
    patcher.cached_patcher_init = (lambda: load.__wrapped__(model.name).patcher, ())
    with mock.patch.object(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: list(KEYS)):
        found = split.execute(patcher, count).args[0]
    assert [clone.load_device for clone in found.get_additional_models_with_key("multigpu")] == list(KEYS[1:count])
    return dataclasses.replace(model, patcher=found)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A call of the model: on which device, in which thread, of how many cells."""

    device: torch.device | None
    thread: int
    cells: int


@contextlib.contextmanager
def seen_calls(patcher):
    """Every call of the model, in a list that fills while the patcher samples."""
    calls: list[Seen] = []

    def record(executor, x, *args, **kwargs):
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "cond_or_uncond" in value)
        calls.append(Seen(options.get("multigpu_thread_device"), threading.get_ident(), x.numel()))
        return executor(x, *args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    patcher.add_wrapper_with_key(kind, "seen_calls", record)
    yield calls
    patcher.remove_wrappers_with_key(kind, "seen_calls")


def with_fault(patcher, fault):
    """A clone of which every call goes through fault(number of the call from 1, its device, its x)."""
    clone, counter, lock = patcher.clone(), collections.Counter(), threading.Lock()

    def around(executor, x, *args, **kwargs):
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "cond_or_uncond" in value)
        with lock:
            counter["calls"] += 1
            number = counter["calls"]
        fault(number, options.get("multigpu_thread_device"), x)
        return executor(x, *args, **kwargs)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "fault", around)
    return clone


def raised_on(errors):
    """A fault of devices, for with_fault. errors: by device."""
    def fault(number, device, x):
        if device in errors:
            raise errors[device]
    return fault


def counted(calls: list[Seen]) -> dict[str, int]:
    return dict(collections.Counter(str(call.device) for call in calls))

"""Onto which devices of a run is its model loaded?

The host loads it onto all of them in one call, and its error does not say which device it is about. So after one the own
device comes alone, and then one more after another: a device is only blamed for a load that went well without it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.model_management

from .devices import line_of, tell_left_out
from .memory import is_out_of_memory


def load_where_it_fits(prepare: Callable, patcher, conds: dict[str, list[dict]]):
    """prepare(), which loads a model onto its devices; those that it cannot be loaded onto are left out of this run.

    conds: by name, the conditionings whose controls are loaded with it. Raises the error of the own device, that of the patcher,
    and any that is not about a device.
    """
    clones = patcher.get_additional_models_with_key("multigpu") if hasattr(patcher, "get_additional_models_with_key") else []
    if not clones:
        return prepare()
    found, why = _attempt(prepare)
    if why is None:
        return found
    try:
        return _load_in_turn(prepare, patcher, clones, conds)
    finally:
        patcher.set_additional_models("multigpu", clones)


def _load_in_turn(prepare: Callable, patcher, clones: Sequence, conds: dict[str, list[dict]]):
    _use(patcher, [], conds)
    found = prepare()
    for clone in clones:
        used = patcher.get_additional_models_with_key("multigpu")
        _use(patcher, [*used, clone], conds)
        more, why = _attempt(prepare)
        if why is None:
            found = more
            continue
        # Where a load fails, the host forgets the models that it was still to come to.
        _use(patcher, used, conds)
        found = prepare()
        tell_left_out(clone.load_device, why)
    return found


def _use(patcher, clones: Sequence, conds: dict[str, list[dict]]) -> None:
    """Let the next load be onto the devices of these clones, and no control onto others, on which the host has made copies of it."""
    patcher.set_additional_models("multigpu", clones)
    keys = {clone.load_device for clone in clones}
    controls = [entry["control"] for entries in conds.values() for entry in entries if entry.get("control") is not None]
    for control in controls:
        if control.previous_controlnet is not None:
            controls.append(control.previous_controlnet)
        control.multigpu_clones = {key: copy for key, copy in control.multigpu_clones.items() if key in keys}


def _attempt(prepare: Callable) -> tuple[object, str | None]:
    """What prepare() gives, or why it failed if that may be on account of a device."""
    try:
        return prepare(), None
    except Exception as error:
        full, why = is_out_of_memory(error), f"the model cannot be loaded onto it ({line_of(error)})"
        # Torch raises the latter for a device that there is not.
        if not full and not isinstance(error, (RuntimeError, AssertionError)):
            raise
    if not full:
        return None, why
    # Not above, where the error holds what has been loaded.
    comfy.model_management.soft_empty_cache()
    return None, "there is no memory for the model"

"""What only some hosts have. The suite runs on older ones too (run.py test --host VERSION) and says there what it leaves out."""
from __future__ import annotations

import importlib

import pytest
from comfyui_version import __version__

VERSION = tuple(map(int, __version__.split(".")[:3]))


def of_host(module: str, name: str):
    """module.name of the host; None where this one has no such module or no such name in it."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as problem:
        if problem.name != module:
            raise
        return None
    return getattr(found, name, None)


def needs(what: str, has) -> pytest.MarkDecorator:
    """A mark that skips a test on a host without `what`, and says so."""
    return pytest.mark.skipif(not has, reason=f"this host, ComfyUI {__version__}, has no {what}")


def module_needs(what: str, has) -> None:
    """Skip the module that calls this on a host without `what`, and say so."""
    if not has:
        pytest.skip(f"this host, ComfyUI {__version__}, has no {what}", allow_module_level=True)

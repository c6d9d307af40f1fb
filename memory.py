"""Was there the memory for it?"""
from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import comfy.model_management

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """What the host takes for a lack of memory."""
    return isinstance(error, Exception) and comfy.model_management.is_oom(error)


def if_memory(ask: Callable[[], Result]) -> Result | None:
    """What ask() gives; None if there is no memory for it."""
    try:
        return ask()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Not above, where the error holds what was on the device.
    comfy.model_management.soft_empty_cache()
    return None

"""Counts of what torch does while a block runs: calls of operations, and bytes that live at once. No clock is involved."""
from __future__ import annotations

import collections
import weakref

import torch
from sampling import sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Operations(TorchDispatchMode):
    """How often each operation is called, by name: `calls["aten.add.Tensor"]`."""

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors made inside that live now, and the most that ever lived at once.

    Scratch memory inside one operation is not seen; what is seen does not depend on the machine.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {value.untyped_storage().data_ptr() for value in tree_iter((args, kwargs)) if torch.is_tensor(value)}
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if torch.is_tensor(value) and value.untyped_storage().data_ptr() not in known:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.now -= size


def step_bytes(model, patcher, side: int) -> int:
    """The most bytes that live while one denoised value is made, beyond those that lived before."""
    grown = []

    def measure(executor, *args, **kwargs):
        with LiveBytes() as live:
            result = executor(*args, **kwargs)
        grown.append(live.peak)
        return result

    clone = model.patcher.clone()
    clone.add_wrapper_with_key("predict_noise", "step_bytes", measure)  # before the patch's own, so around them
    clone.wrappers.update({kind: {**clone.wrappers.get(kind, {}), **by_key} for kind, by_key in patcher.wrappers.items()})
    sample(model, clone, size=(side, side), steps=1, cfg=4.0)
    return max(grown)

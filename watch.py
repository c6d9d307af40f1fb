"""What does foreign code do in the windows of a run, and which of it is refused?"""
from __future__ import annotations

import functools
import itertools
import logging
import re
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

import comfy.model_management
from comfy.patcher_extension import WrappersMP

from .foreign import KINDS, Foreign, in_call, is_foreign, is_library, is_own, is_patch, known_cache, names_of, on_model, parts_of, replaced_methods

log = logging.getLogger(__name__)

OUTSIDE, INSIDE = "quadtree_tiled_diffusion outside", "quadtree_tiled_diffusion inside"

SIZE_WORDS = re.compile(r"size|shape|dimension|broadcast|channels|must match", re.IGNORECASE)


ONE_WINDOW = "make min_window as large as the picture and leave no strength between 0 and 1, so that one window sees all of it at every step"


class Watch:
    """What foreign code does in the windows of one run.

    size: of the latent, in cells. moves: whether the run has several windows, or other ones from step to step; asked only
    if there is something foreign. told: what was said in this run.
    """

    def __init__(self, patcher, model, size: tuple[int, int], moves: Callable[[], bool], told: set):
        self.size = tuple(size)
        self.moves = functools.lru_cache(None)(moves)
        self.on_model = on_model(patcher, model)
        self.found: list[Foreign] = []
        self.counts_rows = self.trusted = False
        self.seen_before: set = set()
        self.told = told

    def look(self, model_options: dict, conds: Iterable[Sequence[dict] | None]) -> None:
        """Learn what is foreign in a call. Raises ValueError for a cache that is known, where it would mix windows."""
        self.found = self.on_model + list(in_call(model_options, conds))
        cache = known_cache(self.found, model_options.get("transformer_options", {}))
        if cache is not None and self.moves():
            raise ValueError(
                f"{cache[0]}: expected no cache of another pack on a model that is sampled in windows, as it gives one window what it kept of another, got {cache[1]}. "
                f"Remove that node and use ComfyUI's EasyCache, which keeps windows apart, or {ONE_WINDOW}.")
        wrappers = [one for one in self.found if one.wraps]
        if wrappers and self.moves():
            self._tell_once(
                "wrappers", "%s: not known to Quadtree Tiled Diffusion, and called with windows of the picture. It must not keep anything from one call to the next, "
                "take rows of a batch for images, or hold anything of the whole picture", names_of(wrappers))

    def goes_alone(self, windows: int, batch_size: int) -> bool:
        """Whether so many windows have to be run one at a time, as rows may be taken for images. batch_size: the user's."""
        # Tensors of inference mode do not tell whether they were changed.
        if self.counts_rows or any(one.alone or torch.is_inference_mode_enabled() for one in self.found):
            if windows > 1:
                instead = f" and not {batch_size} at once (tile_batch_size)" if batch_size > 1 else ""
                suspects = [one for one in self.found if one.alone] or self.found
                self._tell_once("rows", "windows are run one at a time%s, as code that is not ComfyUI's may take the rows of a batch for images: %s", instead, names_of(suspects))
            return True
        return not self.trusted and any(not one.wraps for one in self.found)

    @property
    def is_learning(self) -> bool:
        """Whether the next batch tells something that the ones after it depend on."""
        return not self.counts_rows and not self.trusted and any(not one.wraps for one in self.found)

    def _options(self, model_options: dict, look: _Look) -> dict:
        """The options with what sees foreign code from outside and from inside."""
        options = model_options["transformer_options"]
        wrappers = dict(options.get("wrappers", {}))
        # Compiled code is left as it is, unless there is something foreign in it.
        kinds = [kind for kind in KINDS if kind != WrappersMP.DIFFUSION_MODEL or "torch_compile_kwargs" not in model_options or kind in wrappers]
        for kind in kinds:
            several = wrappers.get(kind, {})
            # Ours comes first, and cuts what patches hold.
            first = dict(itertools.takewhile(lambda item: not any(map(is_foreign, item[1])), several.items()))
            wrappers[kind] = {**first, OUTSIDE: [functools.partial(self._outside, look, kind)], **several, INSIDE: [functools.partial(self._inside, look, kind)]}
        watched = model_options | {"transformer_options": options | {"wrappers": wrappers}}
        if "model_function_wrapper" in model_options:
            watched["model_function_wrapper"] = functools.partial(self._around_function, model_options["model_function_wrapper"])
        return watched

    def evaluate(self, executor, model, conds, x, sigma, model_options, windows: int = 1):
        """The host's results for a batch of windows, or None if they have to be run one at a time.

        Raises ValueError where foreign code fails on a window's size, or answers for it from memory.
        """
        if not self.found or not self.moves():
            return executor(model, conds, x, sigma, model_options)
        look = _Look(windows > 1)
        try:
            results = executor(model, conds, x, sigma, self._options(model_options, look))
        except RuntimeError as error:
            culprit = self._culprit(error)
            if culprit is None or tuple(x.shape[-2:]) == self.size:
                raise
            if windows == 1:
                raise self._of_another_size(culprit.name, x, f"it failed: {error}") from error
            look.acted = True
        self.counts_rows, self.trusted = self.counts_rows or look.acted, True
        if windows > 1 and look.acted:
            return None
        self._check_memory(look, conds, x, results, model_options)
        return results

    def _with_watched_patches(self, look: _Look, value):
        """Of options inside the model, a copy whose foreign patches are watched for whether they change anything."""
        if not isinstance(value, dict) or not value.get("patches"):
            return value
        patches = {
            place: [_Watched(patch, functools.partial(self._around_patch, look)) if is_patch(patch) and is_foreign(patch) else patch for patch in several]
            for place, several in value["patches"].items()}
        return value | {"patches": patches}

    def _around_patch(self, look: _Look, patch, *args, **kwargs):
        given = _tensors(args, kwargs)
        result = patch(*args, **kwargs)
        look.acted |= _tensors(args, kwargs) != given or not _tensors(result) <= given
        return result

    def _outside(self, look: _Look, kind: str, executor, x, *args, **kwargs):
        """Around all wrappers of a kind: see whether the ones between here and _inside let everything through as it is."""
        place, foreign = (kind, threading.get_ident()), self._of_kind(kind)
        if kind == WrappersMP.APPLY_MODEL:
            args = [self._with_watched_patches(look, value) for value in args]
        look.inner[place] = None
        given = _passed(x, *args, *kwargs.values())
        result = executor(x, *args, **kwargs)
        inner = look.inner.pop(place)
        if foreign and inner is not None and inner != (given, _passed(result)):
            look.acted = True
        if kind == WrappersMP.APPLY_MODEL:
            self._check_size(foreign, x, result)
        return result

    def _inside(self, look: _Look, kind: str, executor, x, *args, **kwargs):
        values = x, *args, *kwargs.values()
        given, options = _passed(*values), _options_in(values)
        look.seen.update((kind, index) for index in options.get("cond_or_uncond", ()))
        if look.together and kind == WrappersMP.APPLY_MODEL and self._of_kind(kind):
            # A wrapper may let everything through and replace what it calls.
            look.acted |= not {id(one.thing) for one in replaced_methods(executor.class_obj)} <= {id(one.thing) for one in self.on_model}
        result = executor(x, *args, **kwargs)
        look.inner[kind, threading.get_ident()] = given, _passed(result)
        return result

    def _around_function(self, function, apply_model, arguments: dict):
        result = function(apply_model, arguments)
        self._check_size(self._of_kind("model_function_wrapper"), arguments["input"], result)
        return result

    def _of_kind(self, kind: str) -> list[Foreign]:
        return [one for one in self.found if one.place.startswith(KINDS.get(kind, kind))]

    def _check_size(self, foreign: list[Foreign], x, result) -> None:
        if foreign and torch.is_tensor(result) and result.shape[-2:] != x.shape[-2:]:
            raise self._of_another_size(names_of(foreign), x, f"it returned {result.shape[-1]} x {result.shape[-2]}")

    def _of_another_size(self, name: str, x, what: str) -> ValueError:
        height, width = self.size
        return ValueError(
            f"{name}: expected code that takes any part of the picture, but given a window of {x.shape[-1]} x {x.shape[-2]} cells {what.rstrip('.')}. "
            f"It seems to hold something of the whole picture, {width} x {height} cells, or of another window. "
            f"Remove that node (for a cache use ComfyUI's EasyCache instead), or {ONE_WINDOW}.")

    def _culprit(self, error: RuntimeError) -> Foreign | None:
        """Whose code an error about sizes comes from: the innermost frame's that is not a library's."""
        if isinstance(error, comfy.model_management.OOM_EXCEPTION) or not SIZE_WORDS.search(str(error)):
            return None
        frames = [frame.f_code for frame, line in traceback.walk_tb(error.__traceback__)]
        for code in reversed([code for code in frames if not is_library(code.co_filename)]):
            if is_own(code.co_filename):
                return None
            for one in self.found:
                if code in _codes_of(one.thing):
                    return one
        return None

    def _check_memory(self, look: _Look, conds, x, results, model_options: dict) -> None:
        """Raise ValueError if the first conditioning's answer came without the model, which was asked before."""
        first = next((index for index, entries in enumerate(conds) if entries), None)
        for kind in KINDS:
            if (kind, first) in look.seen:
                self.seen_before.add((kind, first))
            elif (kind, first) in self.seen_before and not self._is_answer_without_memory(kind, results[first], x, model_options):
                raise ValueError(
                    f"{names_of(one for one in self.found if one.wraps)}: expected code that asks the model each time, but it answered for a window from what it kept "
                    f"of another. Remove that node and use ComfyUI's EasyCache, which keeps windows apart, or {ONE_WINDOW}.")

    def _is_answer_without_memory(self, kind: str, result, x, model_options: dict) -> bool:
        """Whether a step was skipped by the host's own cache, which knows windows, or with nothing or what came in for an answer."""
        hosts = kind == WrappersMP.DIFFUSION_MODEL and "easycache" in model_options["transformer_options"]
        return hosts or not bool(result.any()) or torch.equal(result, x)

    def _tell_once(self, what: str, line: str, *values) -> None:
        if what not in self.told:
            self.told.add(what)
            log.warning(line, *values)


@dataclass(eq=False)
class _Look:
    """What is seen of one evaluation. together: of several windows. seen: which conditionings the model was asked about, in
    which kinds of wrappers. acted: whether foreign code changed anything. inner: what came to the model, in each thread.
    """

    together: bool
    seen: set = field(default_factory=set)
    acted: bool = False
    inner: dict = field(default_factory=dict)


class _Watched:
    """A patch that tells what it does, for others the patch itself."""

    def __init__(self, patch, around):
        self._patch, self._around = patch, around

    def __call__(self, *args, **kwargs):
        return self._around(self._patch, *args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._patch, name)

    def __eq__(self, other) -> bool:
        return self._patch == (other._patch if isinstance(other, _Watched) else other)

    def __hash__(self) -> int:
        return hash(self._patch)


def _passed(*values) -> tuple:
    """What tells whether values are the same objects, as they were."""
    return tuple(sorted(_identity(value) for value in values if value is not None))


def _tensors(*values, depth: int = 3) -> set[tuple]:
    """The identities of the tensors in nested values, down to a depth."""
    found = set()
    for value in values:
        if torch.is_tensor(value):
            found.add(_identity(value))
        elif depth and isinstance(value, (dict, list, tuple)):
            found |= _tensors(*(value.values() if isinstance(value, dict) else value), depth=depth - 1)
    return found


def _identity(value) -> tuple:
    if isinstance(value, dict):
        return id(value), *sorted(id(patch) for patches in (value.get("patches") or {}).values() for patch in patches)
    if not torch.is_tensor(value):
        return (id(value),)
    return id(value), 0 if value.is_inference() else value._version


def _options_in(values: Iterable) -> dict:
    return next((value for value in values if isinstance(value, dict) and "cond_or_uncond" in value), {})


def _codes_of(thing) -> set[types.CodeType]:
    """All code that a callable may run itself, with the functions defined in it."""
    codes = [function.__code__ for part in parts_of(thing, set()) for function in _functions_of(part)]
    for code in codes:
        codes.extend(inner for inner in code.co_consts if isinstance(inner, types.CodeType))
    return set(codes)


def _functions_of(part) -> list[types.FunctionType]:
    if isinstance(part, types.FunctionType):
        return [part]
    if isinstance(part, (functools.partial, types.MethodType, types.BuiltinFunctionType)):
        return []
    return [value for cls in type(part).__mro__ for value in vars(cls).values() if isinstance(value, types.FunctionType)]

"""What else is on this model that is not the host's, and what does it need of us?

Other packs' code runs inside every window. What it may take for granted of plain sampling, and what is done about it:

- rows of a batch are images, or half of them the positive prompt: windows are run one at a time;
- the last call was about the same picture: caches known by name are refused, others once they answer from memory;
- there is one picture and it has one size: an error of its own about sizes is told with its name.

All this only where a run has several windows, or other ones from step to step. Code is the host's own by the file it
lies in, since the host loads its nodes under names that are paths.
"""
from __future__ import annotations

import functools
import logging
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import comfy.model_management
import comfy.samplers
from comfy.patcher_extension import WrappersMP

log = logging.getLogger(__name__)

HOST = Path(comfy.samplers.__file__).resolve().parent.parent
HOST_PACKAGES = frozenset({"comfy", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras"})
PACK = Path(__file__).resolve().parent
TORCH, PYTHON = Path(torch.__file__).resolve().parent, Path(sysconfig.get_paths()["stdlib"]).resolve()

# Caches by words, letters and digits only, in the names of their code and of what they put into transformer_options.
CACHES = {
    "teacache": "TeaCache", "rell1thresh": "TeaCache", "magcache": "MagCache", "magratios": "MagCache", "wavespeed": "WaveSpeed", "fbcache": "First Block Cache",
    "firstblockcache": "First Block Cache", "cachedit": "Cache-DiT", "dbcache": "DBCache", "dicache": "DiCache", "deepcache": "DeepCache",
    "meancache": "MeanCache", "taylorseer": "TaylorSeer", "sortblock": "Sortblock",
}
# The host has caches of these names, too, so names of code say nothing.
CACHES_IN_OPTIONS = CACHES | {"easycache": "another pack's EasyCache", "lazycache": "another pack's LazyCache"}

# Object patches that hold no picture and do the same to every row.
SAFE_OBJECTS = frozenset({"model_sampling", "latent_format"})

# Names of foreign things in one line.
NAMES_TOLD = 5

KINDS = {WrappersMP.APPLY_MODEL: "APPLY_MODEL wrapper", WrappersMP.DIFFUSION_MODEL: "DIFFUSION_MODEL wrapper"}

@dataclass(frozen=True, eq=False)
class Foreign:
    """Something on a model that is not the host's own. place: what it is, in the words of those who write such.

    wraps: it is called around the model. alone: what it does with rows cannot be seen from outside.
    """

    place: str
    thing: object
    wraps: bool = False
    alone: bool = True

    @property
    def name(self) -> str:
        return f"{self.place} ({name_of(self.thing)})"


@functools.lru_cache(maxsize=None)
def is_own(file: str) -> bool:
    """Whether a file is the host's or this pack's; custom nodes in the host's folder are neither."""
    if file.startswith("<"):  # made while running
        return False
    path = Path(os.path.realpath(file))
    if path.parent == PACK:
        return True
    if HOST not in path.parents:
        return False
    inside = path.relative_to(HOST).parts
    return len(inside) == 1 or inside[0] in HOST_PACKAGES


@functools.lru_cache(maxsize=None)
def is_library(file: str) -> bool:
    """Whether a file is torch's or Python's, which says nothing of whose code it serves."""
    path = Path(os.path.realpath(file))
    if PYTHON in path.parents and not {"site-packages", "dist-packages"} & set(path.relative_to(PYTHON).parts):
        return True
    return TORCH in path.parents


def is_foreign(thing) -> bool:
    """Whether a callable, or anything that it is made of, is neither the host's nor this pack's; true if nothing is known of it."""
    files = files_of(thing)
    return not files or not all(map(is_own, files))


def files_of(thing) -> set[str]:
    """The files of all code that a callable is made of, those of libraries left out."""
    return {file for part in parts_of(thing, set()) for file in _files_of(part) if not is_library(file)}


def parts_of(thing, seen: set) -> Iterator[object]:
    """A callable and the callables in it: what a partial calls, a method's function and owner, what a function closes over."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield thing
    for inner in _inner(thing):
        yield from parts_of(inner, seen)


def _inner(thing) -> Iterable[object]:
    if isinstance(thing, functools.partial):
        return filter(_is_code, (thing.func, *thing.args, *thing.keywords.values()))
    if isinstance(thing, types.MethodType):
        return thing.__func__, *(() if isinstance(thing.__self__, type) else (thing.__self__,))
    if isinstance(thing, types.FunctionType):
        return filter(_is_code, [*_closed_over(thing), *(thing.__defaults__ or ())])
    # A compiled module.
    return filter(None, [getattr(thing, "_orig_mod", None)]) if isinstance(thing, torch.nn.Module) else ()


def _is_code(value) -> bool:
    return callable(value) and not isinstance(value, (type, torch.nn.Module, torch.Tensor))


def _closed_over(function: types.FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _files_of(part) -> set[str]:
    """The files of a function's code, or of an object's classes."""
    if isinstance(part, (functools.partial, types.MethodType)):
        return set()
    if isinstance(part, types.FunctionType):
        return {part.__code__.co_filename}
    if isinstance(part, types.BuiltinFunctionType):
        return set()
    return {file for cls in type(part).__mro__ for file in (_file_of_class(cls), _file_of_method(cls, "__call__"), _file_of_method(cls, "forward")) if file}


def _file_of_class(cls: type) -> str | None:
    return getattr(sys.modules.get(cls.__module__), "__file__", None)


def _file_of_method(cls: type, name: str) -> str | None:
    method = vars(cls).get(name)
    return method.__code__.co_filename if isinstance(method, types.FunctionType) else None


def name_of(thing) -> str:
    """Module and qualified name, without the folders that the host puts in front of a custom node's."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    module = (getattr(owner, "__module__", None) or "").replace("\\", "/").rsplit("/", 1)[-1]
    return f"{module}.{owner.__qualname__}".strip(".")


def names_of(found: Iterable[Foreign]) -> str:
    """The names, each once, the first few of them."""
    names = list({name_of(one.thing): one.name for one in found}.values())
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(names[:NAMES_TOLD]) + more


def on_model(patcher, model) -> list[Foreign]:
    """What is foreign on a loaded model: patched objects, injections, and methods that were replaced."""
    objects = ((key, value) for key, value in patcher.object_patches.items() if callable(value) and key not in SAFE_OBJECTS)
    found = [Foreign(f"object patch {key!r}", value, wraps=True) for key, value in objects if is_foreign(value)]
    patched = {id(one.thing) for one in found}
    for key, injections in patcher.injections.items():
        found += [Foreign(f"injection {key!r}", one.inject) for one in injections if is_foreign(one.inject)]
    return found + [one for one in replaced_methods(model) if id(one.thing) not in patched]


def replaced_methods(model: torch.nn.Module) -> Iterator[Foreign]:
    """Methods of the host's modules that are not the host's any more, in an object or its class, and forward hooks."""
    classes = set()
    for module in model.modules():
        kind = type(module)
        classes.update(kind.__mro__)
        found = [(f"forward hook on {kind.__name__}", hook) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
        found += [(f"replaced {kind.__name__}.{name}", value) for name, value in vars(module).items() if callable(value) and callable(getattr(kind, name, None))]
        yield from (Foreign(place, value, wraps=True) for place, value in found if _is_changed(value))
    for cls in classes:
        if is_own(_file_of_class(cls) or ""):
            methods = ((name, value) for name, value in vars(cls).items() if isinstance(value, types.FunctionType) and not name.startswith("__"))
            yield from (Foreign(f"replaced {cls.__name__}.{name}", value, wraps=True) for name, value in methods if _is_changed(value))


def _is_changed(method) -> bool:
    return not all(map(is_own, files_of(method)))


def in_call(model_options: dict, conds: Iterable[Sequence[dict] | None]) -> Iterator[Foreign]:
    """What is foreign in the options of one call, and in its conditionings' hooks."""
    wrapper = model_options.get("model_function_wrapper")
    if wrapper is not None and is_foreign(wrapper):
        yield Foreign("model_function_wrapper", wrapper, wraps=True)
    yield from _in_transformer_options(model_options.get("transformer_options", {}))
    for entry in (entry for entries in conds for entry in entries or ()):
        for hook in getattr(entry.get("hooks"), "hooks", ()):
            yield from _in_transformer_options(getattr(hook, "transformers_dict", None) or {}, " of a conditioning's hook")


def _in_transformer_options(options: dict, where: str = "") -> Iterator[Foreign]:
    for place, patches in options.get("patches", {}).items():
        for patch in patches:
            for part in patch if isinstance(patch, tuple) else (patch,):
                if is_patch(part) and is_foreign(part):
                    yield Foreign(f"patch {place!r}{where}", part, alone=part is not patch)
    for place, patches in options.get("patches_replace", {}).items():
        yield from (Foreign(f"patches_replace {place!r} {block}{where}", patch) for block, patch in patches.items() if is_foreign(patch))
    override = options.get("optimized_attention_override")
    if override is not None and is_foreign(override):
        yield Foreign(f"optimized_attention_override{where}", override)
    for kind, title in KINDS.items():
        for key, wrappers in options.get("wrappers", {}).get(kind, {}).items():
            yield from (Foreign(f"{title} {key!r}{where}", one, wraps=True, alone=bool(where)) for one in wrappers if is_foreign(one))


def is_patch(part) -> bool:
    return callable(part) and not isinstance(part, type)


def known_cache(found: Iterable[Foreign], options: dict) -> tuple[str, str] | None:
    """The first cache that its names give away, and where it is."""
    for one in found:
        title = _cache_in(CACHES, one.name, *(_place_of(file) for file in files_of(one.thing) if not is_own(file)))
        if title is not None:
            return title, one.name
    for key, value in options.items():
        title = _cache_in(CACHES_IN_OPTIONS, str(key))
        if title is not None and is_foreign(value):
            return title, f"transformer_options {key!r}"
    return None


def _cache_in(words: dict[str, str], *texts: str) -> str | None:
    letters = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in texts]
    return next((title for word, title in words.items() if any(word in text for text in letters)), None)


def _place_of(file: str) -> str:
    """A custom node's file in its pack; of any other file the name alone, since folders above may be called anything."""
    parts = Path(file).parts
    return "/".join(parts[parts.index("custom_nodes") + 1:]) if "custom_nodes" in parts else parts[-1]

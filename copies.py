"""How is an object of another pack copied, with something that it holds replaced? Knows neither tensors nor the host.

What such objects hold is found by looking into containers, attributes, bound methods, functools.partial, closures and
default arguments. Only what leads to a replacement is copied, anything else stays shared with the original; the
original is never changed. Whatever shares an object shares its copy.
"""
from __future__ import annotations

import copy as shallow
import enum
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator

# Deeper lies nothing that belongs to one patch or control.
DEEPEST = 10

PLAIN = (type(None), bool, int, float, complex, str, bytes)

# Nothing lies in these, or nothing of a pack's own.
CLOSED = (*weakref.ProxyTypes, *PLAIN, type, types.ModuleType)
CLOSED_MODULES = ("builtins", "_thread", "enum", "io", "logging", "re", "threading", "torch", "numpy")

Part = tuple[str, object]


def parts(value) -> list[Part]:
    """What an object is made of, each with its name; "" where it has none of its own."""
    for kind, (find, _) in KINDS.items():
        if isinstance(value, kind):
            return find(value)
    return [] if is_closed(value) else _attributes(value)


def reachable(root, closed: tuple[type, ...] = ()) -> Iterator[object]:
    """An object and all that it holds, each once; `closed` types are not looked into."""
    seen, todo = {id(root)}, [(0, root)]
    while todo:
        depth, value = todo.pop()
        yield value
        inside = [] if isinstance(value, closed) or depth > DEEPEST else [part for _, part in parts(value)]
        for part in inside:
            if id(part) not in seen:
                seen.add(id(part))
                todo.append((depth + 1, part))


def are_copies(first, second, depth: int = 0) -> bool:
    """Whether two objects are one, or of one type and made of equal plain values and of the same objects, so that one may stand for both."""
    if first is second:
        return True
    if type(first) is not type(second) or depth > DEEPEST:
        return False
    if isinstance(first, PLAIN):
        return first == second
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(are_copies(*pair, depth + 1) for pair in zip(first, second))
    if not isinstance(first, dict):
        if isinstance(first, tuple(KINDS)) or is_closed(first) or _slots(first) or not hasattr(first, "__dict__"):
            return False
        first, second = vars(first), vars(second)
    return first.keys() == second.keys() and all(are_copies(first[key], second[key], depth + 1) for key in first)


def rebuilt(value, new: Callable[[object], object], begun: Callable[[object], None]):
    """A copy of an object whose parts are new(part). begun(copy) is told of a copy that is still to be filled."""
    for kind, (_, make) in KINDS.items():
        if isinstance(value, kind):
            return make(value, new, begun)
    return _rebuilt_object(value, new, begun)


def is_closed(value) -> bool:
    """True for what is not looked into: plain values, and objects of libraries."""
    return isinstance(value, CLOSED) or isinstance(value, enum.Enum) or str(type(value).__module__).split(".")[0] in CLOSED_MODULES


class Copies:
    """Copies of objects, made once each.

    replaced(path, value): what takes the place of a value, or None. path: the names that lead to it from the object that
    was asked for. is_copied(value): True for what is copied whatever lies in it. finish(value, copy): completes a copy.
    closed: further types that are not looked into. Raises TypeError if something that would have to be copied cannot be.
    """

    def __init__(
        self, replaced: Callable, is_copied: Callable = lambda value: False, finish: Callable = lambda value, copy: None, closed: tuple[type, ...] = (),
    ):
        self.replaced, self.is_copied, self.finish, self.closed = replaced, is_copied, finish, closed
        # With the originals, so that no other object gets their identity.
        self.made: dict[int, tuple[object, object]] = {}

    def of(self, root, name: str = ""):
        """The copy of an object, or itself if nothing in it is replaced."""
        if id(root) not in self.made:
            copy = self._build(root, self._changed(root, name))
            self.made.setdefault(id(root), (root, copy))
        return self.made[id(root)][1]

    def _changed(self, root, name: str) -> set[int]:
        """All that leads to a replacement, found from the root; replacements are in `made`."""
        holders: dict[int, set[int]] = {id(root): set()}
        found = [id(root)] if self._is_changed((name,), root) else []
        todo = [((name,), root)]
        while todo:
            path, value = todo.pop(0)
            if id(value) in self.made or len(path) > DEEPEST or isinstance(value, self.closed):
                continue
            for label, part in parts(value):
                if isinstance(part, CLOSED):
                    continue
                if self._is_changed((*path, label), part):
                    found.append(id(part))
                if id(part) not in holders:
                    todo.append(((*path, label), part))
                holders.setdefault(id(part), set()).add(id(value))
        return _with_holders(found, holders)

    def _is_changed(self, path: tuple[str, ...], value) -> bool:
        if id(value) not in self.made:
            new = self.replaced(path, value)
            if new is None:
                return self.is_copied(value)
            self.made[id(value)] = value, new
        return self.made[id(value)][1] is not value

    def _build(self, value, changed: set[int]):
        if id(value) in self.made:
            return self.made[id(value)][1]
        if id(value) not in changed:
            return value
        # What a cycle leads back to is begun before its parts are there, and kept.
        copy = rebuilt(value, lambda part: self._build(part, changed), lambda begun: self.made.setdefault(id(value), (value, begun)))
        copy = self.made.setdefault(id(value), (value, copy))[1]
        self.finish(value, copy)
        return copy


def _with_holders(found: list[int], holders: dict[int, set[int]]) -> set[int]:
    changed, todo = set(), list(found)
    while todo:
        number = todo.pop()
        if number not in changed:
            changed.add(number)
            todo += holders.get(number, ())
    return changed


def _attributes(value) -> list[Part]:
    """Those in an object's dictionary and slots. A network's layers are none of them."""
    inside = {name: part for name, part in getattr(value, "__dict__", {}).items() if name not in ("_modules", "_parameters")}
    for name in _slots(value):
        if hasattr(value, name):
            inside[name] = getattr(value, name)
    return list(inside.items())


def _slots(value) -> list[str]:
    found = []
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _rebuilt_object(value, new, begun):
    """Past __init__, __setattr__ and __copy__ of its class, any of which may do more than copy."""
    try:
        copy = object.__new__(type(value))
    except TypeError as error:  # of a class that is written in C
        copy = shallow.copy(value)
        if copy is value:
            raise TypeError(f"{type(value).__name__} cannot be copied") from error
    begun(copy)
    if hasattr(value, "__dict__"):
        copy.__dict__.update({name: new(part) for name, part in value.__dict__.items()})
    for name in _slots(value):
        if hasattr(value, name):
            object.__setattr__(copy, name, new(getattr(value, name)))
    return copy


def _parts_of_dict(value: dict) -> list[Part]:
    return [(key if isinstance(key, str) else "", part) for key, part in value.items()]


def _rebuilt_dict(value: dict, new, begun):
    copy = shallow.copy(value)
    begun(copy)
    copy.update({key: new(part) for key, part in value.items()})
    return copy


def _rebuilt_list(value: list, new, begun):
    copy = shallow.copy(value)
    begun(copy)
    copy[:] = [new(part) for part in value]
    return copy


def _parts_of_tuple(value: tuple) -> list[Part]:
    return list(zip(getattr(value, "_fields", [""] * len(value)), value))


def _rebuilt_tuple(value: tuple, new, begun):
    items = [new(part) for part in value]
    return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)


def _parts_of_method(value: types.MethodType) -> list[Part]:
    return [("", value.__self__), ("", value.__func__)]


def _rebuilt_method(value: types.MethodType, new, begun):
    return types.MethodType(new(value.__func__), new(value.__self__))


def _parts_of_partial(value: functools.partial) -> list[Part]:
    return [("", value.func), *zip(_argument_names(value.func, len(value.args)), value.args), *value.keywords.items()]


def _argument_names(function, count: int) -> list[str]:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    return [*names, *[""] * count][:count]


def _rebuilt_partial(value: functools.partial, new, begun):
    return type(value)(new(value.func), *map(new, value.args), **{name: new(part) for name, part in value.keywords.items()})


def _parts_of_function(value: types.FunctionType) -> list[Part]:
    """Its free variables, and what its arguments have for a default."""
    code, defaults = value.__code__, value.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults):code.co_argcount]
    return [*zip(code.co_freevars, value.__closure__ or ()), *zip(names, defaults), *(value.__kwdefaults__ or {}).items(), *value.__dict__.items()]


def _rebuilt_function(value: types.FunctionType, new, begun):
    defaults = value.__defaults__ and tuple(map(new, value.__defaults__))
    cells = value.__closure__ and tuple(map(new, value.__closure__))
    copy = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, cells)
    copy.__kwdefaults__ = value.__kwdefaults__ and {name: new(part) for name, part in value.__kwdefaults__.items()}
    copy.__qualname__, copy.__module__, copy.__doc__ = value.__qualname__, value.__module__, value.__doc__
    copy.__dict__.update({name: new(part) for name, part in value.__dict__.items()})
    return copy


def _parts_of_cell(value: types.CellType) -> list[Part]:
    try:
        return [("", value.cell_contents)]
    except ValueError:  # its variable is not assigned yet
        return []


def _rebuilt_cell(value: types.CellType, new, begun):
    copy = types.CellType()
    begun(copy)
    copy.cell_contents = new(value.cell_contents)
    return copy


def _rebuilt_super(value: super, new, begun):
    return super(value.__thisclass__, new(value.__self__))


def _rebuilt_reference(value: weakref.ReferenceType, new, begun):
    return weakref.ref(new(value()))


# How each kind of object is looked into and copied; a subclass of a container is one.
KINDS: dict[type, tuple[Callable, Callable]] = {
    dict: (_parts_of_dict, _rebuilt_dict),
    list: (lambda value: [("", part) for part in value], _rebuilt_list),
    tuple: (_parts_of_tuple, _rebuilt_tuple),
    types.MethodType: (_parts_of_method, _rebuilt_method),
    functools.partial: (_parts_of_partial, _rebuilt_partial),
    types.FunctionType: (_parts_of_function, _rebuilt_function),
    types.CellType: (_parts_of_cell, _rebuilt_cell),
    super: (lambda value: [("", value.__self__)], _rebuilt_super),
    weakref.ReferenceType: (lambda value: [("", value())], _rebuilt_reference),
}

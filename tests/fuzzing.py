"""Seeded cases, what is wrong with one, and the smallest that is wrong in the same way.

A case is a frozen dataclass of plain values whose defaults are the simplest there are; a check raises for one that breaks
what has to hold.
"""
from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator


class Broken(AssertionError):
    """What had to hold and does not, in words; what follows a colon may differ from case to case."""


class Unproven(Exception):
    """A case that proves nothing: the host cannot do it by itself either."""


def hold(condition, what: str) -> None:
    if not bool(condition):
        raise Broken(what)


def refused(action: Callable, name: str, what: str) -> None:
    """Raise Broken unless the action raises the pack's ValueError, which begins with the name."""
    try:
        action()
    except ValueError as problem:
        hold(str(problem).removeprefix("Quadtree Tiled Diffusion, ").startswith(name), f"refused by name: {what}: {problem}")
    else:
        raise Broken(f"refused: {what}")


def failure(case, check: Callable) -> str | None:
    """What is wrong with a case; None if nothing is."""
    try:
        check(case)
    except Unproven:
        return None
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def kind_of(found: str | None) -> str | None:
    """A failure without what depends on the numbers in it."""
    return found and re.sub(r"\d.*", "", ":".join(found.split(":")[:2]))[:60]


def simpler(case) -> Iterator:
    """The case with one value changed: to its default, half way there, or with a part left out."""
    for field in dataclasses.fields(case):
        value, plain = getattr(case, field.name), field.default
        found = [] if value == plain else [plain]
        if isinstance(value, tuple):
            found += [value[:place] + value[place + 1:] for place in range(len(value))]
        if type(value) is int and abs(value - plain) > 1:
            found += [(value + plain) // 2, value - 8 if value - 8 > plain else value - 1]
        for other in found:
            yield dataclasses.replace(case, **{field.name: other})


def smallest(case, check: Callable, tries: int = 150):
    """The case made simpler, a value at a time, as long as it fails alike."""
    kind, left = kind_of(failure(case, check)), tries
    options = simpler(case)
    while left and (other := next(options, None)) is not None:
        left -= 1
        if kind_of(failure(other, check)) == kind:
            case, options = other, simpler(other)
    return case


def changed(case) -> str:
    """The case as code, its defaults left out."""
    values = ((field.name, getattr(case, field.name)) for field in dataclasses.fields(case) if getattr(case, field.name) != field.default)
    return f"{type(case).__name__}({', '.join(f'{name}={value!r}' for name, value in values)})"


def pick(draw: random.Random, *options):
    return draw.choice(options)


def some_length(draw: random.Random, least: int, most: int) -> int:
    """Small ones as often as large ones."""
    return round(least * (most / least) ** draw.random())

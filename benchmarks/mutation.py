"""Do our own tests see a line that is wrong? One line at a time is changed in a copy of the pack, and its tests are run there."""
from __future__ import annotations

import ast
import contextlib
import copy
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

AMOUNT = 60
SEED = 15

# Seconds of the processor for one file of tests; what takes longer is a loop without an end.
LIMIT_S = 600

# So many of the cases of each test are tried first, which is enough for most mutants.
FEW = 2

# The tests of a module, the narrowest first; then what is tried if they see nothing. Others have those of their own name, if any.
TESTS = {
    "blending": ("windows", "spot_diffusion", "tiled_diffusion"),
    "canvas": ("conditioning", "control", "wrap", "foreign_controls", "foreign_masks"),
    "clock": ("clock", "foreign_samplers"),
    "compositing": ("compositing", "quadtree"),
    "conditioning": ("conditioning", "prompts", "wrap"),
    "control": ("control", "foreign_controls"),
    "copies": ("foreign_controls", "foreign_masks"),
    "cover": ("windows", "cost", "wrap"),
    "decode": ("decode",),
    "decode_plan": ("decode",),
    "decoders": ("decode",),
    "denoise_schedule": ("denoise_schedule", "tiled_diffusion"),
    "devices": ("devices",),
    "drawing": ("drawing", "quadtree"),
    "finite": ("faults",),
    "foreign": ("foreign_wrappers", "foreign_controls"),
    "layout": ("layout",),
    "loading": ("devices",),
    "masks": ("foreign_masks",),
    "memory": ("devices", "faults"),
    "model_facts": ("model_facts", "tiled_diffusion", "devices"),
    "network_work": ("model_facts", "cost"),
    "nodes": ("nodes", "preview", "decode", "memory"),
    "outcome": ("tiled_diffusion", "sampler_nodes", "foreign_samplers", "faults"),
    "painting": ("painting", "preview"),
    "patches": ("model_patches", "foreign_wrappers", "foreign_masks", "control"),
    "piecewise": ("decode",),
    "placement": ("placement", "compositing"),
    "preview": ("preview", "route"),
    "prompts": ("prompts",),
    "reach": ("prompts",),
    "quadtree": ("quadtree", "best_tree"),
    "refusals": ("tiled_diffusion", "sampler_nodes", "foreign_wrappers"),
    "region_nodes": ("region_nodes",),
    "regions": ("regions", "region_nodes"),
    "sampling_run": ("tiled_diffusion", "sampler_nodes", "foreign_samplers", "control", "spot_diffusion"),
    "settings": ("tiled_diffusion", "tones", "layout"),
    "strengths": ("strengths", "quadtree"),
    "tiled_diffusion": ("tiled_diffusion", "spot_diffusion", "sampler_nodes", "conditioning", "devices", "faults"),
    "tones": ("tones",),
    "utils": ("utils", "quadtree", "windows", "conditioning", "decode"),
    "watch": ("foreign_wrappers",),
    "wiring": ("memory", "host_seams"),
    "windows": ("windows", "wrap", "cost"),
}
WIDER = ("tiled_diffusion", "fuzz")

# What no test can see, and why: by module, function and change.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("clock", "_compare", "abs(ratio - 1) < 0.001 -> (abs(ratio - 1) <= 0.001)"): "no quotient of two sigmas is a thousandth off to the last bit",
    ("conditioning", "_in_proportion", "split > 1 -> (split >= 1)"): "a tensor repeated once is itself",
    ("denoise_schedule", "on_steps", "strength > 0 -> (strength >= 0)"): "the step that 0 would be raised to is 0",
    ("utils", "_spans_in_window", "0 -> 1"): "of a window that begins at 0 both ways say the same",
}

# A process's own copy of the pack; see copy_pack.
TREE: Path | None = None

SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And}
NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "minimum": "maximum", "maximum": "minimum", "floor": "ceil", "ceil": "floor", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change. first, last: of what it takes the place of, (line, column), as ast counts them."""

    module: str
    function: str
    first: tuple[int, int]
    last: tuple[int, int]
    before: str
    after: str

    @property
    def change(self) -> str:
        return f"{self.before} -> {self.after}"

    def applied(self, source: str) -> str:
        lines = source.encode().splitlines(keepends=True)
        (row, start), (last_row, end) = self.first, self.last
        joined = lines[row - 1][:start] + self.after.encode() + lines[last_row - 1][end:]
        return b"".join([*lines[:row - 1], joined, *lines[last_row:]]).decode()


def modules() -> list[str]:
    """What holds the pack's logic."""
    return sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("__init__", "run"))


def tests_of(module: str) -> list[str]:
    """The files of tests that are asked, one after another, without their test_ and .py."""
    names = TESTS.get(module, (module,))
    return [name for name in dict.fromkeys((*names, *WIDER)) if (ROOT / "tests" / f"test_{name}.py").exists()]


def mutants_of(file: Path) -> list[Mutant]:
    """All changes of the logic of a module: what is in functions, but for messages, logs and the nodes' schemas."""
    found = []
    tree = ast.parse(file.read_text("utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name != "define_schema":
            for statement in function.body:
                found += [_mutant(file.stem, function.name, *pair) for pair in _changes(statement)]
    return list({(mutant.first, mutant.after): mutant for mutant in found}.values())


def _mutant(module: str, function: str, node: ast.AST, after: ast.AST) -> Mutant:
    text = ast.unparse(after)
    text = f"({text})" if isinstance(after, ast.expr) and not isinstance(after, (ast.Constant, ast.Call)) else text
    return Mutant(module, function, (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset), ast.unparse(node), text)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """What may be changed in a node and all in it, and into what."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.FunctionDef, ast.Assert)) or "log." in ast.unparse(node)[:4]:
        return
    yield from ((node, other) for other in _instead(node))
    for name, child in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from _changes(part)


def _instead(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield _with(node, ops=[SWAPPED[type(node.ops[0])]()])
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED and not _is_text_or_list(node):
        yield _with(node, op=SWAPPED[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    if type(getattr(node, "value", None)) is int and isinstance(node, ast.Constant):
        yield ast.Constant(node.value + 1)
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in NAMES:
        key = "id" if isinstance(node.func, ast.Name) else "attr"
        yield _with(node, func=_with(node.func, **{key: NAMES[getattr(node.func, key)]}))
    if isinstance(node, ast.IfExp):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()
    if isinstance(node, ast.Return) and not isinstance(node.value, (ast.Constant, type(None))):
        yield ast.Return(ast.Constant(None))


def _with(node: ast.AST, **changed) -> ast.AST:
    other = copy.copy(node)
    for name, value in changed.items():
        setattr(other, name, value)
    return other


def _is_text_or_list(node: ast.AST) -> bool:
    return any(isinstance(part, (ast.List, ast.Tuple, ast.JoinedStr, ast.ListComp)) or isinstance(getattr(part, "value", None), str) for part in ast.iter_child_nodes(node))


def picked(amount: int = AMOUNT, seed: int = SEED) -> list[Mutant]:
    """One mutant of every module and, for the rest, of modules by how much there is to change; no two of one line."""
    draw = random.Random(seed)
    by_module = {name: mutants_of(ROOT / f"{name}.py") for name in modules()}
    pool = [mutant for mutants in by_module.values() for mutant in draw.sample(mutants, len(mutants))]
    ordered = [draw.choice(mutants) for mutants in by_module.values()] + draw.sample(pool, len(pool))
    found: dict = {}
    for mutant in ordered:
        if len(found) < amount:
            found.setdefault((mutant.module, mutant.first[0]), mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.module, mutant.first))


class Few:
    """For pytest: only some of the cases of each test, from the first to the last."""

    def pytest_collection_modifyitems(self, items: list) -> None:
        by_test: dict[str, list] = {}
        for item in items:
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
        items[:] = [item for cases in by_test.values() for item in cases[::max(len(cases) // FEW, 1)][:FEW]]


def run_tests(tree: Path, name: str, *plugins) -> str | None:
    """Run a file of tests of a copy of the pack in a process that has the host already: what failed first, or None."""
    log = tree / "outcome.txt"
    child = os.fork()
    if not child:
        _in_child(tree, name, log, plugins)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"test_{name}: no end within {LIMIT_S} s"
    if os.WEXITSTATUS(status) == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text("utf-8", errors="replace"), re.MULTILINE)
    return failed[1].partition("[")[0].removeprefix("tests/") if failed else f"test_{name}"


def _in_child(tree: Path, name: str, log: Path, plugins: tuple) -> None:
    """Run pytest on the copy, with nothing of the pack in memory, and end."""
    import resource

    with contextlib.suppress(Exception):
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
        os.chdir(tree)
        sys.dont_write_bytecode = True
        sys.path[:] = [entry for entry in sys.path if not Path(entry or ".").resolve().is_relative_to(ROOT)]
        for module in [module for module, value in sys.modules.items() if str(getattr(value, "__file__", None) or "").startswith(f"{ROOT}{os.sep}")]:
            del sys.modules[module]
        import pytest

        code = pytest.main(["-c", "tests/pytest.ini", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", f"tests/test_{name}.py"], plugins)
        os._exit(int(code))
    os._exit(99)


def outcome_of(mutant: Mutant, tree: Path) -> str | None:
    """The test that sees a mutant, or None. tree: a copy of the pack, which is left as it was."""
    file = tree / f"{mutant.module}.py"
    source = file.read_text("utf-8")
    file.write_text(mutant.applied(source), "utf-8")
    try:
        names = tests_of(mutant.module)
        tries = [(name, Few()) for name in names] + [(name,) for name in names]
        return next((seen for asked in tries if (seen := run_tests(tree, *asked)) is not None), None)
    finally:
        file.write_text(source, "utf-8")


def preload_host() -> None:
    """Import what tests import of the host, so that each child has it."""
    import _pytest.assertion.rewrite  # noqa: F401
    import comfy.controlnet  # noqa: F401
    import comfy.sample  # noqa: F401
    import comfy.sd  # noqa: F401
    import nodes  # noqa: F401
    import skimage.data  # noqa: F401


def row_of(mutant: Mutant) -> tuple[str, int, str]:
    """Try a mutant in this process's own copy of the pack."""
    seen = outcome_of(mutant, TREE)
    why = EQUIVALENT.get((mutant.module, mutant.function, mutant.change))
    change = mutant.change.replace("|", "/").replace("\n", " ")[:140]
    row = f"`{mutant.module}.{mutant.function}`: `{change}`", 1, f"caught by {seen}" if seen else f"not caught: {why or 'open'}"
    print(row, flush=True)
    return row


def fails_unchanged(name: str) -> str | None:
    """What fails in a file of tests although nothing was changed: in a copy it could not tell anything of a mutant."""
    return run_tests(TREE, name, Few())


def copy_pack(folder: str) -> None:
    """Give this process a copy of the pack."""
    global TREE
    TREE = Path(tempfile.mkdtemp(dir=folder)) / "pack"
    shutil.copytree(ROOT, TREE, ignore=shutil.ignore_patterns(".git", "shared", "__pycache__", "*.png"), symlinks=True)


def mutation_part() -> list[tuple[str, int, str]]:
    """One line of the pack's logic is changed at a time; its tests have to fail."""
    preload_host()
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    mutants = picked()
    names = sorted({name for mutant in mutants for name in tests_of(mutant.module)})
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(workers, copy_pack, (folder,)) as pool:
        if failed := [seen for seen in pool.map(fails_unchanged, names, chunksize=1) if seen]:
            raise AssertionError(f"these fail in an unchanged copy: {', '.join(failed)}")
        rows = pool.map(row_of, mutants, chunksize=1)
    caught = sum(outcome.startswith("caught") for *_, outcome in rows)
    return [("lines of the pack's logic, changed one at a time", len(rows), f"{caught} caught by the module's tests"), *rows]

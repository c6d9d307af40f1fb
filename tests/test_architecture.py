"""What each module may know, and that importing the pack changes nothing."""
from __future__ import annotations

import ast
import subprocess
import sys
import types
from pathlib import Path

import comfy.controlnet
import comfy.gligen
import comfy.k_diffusion.sampling
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy_extras.nodes_sag
import latent_preview
import nodes as host_nodes
import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST_MODULES = (
    comfy.samplers, comfy.sample, comfy.sampler_helpers, comfy.model_base, comfy.model_patcher, comfy.controlnet, comfy.gligen,
    comfy.k_diffusion.sampling, comfy_extras.nodes_sag, latent_preview, host_nodes)
SHIPPED = sorted(path for path in ROOT.glob("*.py") if path.name != "run.py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def functions_of(module: types.ModuleType) -> dict[str, int]:
    """The identity of every function and method of a module."""
    found = {name: id(value) for name, value in vars(module).items() if callable(value)}
    for name, value in vars(module).items():
        if isinstance(value, type):
            found |= {f"{name}.{method}": id(function) for method, function in vars(value).items() if callable(function)}
    return found


# What needs no host, and what of the pack it may know.
PURE = {
    "utils": set(), "copies": set(), "denoise_schedule": set(), "clock": {"denoise_schedule"}, "quadtree": {"utils"},
    "placement": {"quadtree", "utils"}, "strengths": {"placement", "quadtree", "utils"}, "painting": {"placement", "quadtree", "utils"},
    "drawing": {"quadtree", "utils"}, "compositing": {"placement", "quadtree", "utils"}, "cover": set(), "windows": {"cover", "utils"}, "blending": {"utils", "windows"},
    "network_work": {"windows"},
}
OUTSIDE = {
    "__future__", "copy", "enum", "fractions", "functools", "inspect", "itertools", "json", "math", "dataclasses", "collections.abc", "torch",
    "re", "torch.nn.functional", "types", "weakref"}


@pytest.mark.parametrize("name", PURE)
def test_the_pure_modules_know_torch_and_little_else(name):
    assert imports(ROOT / f"{name}.py") - OUTSIDE <= {f".{other}" for other in PURE[name]}


def test_the_pure_modules_import_without_a_host():
    names = ", ".join(f"pack.{name}" for name in PURE)
    code = f"import sys, types; pack = types.ModuleType('pack'); pack.__path__ = [sys.argv[1]]; sys.modules['pack'] = pack; import {names}; assert not any(name.split('.')[0] == 'comfy' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, cwd=ROOT.parent)


def test_modules_import_each_other_in_one_direction():
    knows = {path.stem: {name[1:] for name in imports(path) if name.startswith(".") and len(name) > 1} for path in SHIPPED}
    while knows:
        first = {name for name, others in knows.items() if not others & knows.keys()}
        assert first, f"in a circle: {sorted(knows)}"
        knows = {name: others for name, others in knows.items() if name not in first}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_no_file_of_the_pack_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.short
def test_importing_and_loading_the_pack_changes_no_function_of_the_host():
    import asyncio

    from conftest import load_module
    before = [functions_of(module) for module in HOST_MODULES]
    pack = load_module("qtd_pack_again", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    extension = asyncio.run(pack.comfy_entrypoint())
    assert len(asyncio.run(extension.get_node_list())) == 10
    assert [functions_of(module) for module in HOST_MODULES] == before


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_ascii_print_nothing_and_assign_nothing_to_the_host(path):
    text = path.read_text()
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print")
        if isinstance(node, ast.Assign):
            assert not any(ast.unparse(target).startswith(("comfy.", "nodes.", "torch.")) for target in node.targets)


@pytest.mark.parametrize("path", sorted(set(ROOT.rglob("*.py"))), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_50_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, f"{node.name} in {path.name}"

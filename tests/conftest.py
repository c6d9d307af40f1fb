"""Gives every test a real ComfyUI on the CPU and the pack, loaded as the host loads it.

Done while this file is imported, so that test modules can begin with `from qtd_pack.quadtree import build_quadtree`.
"""
from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest

pytest_plugins = ["browser_tools"]

ROOT = Path(__file__).resolve().parent.parent
BASE = Path(tempfile.mkdtemp(prefix="qtd-tests-"))


def load_module(name: str, file: Path, **spec_arguments):
    """Import a file under a name of our own; its folder stays off sys.path."""
    spec = importlib.util.spec_from_file_location(name, file, **spec_arguments)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


host_server = load_module("host_server", ROOT / "demo" / "host_server.py")


def host_folder() -> Path:
    host = Path(os.environ.get("COMFYUI_DIR", ""))
    if not (host / "main.py").is_file():
        pytest.exit("COMFYUI_DIR does not name a ComfyUI. Use `python run.py test`, which sets it.", returncode=4)
    return host


def import_host(host: Path) -> None:
    """Make the host importable. Its arguments are read when its modules are imported, so they come first."""
    # The pack's root would shadow the host's `nodes` and `utils`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.path.insert(0, str(host))
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True  # what the host uses on CUDA; its default on the CPU is several times slower
    args.base_directory = str(host_server.make_base(BASE))
    import comfy.model_management  # noqa: F401


HOST = host_folder()
import_host(HOST)
load_module("qtd_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])

import numpy  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other cost more than they bring


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Tests in browsers come last: a page that stays open takes its share of the processor from all that follow."""
    items.sort(key=lambda item: "browser" in getattr(item, "fixturenames", ()))


def pytest_unconfigure():
    shutil.rmtree(BASE, ignore_errors=True)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_dead_stays_loaded():
    """The host holds on to clones that are gone, as long as their weights live, and fails on them when it next encodes a hint."""
    yield
    from device_keys import forget_the_dead
    forget_the_dead()


@pytest.fixture
def models_load_in_turn(monkeypatch):
    """For tests with threads: the host's list of loaded models is not safe between them."""
    import comfy.model_management as management

    load, lock = management.load_models_gpu, threading.Lock()

    def alone(*args, **kwargs):
        with lock:
            return load(*args, **kwargs)
    monkeypatch.setattr(management, "load_models_gpu", alone)


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    """The folder of ComfyUI's main.py."""
    return HOST


@pytest.fixture(scope="session")
def server(comfyui_dir, tmp_path_factory):
    """One real server with the pack in it, on the CPU, shared by all tests that ask for it."""
    with host_server.HostServer(comfyui_dir, tmp_path_factory.mktemp("server")) as running:
        yield running

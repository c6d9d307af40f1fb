"""How are things measured here? The host, medians of interleaved repetitions, and tables."""
from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def load_module(name: str, file: Path, **spec_arguments):
    """A module under a name of its own, so that its folder stays off sys.path."""
    spec = importlib.util.spec_from_file_location(name, file, **spec_arguments)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_host() -> None:
    """Make the host and the pack importable. The host's arguments are read when its modules are imported."""
    # The pack's root would shadow the host's `nodes` and `utils`.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    from comfy.cli_args import args

    args.cpu = not torch.accelerator.is_available()
    args.use_pytorch_cross_attention = True  # what the host uses on CUDA
    args.base_directory = tempfile.mkdtemp(prefix="qtd-bench-")
    load_module("qtd_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.path.append(str(ROOT / "tests"))  # the small models


def medians(actions: dict[str, Callable], repetitions: int) -> dict[str, float]:
    """Median seconds of each action; one of each in turn, so that a busy machine is busy for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repetitions):
        for name, action in actions.items():
            seconds[name].append(timed(action))
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(action: Callable) -> float:
    """Seconds; with one thread on a CPU those of the processor, which other programs do not lengthen."""
    clock = time.process_time if uses_processor_time() else time.perf_counter
    synchronize()
    start = clock()
    action()
    synchronize()
    return clock() - start


def uses_processor_time() -> bool:
    return torch.get_num_threads() == 1 and not torch.accelerator.is_available()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def parsed(words: list[str], about: str, parts: Sequence[str], *flags: str) -> argparse.Namespace:
    """The command line of parts to be measured, with --threads, which are set, and flags; an error for a part that there is not."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--threads", type=int, default=1)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    torch.set_num_threads(arguments.threads)
    return arguments


def with_section(results: str, section: str) -> str:
    """The results with one section, from its heading to the next, in the place of what had that heading, or at the end."""
    heading = section.partition("\n")[0]
    before, found, after = results.partition(heading + "\n")
    following = re.search(r"^## ", after, re.MULTILINE)
    rest = after[following.start():] if following else ""
    return f"{before.rstrip()}\n\n{section.rstrip()}\n" + (f"\n{rest}" if rest else "")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def busy() -> str:
    """A sentence on the machine's load, empty where there is none to be had."""
    return f"The machine's load was {os.getloadavg()[0]:.0f} at the end." if hasattr(os, "getloadavg") else ""


def machine() -> str:
    """One paragraph: the date, the machine and the versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text("utf-8").splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    load = f", load {os.getloadavg()[0]:.1f} when it began" if hasattr(os, "getloadavg") else ""
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC. {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} of them used{load}; {gpu}. "
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}. "
        f"Times are {'processor seconds of one thread' if uses_processor_time() else 'seconds of the clock'}.\n")

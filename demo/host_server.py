"""A real ComfyUI server with this pack in it, for the demo, the benchmarks and the tests.

Standard library only: it drives the server through its HTTP API, from whatever Python starts it.
"""
from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
PACK_NAME = "quadtree-tiled-diffusion"


class HostError(RuntimeError):
    """The server did not start, refused a graph, or a node of the graph failed."""


def link_pack(custom_nodes: Path) -> None:
    """Put the pack into custom_nodes by a link, in place of a link to another clone."""
    link = custom_nodes / PACK_NAME
    if link.exists() and link.samefile(ROOT):
        return
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except FileExistsError:  # another run was quicker
        if not (link.exists() and link.samefile(ROOT)):
            raise
    except OSError:
        if os.name != "nt":
            raise
        # Windows lets only privileged users make symbolic links, but everyone make junctions.
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))


def make_base(folder: Path) -> Path:
    """Make folder a base directory for the host, with the pack among its custom nodes.

    It holds custom_nodes.yaml too, which adds the pack to a host that keeps its own base directory.
    """
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    link_pack(folder / "custom_nodes")
    # JSON is YAML, with quotes around a path of any spelling.
    extra = {"quadtree_tiled_diffusion": {"custom_nodes": str(folder / "custom_nodes")}}
    text, file = json.dumps(extra), folder / "custom_nodes.yaml"
    if not file.exists() or file.read_text("utf-8") != text:  # a server may be reading it
        file.write_text(text, "utf-8")
    return folder


def holds_pack(host: Path) -> bool:
    """Whether the pack already lies in the host's own custom_nodes."""
    nodes = host / "custom_nodes"
    return nodes.is_dir() and any(entry.exists() and entry.samefile(ROOT) for entry in nodes.iterdir())


def has_accelerator(python: Path) -> bool:
    """Whether the torch of that Python can use a CUDA, ROCm, MPS or XPU device now."""
    probe = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([str(python), "-c", probe], stderr=subprocess.DEVNULL).returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class HostServer:
    """A running server, started and ended by a with statement.

    host: the folder of ComfyUI's main.py. base: a folder for its models, input and output; made if it is missing.
    arguments: more arguments of main.py.
    """

    def __init__(self, host: Path, base: Path, arguments: tuple[str, ...] = ("--cpu",), python: str = sys.executable):
        self.host, self.base, self.arguments, self.python = Path(host), Path(base), tuple(arguments), python
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log_file = self.base / f"server-{self.port}.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> HostServer:
        make_base(self.base)
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(self._command(), stdout=log, stderr=subprocess.STDOUT, cwd=self.base)
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def _command(self) -> list[str]:
        # One for each server of these folders, since the host locks it.
        database = (self.base / f"user/comfyui-{self.port}.db").as_posix()
        return [
            str(self.python), str(self.host / "main.py"), "--base-directory", str(self.base),
            "--port", self.port, "--database-url", f"sqlite:///{database}",
            "--disable-api-nodes", "--disable-auto-launch", *self.arguments,
        ]  # fmt: skip

    def _wait_until_up(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._check_alive()
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise HostError(f"ComfyUI did not answer within {seconds:.0f} s.{self._log_end()}")

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise HostError(f"ComfyUI ended with exit code {self.process.returncode}.{self._log_end()}")

    def stop(self) -> None:
        """End the server; calling it again does nothing."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log(self) -> str:
        """All that the server has written so far."""
        return self.log_file.read_text("utf-8", errors="replace")

    def _log_end(self) -> str:
        return f" The end of its log:\n{self.log()[-3000:]}"

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get(self, path: str):
        """The decoded JSON at path, which begins with a slash."""
        return json.loads(self.get_bytes(path))

    def post(self, path: str, body) -> object:
        """Post body as JSON; the decoded answer, or None for an empty one. A refusal raises HostError with its text."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as refusal:
            raise HostError(f"POST {path}: {refusal.code} {refusal.read().decode('utf-8', 'replace')}") from refusal
        return json.loads(text) if text else None

    def run_graph(self, graph: dict, seconds: float = 600) -> dict:
        """Run a graph in API format to its end and return its outputs by node id, as /history gives them.

        Raises HostError if the graph is refused or a node fails, with the host's own words.
        """
        answer = self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})
        # The host runs what it can of a graph with more than one output, and names the nodes that it leaves out.
        if answer["node_errors"]:
            raise HostError(f"ComfyUI took only part of the graph: {json.dumps(answer['node_errors'])}")
        prompt_id = answer["prompt_id"]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._check_alive()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return self._outputs(entry)
            time.sleep(0.1)
        raise HostError(f"The graph did not end within {seconds:.0f} s.{self._log_end()}")

    @staticmethod
    def _outputs(entry: dict) -> dict:
        if entry["status"]["status_str"] == "success":
            return entry["outputs"]
        for event, detail in entry["status"]["messages"]:
            if event == "execution_error":
                trace = "".join(detail["traceback"])
                raise HostError(
                    f"{detail['node_type']} (node {detail['node_id']}): {detail['exception_type']}: "
                    f"{detail['exception_message']}\n{trace}"
                )
        raise HostError(f"The graph ended without success: {entry['status']}")

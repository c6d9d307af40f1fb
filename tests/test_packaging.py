"""What is installed: the archive of the registry, what it says of itself, and what older workflows become."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from stand_ins import write_stand_in

ROOT = Path(__file__).resolve().parent.parent
NODES = {
    "QuadtreeFromImage", "QuadtreeFromMask", "QuadtreeAdjust", "QuadtreeToMask", "QuadtreeTiledDiffusion", "QuadtreeComposite",
    "QuadtreeRegions", "QuadtreeRegionText", "QuadtreeRegionPrompts", "QuadtreeDecode"}
# By its module: an environment for an earlier host has no command of it.
COMFY_CLI = (sys.executable, "-m", "comfy_cli")


def run(*words: str, folder: Path, home: Path) -> str:
    """A command's output, with a home of its own; a failure shows it."""
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(home), "COLUMNS": "200"}
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> tuple[Path, Path]:
    """A repository with the files of this one as they are now, and a home for the tools."""
    folder, home = tmp_path_factory.mktemp("clone") / "quadtree-tiled-diffusion", tmp_path_factory.mktemp("home")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT, home=home).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run("git", "init", "-q", folder=folder, home=home)
    run("git", "add", "-A", folder=folder, home=home)
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "as it is", folder=folder, home=home)
    run(*COMFY_CLI, "--skip-prompt", "tracking", "disable", folder=folder, home=home)
    return folder, home


@pytest.fixture(scope="module")
def archive(clone) -> zipfile.ZipFile:
    folder, home = clone
    run(*COMFY_CLI, "--skip-prompt", "node", "pack", folder=folder, home=home)
    with zipfile.ZipFile(folder / "node.zip") as packed:
        yield packed


def test_the_registrys_check_finds_nothing(clone):
    said = run(*COMFY_CLI, "--skip-prompt", "node", "validate", folder=clone[0], home=clone[1])
    assert said.splitlines() == ["Validating node configuration...", "Running security checks...", "\u2713 All validation checks passed successfully"]


def test_the_archive_has_the_pack_and_none_of_its_tools(archive):
    top = {name.partition("/")[0] for name in archive.namelist()}
    assert {"__init__.py", "nodes.py", "js", "workflows", "locales", "LICENSE", "README.md", "pyproject.toml", "node_list.json"} <= top
    assert top & {"tests", "demo", "benchmarks", "run.py", ".ci", ".github", ".comfyignore", ".gitignore"} == set()


def test_the_archive_is_small(archive):
    assert sum(entry.compress_size for entry in archive.infolist()) < 3_000_000


def test_no_shipped_script_has_what_the_registrys_scan_takes_for_network_code(archive):
    scripts = [name for name in archive.namelist() if name.endswith((".js", ".mjs"))]
    assert [name for name in scripts for word in (b".bind(", b".connect(", b"eval(") if word in archive.read(name)] == []


def test_every_module_that_the_pack_imports_is_in_the_archive(archive, comfyui_dir, tmp_path):
    archive.extractall(tmp_path / "pack")
    script = (
        "import asyncio, importlib.util, sys; sys.path.insert(0, {host!r})\n"
        "from comfy.cli_args import args; args.cpu = True\n"
        "spec = importlib.util.spec_from_file_location('pack', {file!r}, submodule_search_locations=[{folder!r}])\n"
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack)\n"
        "extension = asyncio.run(pack.comfy_entrypoint())\n"
        "print(sorted(node.define_schema().node_id for node in asyncio.run(extension.get_node_list())))"
    )
    script = script.format(host=str(comfyui_dir), file=str(tmp_path / "pack/__init__.py"), folder=str(tmp_path / "pack"))
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert said.stdout.splitlines()[-1:] == [str(sorted(NODES))], said.stdout + said.stderr


@pytest.mark.short
def test_the_list_for_the_manager_says_what_the_nodes_say(server):
    listed = json.loads((ROOT / "node_list.json").read_text("utf-8"))
    known = server.get("/object_info")
    assert listed == {name: known[name]["description"] for name in NODES}


def old_node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def old_graph() -> dict:
    """A graph of comfyui-quadtree-tile in its newest form: the picture is its first output, the tree its second."""
    return {
        "1": old_node("EmptyImage", width=256, height=128, batch_size=1, color=0),
        "2": old_node(
            "QuadtreeVisualizer", image=["1", 0], content_threshold=25.0, min_tile_size=4, min_denoise=0.2, max_denoise=0.8, line_thickness=2),
        "3": old_node("PreviewImage", images=["2", 0]),
        "4": old_node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "5": old_node(
            "QuadtreeDiffusion", model=["4", 0], method="MultiDiffusion", quadtree=["2", 1], enable_overlap=True, tile_overlap=128,
            tile_batch_size=4, skip_diffusion_below=0),
        "6": old_node("ConditioningZeroOut", conditioning=["9", 0]),
        "7": old_node("EmptySD3LatentImage", width=256, height=128, batch_size=1),
        "8": old_node(
            "KSampler", model=["5", 0], positive=["6", 0], negative=["6", 0], latent_image=["7", 0], seed=1, steps=2, cfg=1.0,
            sampler_name="euler", scheduler="simple", denoise=1.0),
        "9": old_node("CLIPTextEncode", clip=["10", 0], text=""),
        "10": old_node("CLIPLoader", clip_name="clip_l.safetensors", type="sd3"),
        "11": old_node("PreviewAny", source=["8", 0]),
    }


@pytest.mark.short
def test_a_graph_of_the_predecessor_runs_with_our_nodes_in_the_place_of_its_own(server):
    for name in ("diffusion_models/flux1-dev.safetensors", "text_encoders/clip_l.safetensors"):
        write_stand_in(server.base / "models", name)
    outputs = server.run_graph(old_graph())
    assert len(outputs["3"]["images"]) == 1
    assert outputs["11"]["text"] != []


def test_the_browser_is_told_of_every_input_of_the_predecessors_nodes_that_goes_on(server):
    told = server.get("/node_replacements")
    known = server.get("/object_info")
    for old, new, values in (
        ("QuadtreeVisualizer", "QuadtreeFromImage", ["content_threshold", "min_tile_size", "min_denoise", "max_denoise", "line_thickness"]),
        ("QuadtreeDiffusion", "QuadtreeTiledDiffusion", ["method", "enable_overlap", "tile_overlap", "tile_batch_size", "skip_diffusion_below"]),
    ):
        (entry,) = told[old]
        assert (entry["new_node_id"], entry["old_widget_ids"]) == (new, values)
        assert {mapping["new_id"] for mapping in entry["input_mapping"]} == set(known[new]["input"]["required"])

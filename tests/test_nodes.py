"""What the user wires: ids and inputs are for ever, and what a graph says reaches the pack."""
from __future__ import annotations

import asyncio
import inspect
import io as files
import json

import pytest
import skimage.data
import torch
from conftest import host_server
from PIL import Image

from qtd_pack import nodes, preview
from qtd_pack.quadtree import build_quadtree
from qtd_pack.tiled_diffusion import TiledDiffusion

EVER = {
    "QuadtreeFromImage": (
        ["image", "detail_budget", "content_threshold", "min_leaf", "max_leaf", "min_denoise", "max_denoise", "metric", "edits"],
        ["QUADTREE", "IMAGE"]),
    "QuadtreeFromMask": (["mask", "min_leaf", "max_leaf"], ["QUADTREE"]),
    "QuadtreeAdjust": (["quadtree", "min_denoise", "max_denoise", "gamma", "invert", "protect"], ["QUADTREE"]),
    "QuadtreeToMask": (["quadtree", "width", "height"], ["MASK"]),
    "QuadtreeTiledDiffusion": (
        ["model", "quadtree", "method", "schedule", "tile_overlap", "tile_batch_size", "skip_diffusion_below", "min_window", "max_window",
         "shift_method", "seed", "original", "sigmas"], ["MODEL"]),
    "QuadtreeComposite": (["original", "image", "quadtree", "feather"], ["IMAGE"]),
}
NODES = asyncio.run(nodes.QuadtreeExtension().get_node_list())
SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in NODES}


def defaults(node_id: str) -> dict:
    return {entry.id: entry.default for entry in SCHEMAS[node_id].inputs if getattr(entry, "default", None) is not None}


@pytest.fixture
def picture(server) -> torch.Tensor:
    """A photo, also in the server's input folder as photo.png."""
    photo = skimage.data.coffee()[:256, :384]
    Image.fromarray(photo).save(server.base / "input" / "photo.png")
    return torch.from_numpy(photo).float()[None] / 255


def tree_graph(**settings) -> dict:
    """A graph in API format that shows the strengths as a mask."""
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "tree": {"class_type": "QuadtreeFromImage", "inputs": {"image": ["load", 0], **settings}},
        "mask": {"class_type": "QuadtreeToMask", "inputs": {"quadtree": ["tree", 0], "width": 0, "height": 0}},
        "show": {"class_type": "MaskPreview", "inputs": {"mask": ["mask", 0]}},
    }


def shown(server, outputs: dict) -> Image.Image:
    file = outputs["show"]["images"][0]
    return Image.open(files.BytesIO(server.get_bytes(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type={file['type']}"))).convert("L")


def settings_of_tree(**changes) -> dict:
    return {**{name: value for name, value in defaults("QuadtreeFromImage").items() if name != "edits"}, "max_leaf": 128, **changes}


def test_ids_and_inputs_and_outputs_are_what_saved_graphs_say():
    assert {name: ([entry.id for entry in schema.inputs], [entry.io_type for entry in schema.outputs]) for name, schema in SCHEMAS.items()} == EVER


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_input_and_output_has_a_tooltip(schema):
    assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))


@pytest.mark.parametrize("node_id, function", [("QuadtreeFromImage", build_quadtree), ("QuadtreeTiledDiffusion", TiledDiffusion)])
def test_defaults_are_those_of_the_pack(node_id, function):
    own = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items() if name in defaults(node_id)}
    assert own == {name: value for name, value in defaults(node_id).items() if name != "edits"}


def test_a_graph_without_edits_runs_and_its_result_says_what_the_browser_needs(server, picture):
    outputs = server.run_graph(tree_graph(**settings_of_tree()))
    (sent,) = outputs["tree"]["qtd_tree"]
    assert sent["leaves"] == len(build_quadtree(picture, **settings_of_tree()).leaves)
    assert sent["settings"] == {**settings_of_tree(), "edits": ""}
    status = server.post(preview.ROUTE, {"picture": sent["picture"], **sent["settings"]})
    assert (len(status["leaves"]), status["width"], status["height"]) == (sent["leaves"], 384, 256)
    image = server.get_bytes(f"/view?filename={sent['image']['filename']}&type={sent['image']['type']}&subfolder={sent['image']['subfolder']}")
    assert Image.open(files.BytesIO(image)).size == (384, 256)


def test_edits_change_the_strengths_without_a_browser(server, picture):
    edits = json.dumps({"size": [384, 256], "squares": [[0, 0, 128, 0], [128, 0, 128, 1]]})
    before, after = (shown(server, server.run_graph(tree_graph(**settings_of_tree(min_denoise=0.2, max_denoise=0.6, **given)))) for given in ({}, {"edits": edits}))
    assert [after.getpixel((x, 64)) for x in (64, 192)] == [0, 255]
    assert 0 < before.getpixel((64, 64)) < 255
    assert after.crop((0, 128, 384, 256)).tobytes() == before.crop((0, 128, 384, 256)).tobytes()


def test_edits_that_are_not_edits_are_refused_before_anything_runs(server, picture):
    with pytest.raises(host_server.HostError, match="400.*edits: expected nothing, or"):
        server.run_graph(tree_graph(**settings_of_tree(edits="[1")))


def test_a_result_from_the_cache_reaches_the_browser_again(server, picture):
    graph = tree_graph(**settings_of_tree(detail_budget=0.55))
    first = server.run_graph(graph)["tree"]["qtd_tree"]
    assert server.run_graph(graph)["tree"]["qtd_tree"] == first


def test_a_graph_without_a_server_needs_none(picture, monkeypatch):
    monkeypatch.setattr(preview, "running_server", lambda: None)
    assert nodes.QuadtreeFromImage.execute(picture, **settings_of_tree()).ui is None
    assert preview.teller("1") is None

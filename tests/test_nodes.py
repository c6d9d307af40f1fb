"""What the user wires: ids and inputs are for ever, and what a graph says reaches the pack."""
from __future__ import annotations

import asyncio
import inspect
import io as files
import json
import urllib.error
import urllib.request

import pytest
import skimage.data
import torch
from conftest import host_server
from PIL import Image
from stand_ins import write_stand_in

from qtd_pack import nodes, preview
from qtd_pack.quadtree import build_quadtree
from qtd_pack.tiled_diffusion import TiledDiffusion

EVER = {
    "QuadtreeFromImage": (
        ["image", "detail_budget", "content_threshold", "min_leaf", "max_leaf", "min_denoise", "max_denoise", "metric", "edits"],
        ["QUADTREE", "IMAGE"]),
    "QuadtreeFromMask": (["mask", "min_leaf", "max_leaf", "edges"], ["QUADTREE"]),
    "QuadtreeAdjust": (["quadtree", "min_denoise", "max_denoise", "gamma", "invert", "protect"], ["QUADTREE"]),
    "QuadtreeToMask": (["quadtree", "width", "height"], ["MASK"]),
    "QuadtreeTiledDiffusion": (
        ["model", "quadtree", "method", "schedule", "tile_overlap", "tile_batch_size", "skip_diffusion_below", "min_window", "max_window",
         "shift_method", "seed", "original", "sigmas", "wrap", "hold_tones", "window_shapes", "hold_layout"], ["MODEL"]),
    "QuadtreeComposite": (["image", "original", "quadtree", "feather"], ["IMAGE"]),
    "QuadtreeRegions": (["quadtree", "image", "region_size", "overlap"], ["IMAGE", "MASK", "IMAGE"]),
    "QuadtreeRegionText": (["regions", "text", "lines", "captions"], ["STRING"]),
    "QuadtreeRegionPrompts": (["conditioning", "regions", "masks", "mode", "share"], ["CONDITIONING"]),
    "QuadtreeDecode": (["vae", "samples", "original", "quadtree", "feather", "window"], ["IMAGE"]),
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


def test_what_the_predecessor_had_no_setting_for_is_as_on_a_new_node_but_for_its_threshold_and_largest_leaf():
    for replacement in nodes._of_predecessor():
        given = {mapping["new_id"]: mapping["set_value"] for mapping in replacement.input_mapping if "set_value" in mapping}
        other = {"detail_budget": 0.0, "max_leaf": 1024} if replacement.new_node_id == "QuadtreeFromImage" else {}
        assert len(given) > 3 and given == {name: defaults(replacement.new_node_id)[name] for name in given} | other


@pytest.mark.short
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


def refusals(server, graph: dict, node: str) -> dict:
    """What the host says of each input of a node when it refuses a graph, by the input's name."""
    request = urllib.request.Request(server.url + "/prompt", json.dumps({"prompt": graph}).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=60)
    assert refusal.value.code == 400
    errors = json.loads(refusal.value.read())["node_errors"][node]["errors"]
    return {error["extra_info"]["input_name"]: error["details"].partition(" - ")[2] for error in errors}


def mask_graph(**settings) -> dict:
    graph = tree_graph(**settings_of_tree())
    graph["tree"] = {"class_type": "QuadtreeFromMask", "inputs": {"mask": ["load", 1], "min_leaf": 64, "max_leaf": 128, **settings}}
    return graph


def adjust_graph(**settings) -> dict:
    graph = tree_graph(**settings_of_tree())
    inputs = {"quadtree": ["tree", 0], "min_denoise": 0.0, "max_denoise": 1.0, "gamma": 1.0, "invert": False, **settings}
    graph["adjust"] = {"class_type": "QuadtreeAdjust", "inputs": inputs}
    graph["mask"]["inputs"]["quadtree"] = ["adjust", 0]
    return graph


def patch_graph(**settings) -> dict:
    graph = tree_graph(**settings_of_tree())
    inputs = {**defaults("QuadtreeTiledDiffusion"), "model": ["model", 0], "quadtree": ["tree", 0], **settings}
    graph["patch"] = {"class_type": "QuadtreeTiledDiffusion", "inputs": inputs}
    graph["model"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}}
    graph["end"] = {"class_type": "PreviewAny", "inputs": {"source": ["patch", 0]}}
    del graph["mask"], graph["show"]  # or the host would run what it can
    return graph


@pytest.fixture
def model_file(server):
    write_stand_in(server.base / "models", "diffusion_models/flux1-dev.safetensors")


LEAVES, STRENGTHS, WINDOWS = ("min_leaf", "max_leaf"), ("min_denoise", "max_denoise"), ("min_window", "max_window")


@pytest.mark.parametrize("build, node, settings, named, problem", [
    (tree_graph, "tree", {"min_leaf": 64, "max_leaf": 1000}, LEAVES, "max_leaf: expected min_leaf (64) doubled some times, got 1000. The nearest are 512 and 1024."),
    (tree_graph, "tree", {"min_leaf": 256, "max_leaf": 128}, LEAVES, "min_leaf: expected 1 px or more and at most max_leaf (128), got 256. Make min_leaf smaller or max_leaf larger."),
    (tree_graph, "tree", {"min_leaf": -8}, LEAVES, "min_leaf: expected 8 to 1024, got -8."),
    (tree_graph, "tree", {"max_leaf": 1 << 14}, LEAVES, "max_leaf: expected 0 to 8192, got 16384."),
    (tree_graph, "tree", {"min_denoise": 0.9, "max_denoise": 0.2}, STRENGTHS, "min_denoise: expected at most max_denoise (0.2), got 0.9. To redraw flat parts instead, use Quadtree Adjust with invert."),
    (tree_graph, "tree", {"max_denoise": 1.5}, STRENGTHS, "max_denoise: expected 0.0 to 1.0, got 1.5."),
    (tree_graph, "tree", {"min_denoise": float("nan")}, STRENGTHS, "min_denoise: expected 0.0 to 1.0, got nan."),
    (mask_graph, "tree", {"max_leaf": 192}, LEAVES, "max_leaf: expected min_leaf (64) doubled some times, got 192. The nearest are 128 and 256."),
    (mask_graph, "tree", {"min_leaf": 4}, LEAVES, "min_leaf: expected 8 to 1024, got 4."),
    (adjust_graph, "adjust", {"min_denoise": 0.5, "max_denoise": 0.4}, STRENGTHS, "min_denoise: expected at most max_denoise (0.4), got 0.5. To redraw flat parts instead, use Quadtree Adjust with invert."),
    (adjust_graph, "adjust", {"min_denoise": -0.1}, STRENGTHS, "min_denoise: expected 0.0 to 1.0, got -0.1."),
    (patch_graph, "patch", {"min_window": 512, "max_window": 256}, WINDOWS, "min_window: expected at least 1 px and at most max_window (256), got 512. Make min_window smaller or max_window larger."),
    (patch_graph, "patch", {"max_window": 8192}, WINDOWS, "max_window: expected 64 to 4096, got 8192."),
])
def test_widgets_that_do_not_fit_are_named_before_anything_runs(server, picture, model_file, build, node, settings, named, problem):
    given = settings_of_tree(**settings) if build is tree_graph else settings
    found = refusals(server, build(**given), node)
    assert {name: found[name] for name in named} == dict.fromkeys(named, problem)


def test_ranges_that_the_host_checks_are_still_checked(server, picture):
    found = refusals(server, tree_graph(**settings_of_tree(detail_budget=1.5)), "tree")
    assert list(found) == ["detail_budget"]
    assert "metric" in refusals(server, tree_graph(**settings_of_tree(metric="beauty")), "tree")


@pytest.mark.parametrize("value, kind, setting, problem", [
    (100, "PrimitiveInt", "max_leaf", "max_leaf: expected min_leaf .64. doubled some times, got 100"),
    (0, "PrimitiveInt", "min_leaf", "min_leaf: expected 1 px or more"),
    (-0.5, "PrimitiveFloat", "min_denoise", "min_denoise: expected a number from 0 to 1, got -0.5"),
    ("[1", "PrimitiveString", "edits", "edits: expected nothing, or"),
])
def test_a_wired_value_that_does_not_fit_is_named_when_the_node_runs(server, picture, value, kind, setting, problem):
    graph = tree_graph(**settings_of_tree(**{setting: ["value", 0]}))
    graph["value"] = {"class_type": kind, "inputs": {"value": value}}
    with pytest.raises(host_server.HostError, match=f"QuadtreeFromImage .node tree.: .*{problem}"):
        server.run_graph(graph)


def test_wired_edits_change_the_strengths(server, picture):
    graph = tree_graph(**settings_of_tree(edits=["value", 0]))
    graph["value"] = {"class_type": "PrimitiveString", "inputs": {"value": json.dumps({"size": [384, 256], "squares": [[0, 0, 128, 1]]})}}
    assert shown(server, server.run_graph(graph)).getpixel((64, 64)) == 255


def test_a_result_from_the_cache_reaches_the_browser_again(server, picture):
    graph = tree_graph(**settings_of_tree(detail_budget=0.55))
    first = server.run_graph(graph)["tree"]["qtd_tree"]
    assert server.run_graph(graph)["tree"]["qtd_tree"] == first


def test_a_graph_without_a_server_needs_none(picture, monkeypatch):
    monkeypatch.setattr(preview, "running_server", lambda: None)
    assert nodes.QuadtreeFromImage.execute(picture, **settings_of_tree()).ui is None
    assert preview.teller("1") is None


def fields(*wanted):
    """The nodes of those names, by name."""
    return [next(node for node in NODES if node.define_schema().node_id == name) for name in wanted]


@pytest.mark.parametrize("name, needed", [("QuadtreeFromMask", {"mask", "min_leaf", "max_leaf"}), ("QuadtreeComposite", {"image", "original", "quadtree", "feather"})])
def test_a_graph_saved_before_an_input_was_added_still_runs(name, needed, server):
    info = server.get("/object_info")[name]["input"]
    assert set(info["required"]) == needed


@pytest.mark.parametrize("mask, edges, said", [
    (torch.zeros(1, 64, 64), "keep black", "mask: it is black, so the whole picture is kept"),
    (torch.eye(64)[None], "keep black", "mask: 100 % of what is to be redrawn shares leaves of 64 px with black and is kept. Lower min_leaf, or set edges to mean"),
    (torch.eye(64)[None], "mean", ""),
    (torch.ones(1, 64, 64), "keep black", ""),
])
def test_a_mask_that_redraws_nothing_or_little_is_said_in_the_log(mask, edges, said, caplog):
    (from_mask,) = fields("QuadtreeFromMask")
    with caplog.at_level("WARNING"):
        from_mask.execute(mask, 64, 1024, edges)
    assert said in caplog.text if said else caplog.text == ""


def test_one_side_of_a_mask_follows_from_the_other():
    from_image, to_mask = fields("QuadtreeFromImage", "QuadtreeToMask")
    tree = from_image.execute(torch.rand(1, 383, 501, 3), **settings_of_tree()).result[0]
    for given, shape in (((1002, 0), (1, 766, 1002)), ((0, 766), (1, 766, 1002)), ((0, 0), (1, 383, 501)), ((496, 376), (1, 376, 496))):
        assert to_mask.execute(tree, *given).result[0].shape == shape


@pytest.mark.parametrize("width, height", [(501, 383), (1000, 750), (135, 97)])
def test_what_the_hosts_vae_crops_comes_back_at_its_place(width, height, tmp_path):
    import comfy.sd
    import comfy.utils
    from stand_ins import write_stand_in

    write_stand_in(tmp_path, "vae/ae.safetensors")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(tmp_path / "vae/ae.safetensors")))
    from_image, composite = fields("QuadtreeFromImage", "QuadtreeComposite")
    photo = torch.rand(1, height, width, 3)
    tree = from_image.execute(photo, **settings_of_tree()).result[0]
    seen = vae.vae_encode_crop_pixels(photo)
    assert seen.shape[1:3] == (height // 8 * 8, width // 8 * 8)
    # The picture that the VAE saw, laid back, is the photo again, whatever is redrawn.
    assert torch.equal(composite.execute(original=photo, image=seen, quadtree=tree, feather=0).result[0], photo)

"""Each shipped workflow opens, is valid and runs on a real server, with small models under the file names it asks for."""
from __future__ import annotations

import copy
import io
import json
import urllib.parse
from pathlib import Path

import av
import comfy.sd
import comfy.utils
import comfy_extras.nodes_compositing
import comfy_extras.nodes_post_processing
import nodes as host_nodes
import numpy
import pytest
import skimage.data
import torch
from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image
from qtd_pack import nodes as pack_nodes
from qtd_pack.placement import strength_raster
from stand_ins import STAND_INS, write_stand_in

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
PACK = "quadtree-tiled-diffusion"
MODEL_INPUTS = {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "ckpt_name", "control_net_name", "model_name"}

# The T5 encoders have one size, 9 GB: in place of their loader, CLIP-L alone, in the width of T5.
TEXT_ENCODER = {"class_type": "CLIPLoader", "inputs": {"clip_name": "clip_l.safetensors", "type": "sd3"}}
# What only costs time, made small: the picture, its leaves and windows in the same proportion, the steps. Prompts
# mean nothing to the encoders here, so one is encoded for all.
SMALL = {
    "megapixels": 0.02, "length": 5, "min_leaf": 16, "max_leaf": 64, "min_window": 64, "max_window": 64,
    "tile_overlap": 16, "steps": 3, "feather": 8, "text": "", "region_size": 64,
}

# Common sizes of photos. Only the first two have sides that the VAE need not crop, in some of the workflows.
PHOTOS = [(640, 427), (800, 533), (1280, 853), (750, 1000), (1023, 767), (500, 375), (1080, 1350), (1365, 1024)]
# As far beyond a multiple of 16 px as those, and small enough to be sampled.
SMALL_PHOTOS = [(96, 75), (80, 69), (78, 104), (111, 79), (100, 71), (72, 102), (101, 64)]
ENLARGING = ["flux-2x-upscale", "flux-2x-upscale-prompts-for-regions", "sdxl-2x-upscale-tile-controlnet"]


def workflow(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.get("/object_info")


def api_graph(name: str, object_info: dict) -> dict:
    """What the browser would send."""
    return convert_ui_to_api(workflow(name), object_info)


@pytest.mark.short
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_only_nodes_of_the_host_and_of_the_pack(name, object_info):
    types = {node["type"] for node in workflow(name)["nodes"]} - {"MarkdownNote"}
    others = {kind for kind in types if not object_info[kind]["python_module"].startswith(("nodes", "comfy_extras", f"custom_nodes.{PACK}"))}
    assert others == set()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_picture_is_decoded_where_it_changed_and_a_video_as_a_whole(name, object_info):
    kinds = {node["class_type"] for node in api_graph(name, object_info).values()}
    decoding = {"VAEDecode", "QuadtreeComposite"} if "CreateVideo" in kinds else {"QuadtreeDecode"}
    assert {kind for kind in kinds if "Decode" in kind or "Composite" in kind} == decoding


@pytest.mark.parametrize("name", WORKFLOWS)
def test_each_model_file_of_a_workflow_has_a_link(name):
    for node in workflow(name)["nodes"]:
        wanted = {value for value in node.get("widgets_values", []) if str(value).endswith(".safetensors")}
        links = {model["name"]: model for model in node["properties"].get("models", [])}
        assert set(links) == wanted
        for model in links.values():
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith("/" + model["name"])
            assert model["directory"] in {"diffusion_models", "text_encoders", "vae", "checkpoints", "controlnet", "upscale_models"}


def test_the_templates_dialog_lists_every_workflow(server):
    assert sorted(server.get("/workflow_templates")[PACK]) == WORKFLOWS
    assert len(WORKFLOWS) == 8


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_server_gives_a_workflow_and_a_picture_of_it_to_the_templates_dialog(name, server):
    assert json.loads(server.get_bytes(f"/api/workflow_templates/{PACK}/{name}.json")) == workflow(name)
    with Image.open(io.BytesIO(server.get_bytes(f"/api/workflow_templates/{PACK}/{name}.jpg"))) as picture:
        assert picture.format == "JPEG" and 600 <= picture.width <= 1024
        assert numpy.asarray(picture).std() > 20


def test_every_workflow_loads_in_the_browser_and_says_to_the_server_what_its_file_says(frontend):
    give_all(frontend.server.base)
    frontend.page.evaluate("async () => { await app.refreshComboInNodes() }")
    known = frontend.server.get("/object_info")
    for name in WORKFLOWS:
        frontend.load(workflow(name))
        assert (name, broken_nodes(frontend)) == (name, [])
        told = {key: node["inputs"] for key, node in frontend.prompt().items()}
        for inputs in told.values():
            inputs.pop("video-preview", None)  # the newer frontend's own, which no node has
        assert told == {key: node["inputs"] for key, node in api_graph(name, known).items()}


@pytest.mark.parametrize("shared_frontend", ["classic", "newer-nodes2"], indirect=True)
@pytest.mark.parametrize("name", ["flux-img2img-keep-flat-parts"])
def test_a_workflow_opens_by_its_link(name, frontend):
    give_all(frontend.server.base)
    frontend.page.goto(f"{frontend.server.url}/?template={name}&source={PACK}")
    frontend.page.wait_for_function("count => window.app?.vueAppReady && app.graph?.nodes.length === count", arg=len(workflow(name)["nodes"]))
    frontend.page.wait_for_load_state("networkidle")
    assert broken_nodes(frontend) == []
    # While it loads, the host's page complains of its own menus and of settings that no user has saved yet.
    frontend.problems[:] = [problem for problem in frontend.problems if "quadtree" in problem.lower()]


def broken_nodes(frontend) -> list[str]:
    """The nodes that the page does not know or marks as having an error, a missing model for instance."""
    return frontend.page.evaluate(
        "app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types) || node.has_errors).map(node => node.type)")


@pytest.mark.short
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_with_small_models_and_keeps_what_its_leaves_keep(name, server, object_info):
    give_pictures(server.base / "input")
    run_small(server, api_graph(name, object_info))


@pytest.mark.parametrize("name, size", [*((name, size) for name in ENLARGING for size in SMALL_PHOTOS), *((name, (111, 79)) for name in WORKFLOWS if name not in ENLARGING)])
def test_a_workflow_runs_on_photos_of_any_size_and_saves_them_whole(name, size, server, object_info):
    graph = api_graph(name, object_info)
    give_pictures(server.base / "input")
    for node in graph.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = "odd-{}x{}.png".format(*size)
            painted_photo(*size).save(server.base / "input" / node["inputs"]["image"])
    result = run_small(server, graph)
    if name in ENLARGING:
        assert result.shape[1:3] == (2 * size[1], 2 * size[0])


def run_small(server, graph: dict) -> numpy.ndarray:
    """Run a workflow with small models to its end, and look at what it saves; the pictures of its composite."""
    make_small(graph)
    probes = add_probes(graph)
    give_models(graph, server.base / "models")
    outputs = server.run_graph(graph)
    original, result, strength = (frames(server, outputs[probe]) for probe in probes)
    kept = (strength[0, :, :, 0] == 0) & numpy.ones(original.shape[:3], bool)
    assert 0 < kept.mean() < 1
    assert (result[kept] == original[kept]).all()
    assert (result[~kept] != original[~kept]).mean() > 0.5
    (saved,) = (node_id for node_id, node in graph.items() if node["class_type"] in ("SaveImage", "SaveVideo"))
    assert len(outputs[saved]["images"]) == 1
    if graph[saved]["class_type"] == "SaveImage":
        assert (frames(server, outputs[saved]) == result).all()
    return result


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The host's object around a small VAE, for what it does to pictures before it encodes them."""
    models = tmp_path_factory.mktemp("models")
    write_stand_in(models, "vae/ae.safetensors")
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae/ae.safetensors")))


@pytest.mark.parametrize("width, height", PHOTOS)
@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_pictures_of_a_workflow_fit_together_at_the_sizes_that_photos_have(name, width, height, object_info, vae):
    graph = api_graph(name, object_info)
    if any("megapixels" in node["inputs"] for node in graph.values()):
        # Whole multiples of a cell whatever it is, so that small ones tell as much.
        for node in graph.values():
            node["inputs"] |= {name: value for name, value in (("megapixels", 0.1), ("min_leaf", 16), ("max_leaf", 128)) if name in node["inputs"]}
    photo = torch.from_numpy(numpy.array(painted_photo(width, height))).float()[None] / 255
    follow = PictureSide(graph, photo, vae)
    last = keeping_node(graph)
    (out,), original, tree = follow.outputs(last), follow.value(last, "original"), follow.value(last, "quadtree")
    assert out.shape == original.shape
    assert strength_raster(tree, original.shape[1] // 8, original.shape[2] // 8, 8).unique().numel() > 1
    kept = strength_raster(tree, *original.shape[1:3]) == 0
    assert 0 < float(kept.float().mean()) < 1
    assert torch.equal(out[:, kept], original[:, kept])
    assert float((out[:, ~kept] != original[:, ~kept]).float().mean()) > 0.5


class PictureSide:
    """What a graph does to a photo, by the host's nodes and the pack's, but for models: what a VAE decodes is a negative of what it saw."""

    def __init__(self, graph: dict, photo: torch.Tensor, vae):
        self.graph, self.photo, self.vae, self.known = graph, photo, vae, {}

    def value(self, node_id: str, name: str):
        given = self.graph[node_id]["inputs"][name]
        return self.outputs(given[0])[given[1]] if isinstance(given, list) else given

    def outputs(self, node_id: str) -> tuple:
        if node_id not in self.known:
            self.known[node_id] = self.made(node_id)
        return self.known[node_id]

    def made(self, node_id: str) -> tuple:
        kind, inputs = self.graph[node_id]["class_type"], self.graph[node_id]["inputs"]
        if kind in ("LoadImage", "GetVideoComponents"):
            return self.photo[..., :3], 1 - self.photo[..., 3]
        if kind == "ImageUpscaleWithModel":
            return (self.value(node_id, "image").repeat_interleave(4, 1).repeat_interleave(4, 2),)
        if kind == "KSampler":
            pixels = self.vae.vae_encode_crop_pixels(self.value(inputs["latent_image"][0], "pixels"))
            return ({"samples": torch.zeros(len(pixels), self.vae.latent_channels, pixels.shape[1] // 8, pixels.shape[2] // 8), "negative": 1 - pixels},)
        if kind == "VAEDecode":
            return (self.value(node_id, "samples")["negative"],)
        if kind == "VAELoader" or kind == "CheckpointLoaderSimple":
            return (self.vae,) * 3
        values = {name: self.value(node_id, name) for name in inputs}
        if kind == "QuadtreeDecode":
            values["vae"] = copy.copy(self.vae)  # the host's, around a decoder that nobody knows
            values["vae"].first_stage_model, values["vae"].decode = torch.nn.Identity(), lambda samples: values["samples"]["negative"]
        if kind == "ImageScaleBy":
            return host_nodes.ImageScaleBy().upscale(**values)
        if kind == "ImageFromBatch":
            return (values["image"],)
        for module in (pack_nodes, comfy_extras.nodes_compositing, comfy_extras.nodes_post_processing):
            if hasattr(module, kind):
                return getattr(module, kind).execute(**values).result
        raise KeyError(kind)


def keeping_node(graph: dict) -> str:
    """The one that puts the original's pixels back."""
    (found,) = (node_id for node_id, node in graph.items() if node["class_type"] in ("QuadtreeComposite", "QuadtreeDecode"))
    return found


def make_small(graph: dict) -> None:
    for node in graph.values():
        node["inputs"] |= {name: value for name, value in SMALL.items() if name in node["inputs"] and not isinstance(node["inputs"][name], list)}
        if node["class_type"] in ("DualCLIPLoader", "CLIPLoader"):
            node.update(TEXT_ENCODER)


def add_probes(graph: dict) -> tuple[str, str, str]:
    """Nodes that show the pictures before and after, and the strengths. Returns their ids."""
    last = keeping_node(graph)
    inputs = graph[last]["inputs"]
    graph["original"] = {"class_type": "PreviewImage", "inputs": {"images": inputs["original"]}}
    graph["result"] = {"class_type": "PreviewImage", "inputs": {"images": [last, 0]}}
    graph["size"] = {"class_type": "GetImageSize", "inputs": {"image": inputs["original"]}}
    sizes = {"width": ["size", 0], "height": ["size", 1]}
    graph["mask"] = {"class_type": "QuadtreeToMask", "inputs": {"quadtree": inputs["quadtree"], **sizes}}
    graph["picture"] = {"class_type": "MaskToImage", "inputs": {"mask": ["mask", 0]}}
    graph["strength"] = {"class_type": "PreviewImage", "inputs": {"images": ["picture", 0]}}
    return "original", "result", "strength"


def give_models(graph: dict, models: Path) -> None:
    wanted = {value for node in graph.values() for key, value in node["inputs"].items() if key in MODEL_INPUTS}
    for name in STAND_INS:
        if name.rpartition("/")[2] in wanted:
            write_stand_in(models, name)


def give_all(base: Path) -> None:
    """Every file that the workflows ask for; of the encoders without a stand-in only the name."""
    for name in STAND_INS:
        write_stand_in(base / "models", name)
    for name in ("t5xxl_fp8_e4m3fn_scaled", "umt5_xxl_fp8_e4m3fn_scaled"):
        (base / "models/text_encoders" / f"{name}.safetensors").touch()
    give_pictures(base / "input")


def give_pictures(folder: Path) -> None:
    """A photo under the name of the one that every host has, as if painted on with the mask editor, and a video that pans over it."""
    painted_photo(96, 64).save(folder / "example.png")
    photo = skimage.data.coffee()[:256:4, :384:4]
    with av.open(str(folder / "video.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for shift in range(0, 16, 2):
            frame = numpy.ascontiguousarray(photo[:, shift:shift + 80])
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())


def painted_photo(width: int, height: int) -> Image.Image:
    """A photo of that size, with a hole in its alpha, as the host's mask editor paints."""
    photo = Image.fromarray(skimage.data.coffee()[:256, :384]).resize((width, height), Image.Resampling.NEAREST)
    painted = numpy.full((height, width), 255, numpy.uint8)
    painted[height * 3 // 16:height * 11 // 16, width * 5 // 24:width * 15 // 24] = 0
    photo.putalpha(Image.fromarray(painted))
    return photo


def frames(server, output: dict) -> numpy.ndarray:
    """The pictures of a node's output, (frames, height, width, 3)."""
    paths = ["/view?" + urllib.parse.urlencode(entry) for entry in output["images"]]
    return numpy.stack([numpy.asarray(Image.open(io.BytesIO(server.get_bytes(path))).convert("RGB")) for path in paths])

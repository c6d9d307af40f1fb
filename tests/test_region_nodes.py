"""The nodes of regions in graphs that the host runs: lists of pictures, texts and prompts."""
from __future__ import annotations

import io as files

import pytest
import skimage.data
import torch
from PIL import Image
from sampling import even_tree
from stand_ins import write_stand_in

from qtd_pack.region_nodes import QuadtreeRegionPrompts, QuadtreeRegions, QuadtreeRegionText


@pytest.fixture
def photo(server) -> Image.Image:
    """A photo of 384 x 256 px, also in the server's input folder as regions.png."""
    picture = Image.fromarray(skimage.data.coffee()[:256, :384])
    picture.save(server.base / "input" / "regions.png")
    return picture


def region_graph(**text) -> dict:
    """Six regions of 128 px of a picture that is redrawn wholly, and their texts."""
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": "regions.png"}},
        "tree": {"class_type": "QuadtreeFromImage", "inputs": {
            "image": ["load", 0], "detail_budget": 1.0, "content_threshold": 25.0, "min_leaf": 64, "max_leaf": 128, "min_denoise": 1.0, "max_denoise": 1.0,
            "metric": "variance"}},
        "regions": {"class_type": "QuadtreeRegions", "inputs": {"quadtree": ["tree", 0], "image": ["load", 0], "region_size": 128, "overlap": 16}},
        "text": {"class_type": "QuadtreeRegionText", "inputs": {"regions": ["regions", 0], "text": "a photo", "lines": "", **text}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}},
    }


def test_a_list_of_captions_reaches_the_right_regions_and_lines_win(server, photo):
    graph = region_graph(lines="2: wet stones\n5-6: sky", captions=["captions", 0])
    # A list of texts as a captioner would give it, one for each picture.
    graph["captions"] = {"class_type": "QuadtreeRegionText", "inputs": {
        "regions": ["regions", 0], "text": "", "lines": "\n".join(f"{number}: caption {number}" for number in range(1, 7))}}
    outputs = server.run_graph(graph)
    assert outputs["show"]["text"] == [
        "a photo, caption 1", "a photo, wet stones", "a photo, caption 3", "a photo, caption 4", "a photo, sky", "a photo, sky"]


def test_the_pictures_of_regions_are_their_parts_of_the_picture(server, photo):
    graph = region_graph() | {"pictures": {"class_type": "PreviewImage", "inputs": {"images": ["regions", 0]}}}
    shown = server.run_graph(graph)["pictures"]["images"]
    views = [
        Image.open(files.BytesIO(server.get_bytes(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type={file['type']}"))).convert("RGB")
        for file in shown]
    assert [view.size for view in views] == [(144, 144), (160, 144), (144, 144)] * 2
    assert views[4].tobytes() == photo.crop((112, 112, 272, 256)).tobytes()


def test_regions_are_sampled_by_the_hosts_nodes(server, photo):
    """Encoded by the host's text encoder, which runs once for each region, and sampled in windows."""
    for name in ("diffusion_models/flux1-dev.safetensors", "text_encoders/clip_l.safetensors", "vae/ae.safetensors"):
        write_stand_in(server.base / "models", name)
    graph = region_graph(lines="1: a cup") | {
        "clip": {"class_type": "CLIPLoader", "inputs": {"clip_name": "clip_l.safetensors", "type": "sd3"}},
        "encode": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": ["text", 0]}},
        "whole": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a photo"}},
        "prompts": {"class_type": "QuadtreeRegionPrompts", "inputs": {
            "conditioning": ["whole", 0], "regions": ["encode", 0], "masks": ["regions", 1], "mode": "per window", "share": 0.25}},
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
        "patch": {"class_type": "QuadtreeTiledDiffusion", "inputs": {
            "model": ["model", 0], "quadtree": ["tree", 0], "method": "Mixture of Diffusers", "schedule": "img2img", "tile_overlap": 16, "tile_batch_size": 0,
            "skip_diffusion_below": 0.0, "min_window": 128, "max_window": 128, "shift_method": "random", "seed": 0}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": ["vae", 0]}},
        "sample": {"class_type": "KSampler", "inputs": {
            "model": ["patch", 0], "positive": ["prompts", 0], "negative": ["whole", 0], "latent_image": ["latent", 0], "seed": 1, "steps": 2, "cfg": 1.0,
            "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}},
        "result": {"class_type": "PreviewAny", "inputs": {"source": ["sample", 0]}},
    }
    outputs = server.run_graph(graph)
    assert "nan" not in outputs["result"]["text"][0]


@pytest.mark.parametrize("change, message", [
    ({"text": {"lines": "40: a boat"}}, "expected regions from 1 to 6, got 40"),
    ({"text": {"captions": ["three", 0]}}, "captions: expected one for each of 6 regions, got 1"),
])
def test_what_cannot_be_followed_is_said_in_the_users_words(server, photo, change, message):
    graph = region_graph(**change["text"])
    graph["three"] = {"class_type": "PrimitiveString", "inputs": {"value": "one caption"}}
    with pytest.raises(RuntimeError, match=message):
        server.run_graph(graph)


@pytest.mark.parametrize("lines, text, name", [(["1: a", "2: b"], [""], "lines"), (["1: a"], ["x", "y"], "text"), ([], [""], "lines")])
def test_lists_for_lines_or_text_are_not_cut_to_their_first(lines, text, name):
    with pytest.raises(ValueError, match=f"{name}: expected one for all regions, got a list of"):
        QuadtreeRegionText.execute([torch.zeros(1, 8, 8, 3)] * 3, text, lines)


@pytest.mark.parametrize("mode, share, name", [(["per window", "per cell"], [0.0], "mode"), (["per cell"], [0.0, 0.5], "share")])
def test_lists_for_mode_or_share_are_not_cut_to_their_first(mode, share, name):
    with pytest.raises(ValueError, match=f"{name}: expected one for all regions, got a list of 2"):
        QuadtreeRegionPrompts.execute([[]], [[], []], [torch.ones(1, 8, 8)] * 2, mode, share)


def test_a_tree_that_redraws_nothing_is_told(caplog):
    caplog.set_level("INFO")
    QuadtreeRegions.execute(even_tree(0.0, 512, 512), torch.rand(1, 512, 512, 3), 128, 16)
    assert "the tree redraws nothing, so there is no region" in caplog.text

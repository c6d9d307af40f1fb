"""The shipped workflow of prompts for regions, in real browsers and with small models: each text reaches its region, and no other."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import clip_l, write_safetensors
from test_workflows import give_all, workflow

NAME = "flux-2x-upscale-prompts-for-regions"
BOTH = pytest.mark.parametrize("shared_frontend", ["classic", "newer-nodes2"], indirect=True)

# Six regions of 64 px, each a window that knows nothing of the others, all redrawn.
SMALL = {
    "detail_budget": 1.0, "min_leaf": 16, "max_leaf": 64, "min_denoise": 1.0, "max_denoise": 1.0, "region_size": 64, "overlap": 0, "method": "MultiDiffusion",
    "tile_overlap": 0, "min_window": 64, "max_window": 64, "steps": 2, "feather": 8,
}
ENCODER = "words.safetensors"


def give_encoder(models: Path) -> None:
    """A CLIP-L in which words mean something: its layers pass on what it is told, and all else is zero."""
    path, shapes = models / "text_encoders" / ENCODER, clip_l()
    (words,) = (name for name in shapes if name.endswith("token_embedding.weight"))
    if not path.exists():
        embedding = torch.randn(shapes.pop(words), generator=torch.Generator().manual_seed(0))
        write_safetensors(path, {words: embedding}, shapes)


def with_captions(graph: dict) -> dict:
    """The workflow with an encoder that is small, a list of texts as a captioner gives it, and the latent saved."""
    by_type = {node["type"]: node for node in graph["nodes"]}
    encoder = by_type["DualCLIPLoader"]
    encoder.update(type="CLIPLoader", widgets_values=[ENCODER, "sd3", "default"], inputs=[])
    encoder["properties"]["Node name for S&R"] = "CLIPLoader"
    regions, text, sampler = by_type["QuadtreeRegions"], by_type["QuadtreeRegionText"], by_type["KSampler"]
    captioner = {"id": 101, "type": "QuadtreeRegionText", "pos": [400, 1900], "size": [400, 200], "widgets_values": ["", ""], "properties": {}, "inputs": [
        {"name": "regions", "type": "IMAGE", "link": 101}], "outputs": [{"name": "texts", "type": "STRING", "links": [102]}]}
    saver = {"id": 102, "type": "SaveLatent", "pos": [1400, 1300], "size": [300, 60], "widgets_values": ["regions"], "properties": {}, "inputs": [
        {"name": "samples", "type": "LATENT", "link": 103}], "outputs": []}
    next(slot for slot in text["inputs"] if slot["name"] == "captions")["link"] = 102
    captions = [slot["name"] for slot in text["inputs"]].index("captions")
    graph["nodes"] += [captioner, saver]
    graph["links"] += [[101, regions["id"], 0, 101, 0, "IMAGE"], [102, 101, 0, text["id"], captions, "STRING"], [103, sampler["id"], 0, 102, 0, "LATENT"]]
    graph.update(last_node_id=102, last_link_id=103)
    return graph


def lines(texts: dict[int, str]) -> str:
    return "\n".join(f"{number}: {text}" for number, text in texts.items())


def changed_regions(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    """The numbers of the regions, 8 x 8 cells each, in which two latents of 16 x 24 cells differ."""
    cells = (one != other).flatten(0, -3).any(0)
    assert cells.shape == (16, 24)
    return [number + 1 for number, region in enumerate(cells.unfold(0, 8, 8).unfold(1, 8, 8).flatten(0, 1)) if bool(region.any())]


@BOTH
def test_each_caption_and_each_line_reaches_its_region_and_changes_no_other(frontend):
    give_all(frontend.server.base)
    give_encoder(frontend.server.base / "models")
    frontend.page.evaluate("async () => { await app.refreshComboInNodes() }")
    graph = with_captions(workflow(NAME))
    frontend.load(graph)
    ids = {node["type"]: str(node["id"]) for node in graph["nodes"] if node["id"] != 101}
    for node in graph["nodes"]:
        for name in SMALL.keys() & {slot["name"] for slot in node["inputs"]}:
            frontend.set_value(str(node["id"]), name, SMALL[name])

    def sampled(captions: dict[int, str], by_hand: dict[int, str]) -> torch.Tensor:
        frontend.set_value("101", "lines", lines(captions))
        frontend.set_value(ids["QuadtreeRegionText"], "lines", lines(by_hand))
        (entry,) = frontend.run()[ids["SaveLatent"]]["latents"]
        return load_file(frontend.server.base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"]

    captions = {number: f"caption {number}" for number in range(1, 7)}
    first = sampled(captions, {})
    assert changed_regions(first, sampled({**captions, 3: "a red boat"}, {})) == [3]
    assert changed_regions(first, sampled(captions, {5: "wet stones"})) == [5]
    # A line wins over a caption, so what the caption says no longer matters.
    by_hand = sampled(captions, {2: "a lighthouse"})
    assert changed_regions(first, by_hand) == [2]
    assert changed_regions(by_hand, sampled({**captions, 2: "a red boat", 6: "a red boat"}, {2: "a lighthouse"})) == [6]

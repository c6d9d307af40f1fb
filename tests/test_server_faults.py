"""A real server under faults: a browser that leaves in mid run, and a second server on the same folders."""
from __future__ import annotations

import concurrent.futures
import json
import socket
import struct
import time
import uuid

import pytest
import websocket
from host_server import HostServer
from stand_ins import write_stand_in

from qtd_pack.preview import EVENT


def sampled(seed: int, steps: int = 6) -> dict:
    """A graph that samples a grey picture by its tree, with a small FLUX, and shows the tree's mask."""
    tree = {"detail_budget": 0.4, "content_threshold": 25.0, "min_leaf": 64, "max_leaf": 128, "min_denoise": 0.5, "max_denoise": 1.0, "metric": "variance", "edits": ""}
    patch = {
        "method": "Mixture of Diffusers", "schedule": "img2img", "tile_overlap": 16, "tile_batch_size": 1, "skip_diffusion_below": 0.0, "min_window": 64, "max_window": 64,
        "shift_method": "random", "seed": 0}
    nodes = {
        "1": ("EmptyImage", {"width": 256, "height": 256, "batch_size": 1, "color": 0x808080}),
        "2": ("QuadtreeFromImage", {"image": ["1", 0], **tree}),
        "3": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
        "4": ("CLIPLoader", {"clip_name": "clip_l.safetensors", "type": "sd3"}),
        "5": ("CLIPTextEncode", {"clip": ["4", 0], "text": ""}),
        "6": ("EmptySD3LatentImage", {"width": 256, "height": 256, "batch_size": 1}),
        "7": ("QuadtreeTiledDiffusion", {"model": ["3", 0], "quadtree": ["2", 0], **patch}),
        "8": ("KSampler", {
            "model": ["7", 0], "positive": ["5", 0], "negative": ["5", 0], "latent_image": ["6", 0], "seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler",
            "scheduler": "simple", "denoise": 1.0}),
        "9": ("PreviewAny", {"source": ["8", 0]}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


@pytest.fixture(scope="module")
def server(server):
    for name in ("diffusion_models/flux1-dev.safetensors", "text_encoders/clip_l.safetensors"):
        write_stand_in(server.base / "models", name)
    return server


def connected(server) -> tuple[websocket.WebSocket, str]:
    client = uuid.uuid4().hex
    return websocket.create_connection(f"{server.url.replace('http', 'ws')}/ws?clientId={client}", timeout=120), client


def until(page: websocket.WebSocket, kind: str) -> dict:
    """The data of the next message of a kind."""
    while True:
        message = page.recv()
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)["data"]


def ended(server, prompt: str) -> dict:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        entry = server.get(f"/history/{prompt}").get(prompt)
        if entry:
            return entry
        time.sleep(0.05)
    raise AssertionError("the run did not end")


def leave(page: websocket.WebSocket, how: str) -> None:
    if how == "closes":
        page.close()
    elif how == "is gone":
        page.sock.close()
    else:  # the connection is reset
        page.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        page.sock.close()


@pytest.mark.parametrize("seed, how", [(0, "closes"), (1, "is gone"), (2, "is cut off")])
def test_a_browser_that_leaves_in_mid_run_changes_nothing(server, seed, how):
    written = len(server.log())
    page, client = connected(server)
    prompt = server.post("/prompt", {"prompt": sampled(seed), "client_id": client})["prompt_id"]
    until(page, "progress")
    leave(page, how)
    assert ended(server, prompt)["status"]["status_str"] == "success"
    page, client = connected(server)
    again = server.post("/prompt", {"prompt": sampled(100 + seed), "client_id": client})["prompt_id"]
    line = until(page, EVENT)
    while "cost" not in line["values"]:
        line = until(page, EVENT)
    page.close()
    assert line["node"] == "7" and line["values"]["steps"] == 6
    assert ended(server, again)["status"]["status_str"] == "success"
    assert "Traceback" not in server.log()[written:]


def test_a_second_server_on_the_same_folders_works_at_the_same_time(server, comfyui_dir):
    with HostServer(comfyui_dir, server.base) as second, concurrent.futures.ThreadPoolExecutor(2) as both:
        results = list(both.map(lambda one: one.run_graph(sampled(7, steps=3)), (server, second)))
        assert results[0]["9"] == results[1]["9"]
        assert not any(word in second.log().lower() for word in ("acquire lock", "is locked", "traceback"))

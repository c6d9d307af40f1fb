"""What the pack leaves in memory from run to run, and how much it takes at once. Tensors are counted; no clock is involved."""
from __future__ import annotations

import io

import pytest
import torch
from conftest import ROOT, load_module
from counting import LiveBytes
from execution import PromptQueue
from PIL import Image

from qtd_pack import nodes as pack_nodes
from qtd_pack import preview
from qtd_pack.compositing import composite
from qtd_pack.quadtree import build_quadtree
from qtd_pack.wiring import Wiring

memory = load_module("qtd_memory_runs", ROOT / "benchmarks" / "memory_runs.py")

SETTINGS = dict(detail_budget=0.4, content_threshold=25.0, min_leaf=64, max_leaf=0, min_denoise=0.0, max_denoise=1.0, metric="variance")


def test_runs_with_changing_trees_leave_nothing_behind():
    counts = memory.counts_of_runs("flux_schnell", 6)
    assert len(set(counts[2:])) == 1, counts


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    """81 frames, their right half without detail, so that some of it is kept."""
    frames = torch.rand(81, 132, 228, 3, generator=torch.Generator().manual_seed(0))
    frames[:, :, 114:] = 0.5
    return frames


def copies_of(video: torch.Tensor, function, *args, **kwargs) -> float:
    """The most that a function ever held at once of what it made itself, in sizes of the video."""
    with LiveBytes() as live:
        function(*args, **kwargs)
    return live.peak / video.untyped_storage().nbytes()


def test_a_tree_of_a_video_takes_part_of_one_copy(video):
    assert copies_of(video, build_quadtree, video, **SETTINGS | {"min_leaf": 16}) < 0.6


def test_an_overlay_of_a_video_takes_one_copy(video):
    assert copies_of(video, pack_nodes.QuadtreeFromImage.execute, video, **SETTINGS) < 1.2


@pytest.mark.parametrize("original, result", [
    ((81, 132, 228, 3), (81, 132, 228, 3)), ((1, 132, 228, 3), (81, 132, 228, 3)), ((81, 132, 228, 3), (81, 128, 224, 3)), ((81, 132, 228, 1), (81, 132, 228, 3))])
def test_a_composite_of_a_video_takes_one_copy(video, original, result):
    tree = build_quadtree(video, **SETTINGS)
    before, after = video[:original[0], ..., :original[3]], torch.rand(result)
    assert copies_of(video, composite, before, after, tree) < 1.2


def test_a_composite_with_alpha_takes_no_more_than_itself(video):
    tree = build_quadtree(video, **SETTINGS)
    assert copies_of(video, composite, torch.rand(81, 132, 228, 4), video, tree) < 4 / 3 + 0.2


def test_a_composite_of_many_is_that_of_each():
    generator = torch.Generator().manual_seed(3)
    before, after = (torch.rand(count, 200, 264, 3, generator=generator) for count in (2, 5))
    tree = build_quadtree(before, **SETTINGS | {"min_leaf": 16})
    together = composite(before, after, tree)
    assert together.shape == (5, 200, 264, 3)
    for number in range(5):
        assert torch.equal(together[number], composite(before[number % 2][None], after[number][None], tree)[0])


def test_pictures_that_are_kept_are_bounded_and_forgotten_wholly():
    pictures, tensors = preview.Pictures(), memory.living
    before = tensors()
    for seed in range(3 * preview.MOST_PICTURES):
        pictures.keep(preview.measure(torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed)), 64))
    assert len(pictures._kept) == preview.MOST_PICTURES
    grown = tensors()[0] - before[0]
    assert grown <= 4 * preview.MOST_PICTURES
    del pictures
    assert tensors() == before


class Server:
    """What holds the host's queue, and is told of its changes."""

    def __init__(self):
        self.prompt_queue = PromptQueue(self)

    def queue_updated(self):
        pass

    def begins(self, graph: dict) -> None:
        """Let a graph be the one that runs."""
        for item in list(self.prompt_queue.currently_running):
            self.prompt_queue.currently_running.pop(item)
        self.prompt_queue.put((0, "id", graph, {}, []))
        self.prompt_queue.get(timeout=1)


def graph(**links) -> dict:
    return {"3": {"class_type": "QuadtreeFromImage", "inputs": {"image": ["1", 0], "edits": ""}}, "7": {"class_type": "Any", "inputs": links}}


@pytest.mark.parametrize(
    "links, is_taken",
    [
        ({}, False), ({"x": ["3", 0]}, False), ({"x": ["3", 1]}, True), ({"x": ["31", 1]}, False), ({"x": [["3", 0], ["3", 1]]}, True), ({"x": {"y": ["3", 1]}}, True),
        ({"x": "3", "y": 1}, False), ({"x": ["3", 1.0]}, True), ({"x": ["3"]}, False),
    ],
)
def test_an_output_is_taken_by_a_link_however_deep(links, is_taken):
    server = Server()
    server.begins(graph(**links))
    assert Wiring(server).is_taken("3", 1) is is_taken


def test_what_is_not_known_is_taken():
    server = Server()
    assert Wiring(server).is_taken("3", 1)  # nothing runs
    server.begins(graph())
    assert Wiring(server).is_taken("7.0.3", 1)  # made by another node while it runs
    assert Wiring(object()).is_taken("3", 1)  # a host without such a queue


def test_a_result_that_was_left_out_and_is_taken_later_is_made_anew_and_kept_then():
    server = Server()
    wiring = Wiring(server)
    server.begins(graph())
    assert (wiring.number("3", 1), wiring.may_leave_out("3", 1), wiring.number("3", 1)) == (0, True, 0)
    server.begins(graph(x=["3", 1]))
    assert (wiring.number("3", 1), wiring.may_leave_out("3", 1), wiring.number("3", 1)) == (1, False, 1)
    server.begins(graph())
    assert wiring.number("3", 1) == 1  # what is kept has it, and more is never less
    assert wiring.may_leave_out("3", 1)
    server.begins(graph(x=["3", 1]))
    assert wiring.number("3", 1) == 2
    assert wiring.number("8", 1) == 0


def overlay_graph(frames: int, is_taken: bool, frame: int = 0) -> dict:
    """A grey video, its tree and, if it is taken, one frame of the overlay."""
    settings = dict(SETTINGS, edits="")
    found = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 1024, "height": 1024, "batch_size": frames, "color": 0x808080}},
        "2": {"class_type": "QuadtreeFromImage", "inputs": {"image": ["1", 0], **settings}},
        "3": {"class_type": "QuadtreeToMask", "inputs": {"quadtree": ["2", 0], "width": 64, "height": 64 + frame}},
        "4": {"class_type": "MaskPreview", "inputs": {"mask": ["3", 0]}},
    }
    if is_taken:
        found["5"] = {"class_type": "ImageFromBatch", "inputs": {"image": ["2", 1], "batch_index": frame, "length": 1}}
        found["6"] = {"class_type": "ImageToMask", "inputs": {"image": ["5", 0], "channel": "green"}}
        found["7"] = {"class_type": "MaskPreview", "inputs": {"mask": ["6", 0]}}
    return found


def cached(server) -> set[str]:
    """The nodes that the host had not to run in its last graph."""
    (entry,) = server.get("/history?max_items=1").values()
    return {node for event, detail in entry["status"]["messages"] if event == "execution_cached" for node in detail["nodes"]}


def run_overlay(server, frames: int, is_taken: bool, frame: int = 0) -> tuple[bool, int | None]:
    """Whether the tree's node came from what the host keeps, and the green of the overlay in the middle of a leaf."""
    outputs = server.run_graph(overlay_graph(frames, is_taken, frame))
    if not is_taken:
        return "2" in cached(server), None
    file = outputs["7"]["images"][0]
    with Image.open(io.BytesIO(server.get_bytes(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type={file['type']}"))) as picture:
        return "2" in cached(server), picture.convert("RGB").getpixel((100, 100))[1]


def test_a_small_overlay_is_there_when_it_is_connected_later_and_nothing_runs_again(server):
    assert run_overlay(server, 1, False)[0] is False
    assert run_overlay(server, 1, True) == (True, 70)  # 0.55 of grey and 0.45 of dark violet


def test_a_large_overlay_that_nobody_takes_is_made_when_it_is_connected_and_then_kept(server):
    assert run_overlay(server, 22, False)[0] is False
    assert run_overlay(server, 22, False, frame=1)[0] is True
    assert run_overlay(server, 22, True, frame=2) == (False, 70)
    assert run_overlay(server, 22, True, frame=3) == (True, 70)
    assert run_overlay(server, 22, False, frame=4)[0] is True

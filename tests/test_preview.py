"""What browser and server say to each other: pictures are kept by their contents, and every request is checked."""
from __future__ import annotations

import json
import math
import re
import time
import urllib.error
import urllib.request

import pytest
import skimage.data
import torch
from conftest import ROOT
from sampling import striped_tree

from qtd_pack import preview
from qtd_pack.preview import Pictures, answer_to, describe, estimated_cost, measure, tree_of
from qtd_pack.painting import painted_cells
from qtd_pack.quadtree import Leaf, Quadtree, build_quadtree
from qtd_pack.utils import Rect

SETTINGS = {
    "detail_budget": 0.4, "content_threshold": 25.0, "min_leaf": 64, "max_leaf": 1024, "min_denoise": 0.0, "max_denoise": 1.0,
    "metric": "variance", "edits": ""}


def photo(scale: int = 1) -> torch.Tensor:
    """The astronaut, 512 x 512 px times the scale."""
    return (torch.from_numpy(skimage.data.astronaut()).float() / 255).repeat_interleave(scale, 0).repeat_interleave(scale, 1)[None]


def noise(seed: int, side: int = 64) -> torch.Tensor:
    return torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(seed))


def asked(pictures, key, **changes):
    return answer_to(pictures, json.dumps({"picture": key, **SETTINGS, **changes}).encode())


@pytest.fixture
def pictures():
    return Pictures()


@pytest.fixture
def key(pictures):
    return pictures.keep(measure(photo(), 64))


@pytest.mark.parametrize("changes", [
    {}, {"detail_budget": 0.8}, {"detail_budget": 0.0, "content_threshold": 40.0}, {"min_leaf": 32}, {"min_leaf": 8, "max_leaf": 64},
    {"min_leaf": 24, "max_leaf": 96}, {"min_denoise": 0.2, "max_denoise": 0.6}, {"metric": "gradient"}, {"metric": "combined"},
])
def test_the_answer_has_the_leaves_that_a_run_would_have(pictures, key, changes):
    status, answer = asked(pictures, key, **changes)
    settings = {**SETTINGS, **changes}
    tree = tree_of(measure(photo(), settings["min_leaf"]), **settings)
    assert status == 200
    assert [leaf[:3] for leaf in answer["leaves"]] == [[leaf.rect.left, leaf.rect.top, leaf.side] for leaf in tree.leaves]
    assert [answer["strengths"][leaf[4]][0] for leaf in answer["leaves"]] == [round(leaf.strength, 4) for leaf in tree.leaves]
    del settings["edits"]
    assert len(tree.leaves) == len(build_quadtree(photo(), **settings).leaves)


def test_the_answer_marks_what_is_painted(pictures, key):
    _, answer = asked(pictures, key, max_leaf=64, edits='{"size": [512, 512], "squares": [[64, 0, 64, 0]]}')
    assert [leaf[:2] for leaf in answer["leaves"] if leaf[5]] == [[64, 0]]


def test_a_leaf_is_described_in_pixels_colour_and_steps():
    leaves = tuple(Leaf(Rect(0, left, 64, left + 64), 64, 12.34, strength) for left, strength in ((0, 0.0), (64, 0.5), (128, 0.02), (192, 1.0)))
    tree = Quadtree(64, 256, 64, 64, leaves)
    answer = describe(tree, painted_cells(tree, None))
    assert answer["leaves"] == [[0, 0, 64, 12.3, 0, 0], [64, 0, 64, 12.3, 2, 0], [128, 0, 64, 12.3, 1, 0], [192, 0, 64, 12.3, 3, 0]]
    assert answer["strengths"] == [[0.0, "#440154", 0], [0.02, "#45085b", 0], [0.5, "#21918c", 10], [1.0, "#fde725", 20]]
    assert (answer["palette"][0], answer["palette"][-1], answer["steps"]) == ("#440154", "#fde725", 20)
    assert (answer["kept_share"], answer["mean_strength"]) == (0.25, 0.38)


@pytest.mark.parametrize("left, right, cost", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_keeping_everything_costs_nothing_and_redrawing_everything_the_whole(left, right, cost):
    assert estimated_cost(striped_tree(left, right)) == cost


def test_a_stronger_half_costs_more():
    costs = [estimated_cost(Quadtree(2048, 2048, 1024, 1024, tuple(
        Leaf(Rect(top, side, top + 1024, side + 1024), 1024, 0.0, strength if side else 0.0) for top in (0, 1024) for side in (0, 1024))))
        for strength in (0.25, 0.5, 1.0)]
    assert costs == sorted(costs)
    # At most two windows of 1088 px, 64 px around the half, where the grid has four of 1152 px.
    assert 0.1 < costs[0] < 0.12 and 0.4 < costs[2] < 0.432


def test_a_tree_for_a_picture_of_4096_px_takes_less_than_a_tenth_of_a_second():
    pictures = Pictures()
    key = pictures.keep(measure(photo(8), 64))
    times = []
    for budget in (0.2, 0.4, 0.8):
        start = time.process_time()
        assert asked(pictures, key, detail_budget=budget)[0] == 200
        times.append(time.process_time() - start)
    assert min(times) < 0.1


def test_one_picture_is_kept_once_and_another_beside_it(pictures):
    keys = [pictures.keep(measure(noise(seed), 64)) for seed in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]
    assert all(asked(pictures, key)[0] == 200 for key in keys)


def test_no_more_than_16_pictures_are_kept_and_the_one_used_longest_ago_goes(pictures):
    keys = [pictures.keep(measure(noise(seed), 64)) for seed in range(16)]
    assert asked(pictures, keys[0])[0] == 200
    pictures.keep(measure(noise(16), 64))
    assert [asked(pictures, key)[0] for key in keys[:3]] == [200, 404, 200]


def test_what_is_kept_stays_below_a_size(pictures, monkeypatch):
    monkeypatch.setattr(preview, "MOST_BYTES", 10_000)
    keys = [pictures.keep(measure(noise(seed), 64)) for seed in range(3)]  # 64 cells of 64 bytes each
    assert [asked(pictures, key)[0] for key in keys] == [404, 200, 200]


def test_an_unknown_picture_is_not_answered_for(pictures):
    assert asked(pictures, "0" * 64) == (
        404, {"error": "The server no longer has this picture. Run the graph to see its tree.", "code": "no_picture", "values": {}})


WRONG = [
    ({"detail_budget": "0.4"}, "detail_budget: expected a finite number"),
    ({"detail_budget": True}, "detail_budget: expected a finite number"),
    ({"detail_budget": math.nan}, "detail_budget: expected a finite number"),
    ({"detail_budget": 1.5}, "detail_budget: expected a number from 0 to 1"),
    ({"content_threshold": math.inf}, "content_threshold: expected a finite number"),
    ({"content_threshold": -1}, "content_threshold: expected 0 or more"),
    ({"min_leaf": 64.0}, "min_leaf: expected a whole number"),
    ({"min_leaf": 0}, "min_leaf and max_leaf: expected 8 to 8192 px"),
    ({"min_leaf": 12, "max_leaf": 96}, "min_leaf: expected a multiple of 8"),
    ({"max_leaf": 1 << 40}, "min_leaf and max_leaf: expected 8 to 8192 px"),
    ({"max_leaf": 100}, "max_leaf: expected min_leaf (64) doubled"),
    ({"min_denoise": 0.9, "max_denoise": 0.1}, "min_denoise: expected at most max_denoise"),
    ({"metric": "beauty"}, "metric: expected one of variance"),
    ({"metric": None}, "metric: expected a text"),
    ({"edits": {}}, "edits: expected a text"),
    ({"edits": "x"}, "edits: expected nothing, or"),
    ({"edits": '{"size": [512, 256], "squares": []}'}, "edits: painted on a picture of 512 x 256"),
]


@pytest.mark.parametrize("changes, problem", WRONG)
def test_a_wrong_setting_is_named(pictures, key, changes, problem):
    status, answer = asked(pictures, key, **changes)
    assert status == 400
    assert answer["error"].startswith(problem)


@pytest.mark.parametrize("changes", [changes for changes, _ in WRONG])
def test_a_refusal_can_be_said_in_other_languages(pictures, key, changes):
    _, answer = asked(pictures, key, **changes)
    for locale in ("ja", "zh"):
        texts = json.loads((ROOT / "locales" / locale / "main.json").read_text("utf-8"))["quadtreeTiledDiffusion"]["errors"]
        assert set(re.findall(r"{(\w+)}", texts[answer["code"]])) <= set(answer["values"])
    assert all(type(value) in (str, int, float) for value in answer["values"].values())
    json.dumps(answer, allow_nan=False)


def test_a_refusal_has_the_numbers_that_its_sentence_has(pictures, key):
    assert asked(pictures, key, max_leaf=100)[1] == {
        "error": "max_leaf: expected min_leaf (64) doubled some times, got 100. The nearest are 64 and 128.",
        "code": "max_leaf_doubled", "values": {"min_leaf": 64, "max_leaf": 100, "below": 64, "above": 128}}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"picture": 1}', b"{}"])
def test_a_request_that_is_none_is_refused(pictures, body):
    status, answer = answer_to(pictures, body)
    assert status == 400 and answer["error"]


@pytest.mark.parametrize("key", [None, 1, [], {}])
def test_a_key_that_is_none_is_not_found(pictures, key):
    assert asked(pictures, key)[0] == 404


def test_more_leaves_than_can_be_drawn_are_told_as_a_number():
    pictures = Pictures()
    key = pictures.keep(measure(noise(0, 2048), 8))
    status, answer = asked(pictures, key, min_leaf=8, max_leaf=64, detail_budget=1.0)
    assert (status, answer) == (400, {
        "error": "65536 leaves are too many to be drawn here, where at most 50000 are. The run itself is not affected.",
        "code": "too_many_leaves", "values": {"amount": 65536, "most": 50000}})


def refused(server, body: bytes) -> tuple[int, dict]:
    request = urllib.request.Request(server.url + preview.ROUTE, body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as problem:
        urllib.request.urlopen(request, timeout=60)
    return problem.value.code, json.loads(problem.value.read())


def test_the_server_answers_with_json_whatever_comes(server):
    assert refused(server, json.dumps({"picture": "0" * 64, **SETTINGS}).encode())[0] == 404
    assert refused(server, b"{")[0] == 400
    assert refused(server, b" " * (preview.LONGEST_REQUEST + 1)) == (
        413, {"error": "The settings are too long. Make `edits` shorter or empty.", "code": "too_long", "values": {}})

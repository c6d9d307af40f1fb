"""Regions over the tree on its node, in real browsers: shown when asked for, and those whose line holds the cursor."""
from __future__ import annotations

import base64
import io
import json

import numpy
import pytest
from browser_tools import PICTURE
from PIL import Image
from test_browser import run_and_show

from conftest import ROOT

SOME = pytest.mark.parametrize("shared_frontend", ["classic", "newer-nodes2"], indirect=True)


@pytest.fixture
def nodes(frontend) -> dict[str, str]:
    """A photo of 600 x 400 px in six regions of 200 px, redrawn wholly, and their texts; ids by what the nodes do."""
    load, tree, regions, text, show = (frontend.add(name, place) for name, place in (
        ("LoadImage", (0, 0)), ("QuadtreeFromImage", (350, 0)), ("QuadtreeRegions", (800, 300)), ("QuadtreeRegionText", (750, 0)), ("PreviewAny", (1250, 0))))
    frontend.set_value(load, "image", PICTURE)
    for name, value in (("max_leaf", 256), ("min_denoise", 0.5)):
        frontend.set_value(tree, name, value)
    frontend.set_value(regions, "region_size", 200)
    frontend.link(load, 0, tree, "image")
    frontend.link(load, 0, regions, "image")
    frontend.link(tree, 0, regions, "quadtree")
    frontend.link(regions, 0, text, "regions")
    frontend.link(text, 0, show, "source")
    return {"tree": tree, "regions": regions, "text": text, "show": show}


def lines_field(frontend, node: str):
    """The field of `lines` on the node, which the newer renderer makes by itself."""
    if frontend.name.endswith("nodes2"):
        return frontend.page.locator(f"[data-node-id='{node}'] textarea").last
    return frontend.page.locator("textarea[placeholder^='3:']").last


def wait_for(frontend, **values: str) -> None:
    for name, value in values.items():
        frontend.page.wait_for_selector(f".qtd[data-{name}='{value}']", state="attached")


def pixels(frontend) -> numpy.ndarray:
    """The alpha of what lies over the tree."""
    box = frontend.page.evaluate("() => document.querySelector('.qtd-top').toDataURL()")
    return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(box.split(",")[1]))).convert("RGBA"))[..., 3]


def test_regions_show_when_asked_for_and_those_without_a_line_say_so(frontend, nodes):
    frontend.set_value(nodes["text"], "lines", "2-3: cup\n6: table")
    run_and_show(frontend, nodes["tree"])
    wait_for(frontend, regions="6", silent="1,4,5", chosen="")
    button = frontend.page.locator(".qtd-regions")
    frontend.page.mouse.move(5, 5)
    assert pixels(frontend).max() == 0
    button.click()
    frontend.page.mouse.move(5, 5)
    assert (pixels(frontend) > 0).mean() > 0.01
    frontend.shot("regions")
    button.click()
    frontend.page.mouse.move(5, 5)
    assert pixels(frontend).max() == 0


def test_the_region_whose_line_holds_the_cursor_shows_on_the_tree(frontend, nodes):
    frontend.set_value(nodes["text"], "lines", "2-3: cup\n\n6: table")
    run_and_show(frontend, nodes["tree"])
    wait_for(frontend, regions="6")
    field = lines_field(frontend, nodes["text"])
    field.click()
    field.press("Control+Home")
    wait_for(frontend, chosen="2,3")
    assert (pixels(frontend) > 0).any()
    field.press("ArrowDown")
    wait_for(frontend, chosen="")
    field.press("ArrowDown")
    wait_for(frontend, chosen="6")
    field.press("Control+End")
    field.press("Enter")
    field.type("1, 4: wall")
    wait_for(frontend, chosen="1,4", silent="5")
    frontend.shot("region-of-a-line")
    field.evaluate("field => field.blur()")
    wait_for(frontend, chosen="")


@SOME
def test_regions_are_shown_again_when_the_graph_is_opened_again(frontend, nodes):
    run_and_show(frontend, nodes["tree"])
    wait_for(frontend, regions="6", silent="1,2,3,4,5,6")
    saved = frontend.workflow()
    frontend.open()
    frontend.load(saved)
    run_and_show(frontend, nodes["tree"])
    wait_for(frontend, regions="6")


@SOME
def test_a_tree_without_regions_offers_none(frontend, nodes):
    frontend.page.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", nodes["regions"])
    mask = frontend.add("QuadtreeToMask", (800, 300))
    frontend.link(nodes["tree"], 0, mask, "quadtree")
    frontend.link(mask, 0, nodes["show"], "source")
    run_and_show(frontend, nodes["tree"])
    assert frontend.page.locator(".qtd-regions").is_hidden()


def test_the_words_are_in_both_translations():
    for locale in ("ja", "zh"):
        texts = json.loads((ROOT / "locales" / locale / "main.json").read_text("utf-8"))["quadtreeTiledDiffusion"]
        assert {"regions", "regionsTip", "regionSilent", "regionCaption"} <= texts.keys()

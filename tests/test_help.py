"""What a user can read of each node: help pages, tooltips and translations."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ("zh", "ja")
NODES = (
    "QuadtreeFromImage", "QuadtreeFromMask", "QuadtreeAdjust", "QuadtreeToMask", "QuadtreeTiledDiffusion", "QuadtreeComposite",
    "QuadtreeRegions", "QuadtreeRegionText", "QuadtreeRegionPrompts")
# What is written in the language, so that a sentence left in English shows.
LETTERS = {"zh": re.compile("[\u4e00-\u9fff]"), "ja": re.compile("[\u3040-\u30ff\u4e00-\u9fff]")}


@pytest.fixture(scope="module")
def known(server) -> dict:
    """The nodes as the server describes them."""
    info = server.get("/object_info")
    return {name: info[name] for name in NODES}


def inputs_of(node: dict) -> dict:
    return {name: spec for kind in ("required", "optional") for name, spec in node["input"].get(kind, {}).items()}


def translation(locale: str) -> dict:
    return json.loads((ROOT / "locales" / locale / "nodeDefs.json").read_text("utf-8"))


def texts(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [text for value in entry.values() for text in texts(value)]


@pytest.mark.parametrize("name", NODES)
def test_everything_of_a_node_has_a_tooltip(name, known):
    node = known[name]
    silent = [key for key, spec in inputs_of(node).items() if not spec[1].get("tooltip")]
    assert silent == []
    assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"])


@pytest.mark.parametrize("locale", LOCALES)
def test_a_translation_has_all_that_the_nodes_have_and_nothing_else(locale, known):
    for name, entry in translation(locale).items():
        assert set(entry) == {"display_name", "description", "inputs", "outputs"}
        assert set(entry["inputs"]) == set(inputs_of(known[name]))
        assert set(entry["outputs"]) == {str(index) for index in range(len(known[name]["output"]))}
        assert all(set(part) == {"name", "tooltip"} for part in (*entry["inputs"].values(), *entry["outputs"].values()))
    assert set(translation(locale)) == set(NODES)


@pytest.mark.parametrize("locale", LOCALES)
def test_a_translation_is_in_its_language_and_without_signs_that_the_frontend_reads(locale):
    found = [text for text in texts(translation(locale)) if not LETTERS[locale].search(text) or re.search(r"[{}@|]", text)]
    assert found in ([], ["Sigmas"])


@pytest.mark.parametrize("locale", LOCALES)
def test_the_server_gives_the_translations_to_the_browser(locale, server):
    served = server.get("/i18n")[locale]["nodeDefs"]
    assert {name: served[name] for name in NODES} == translation(locale)


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_is_served_and_names_every_input_with_its_start_value(name, server, known):
    page = server.get_bytes(f"/extensions/quadtree-tiled-diffusion/docs/{name}.md").decode("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", page, re.M))
    inputs = inputs_of(known[name])
    assert set(rows) == set(inputs)
    for key, spec in inputs.items():
        if "default" in spec[1] and key != "edits":
            assert rows[key] == str(spec[1]["default"]).lower() or rows[key] == str(spec[1]["default"])


@pytest.mark.parametrize("name", NODES)
def test_the_pictures_of_a_help_page_are_there_and_small(name):
    page = (ROOT / "js" / "docs" / f"{name}.md").read_text("utf-8")
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page):
        file = ROOT / "js" / "docs" / picture
        assert file.stat().st_size < 100_000
        with Image.open(file) as image:
            assert image.width <= 1024

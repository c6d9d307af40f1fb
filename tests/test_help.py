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
    "QuadtreeRegions", "QuadtreeRegionText", "QuadtreeRegionPrompts", "QuadtreeDecode")
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


def main_texts(locale: str) -> dict[str, str]:
    """What the picture on the node says in a language, by dotted keys."""
    texts = json.loads((ROOT / "locales" / locale / "main.json").read_text("utf-8"))
    assert set(texts) == {"quadtreeTiledDiffusion"}  # the host keeps all packs' texts in one place
    return flat(texts["quadtreeTiledDiffusion"])


def flat(texts: dict, before: str = "") -> dict[str, str]:
    found = {}
    for key, value in texts.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def english_texts() -> dict[str, str]:
    source = (ROOT / "js" / "texts.mjs").read_text("utf-8")
    return dict(re.findall(r'^  (\w+): "(.*)",$', source[source.index("const ENGLISH = {"):source.index("};")], re.M))


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", text))


@pytest.mark.parametrize("locale", LOCALES)
def test_the_picture_says_in_each_language_what_it_says_in_english(locale):
    english, other = english_texts(), main_texts(locale)
    assert len(english) > 20
    assert {key for key in other if not key.startswith(("errors.", "run."))} == set(english)
    assert {key: placeholders(other[key]) for key in english} == {key: placeholders(text) for key, text in english.items()}
    assert set(other) == set(main_texts("ja"))
    assert {key: placeholders(text) for key, text in other.items()} == {key: placeholders(text) for key, text in main_texts("ja").items()}


@pytest.mark.parametrize("locale", LOCALES)
def test_what_the_picture_says_is_in_its_language_and_has_braces_around_names_only(locale):
    texts = main_texts(locale)
    assert [key for key, text in texts.items() if not LETTERS[locale].search(text)] == ["strengthOne"]
    assert [key for key, text in texts.items() if re.search(r"[{}@|]", re.sub(r"{\w+}", "", text))] == []


@pytest.mark.parametrize("locale", LOCALES)
def test_the_server_gives_the_pictures_texts_to_the_browser(locale, server):
    assert flat(server.get("/i18n")[locale]["quadtreeTiledDiffusion"]) == main_texts(locale)


def page_file(name: str, locale: str) -> Path:
    docs = ROOT / "js" / "docs"
    return docs / f"{name}.md" if locale == "en" else docs / name / f"{locale}.md"


PAGES = [(name, locale) for name in NODES for locale in ("en", *LOCALES)]


@pytest.mark.parametrize("name, locale", PAGES)
def test_a_help_page_is_served_and_names_every_input_with_its_start_value(name, locale, server, known):
    path = page_file(name, locale).relative_to(ROOT / "js").as_posix()
    page = server.get_bytes(f"/extensions/quadtree-tiled-diffusion/{path}").decode("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", page, re.M))
    inputs = inputs_of(known[name])
    assert set(rows) == set(inputs)
    for key, spec in inputs.items():
        if "default" in spec[1] and key != "edits":
            assert rows[key] in (str(spec[1]["default"]), str(spec[1]["default"]).lower())


@pytest.mark.parametrize("name, locale", PAGES)
def test_the_pictures_of_a_help_page_are_there_and_small(name, locale):
    page = page_file(name, locale).read_text("utf-8")
    # The host shows a page in another language, too, as if it lay in docs.
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page):
        file = ROOT / "js" / "docs" / picture
        assert file.stat().st_size < 100_000
        with Image.open(file) as image:
            assert image.width <= 1024


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("locale", LOCALES)
def test_a_help_page_in_another_language_has_what_the_english_one_has(name, locale):
    english, other = (page_file(name, each).read_text("utf-8") for each in ("en", locale))
    shape = lambda page: [re.match(r"#+ |- \*\*|\| |!\[|$", line)[0] for line in page.splitlines() if re.match(r"#+ |- \*\*|\| |!\[", line)]
    assert shape(other) == shape(english)
    # Names of inputs, values and pictures stay as they are.
    assert re.findall(r"\(images/[^)]+\)", other) == re.findall(r"\(images/[^)]+\)", english)
    assert [line for line in other.splitlines() if len(line) > 40 and not LETTERS[locale].search(line)] == []
    title = translation(locale)[name]["display_name"]
    assert other.startswith(f"# {title}\n")

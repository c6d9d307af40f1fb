"""The tree on the node in real browsers: it shows what the server built, follows the dial, and can be painted on."""
from __future__ import annotations

import io
import json
import re

import numpy
import pytest
import skimage.data
from browser_tools import PICTURE, opened
from conftest import ROOT, host_server
from PIL import Image
from stand_ins import write_stand_in

SETTINGS = {
    "detail_budget": 0.4, "content_threshold": 25.0, "min_leaf": 64, "max_leaf": 1024, "min_denoise": 0.0, "max_denoise": 1.0,
    "metric": "variance", "edits": ""}
SOME = pytest.mark.parametrize("shared_frontend", ["classic", "newer-nodes2"], indirect=True)


@pytest.fixture
def tree_node(frontend):
    """A graph that loads a photo of 600 x 400 px and builds its tree; the id of the node that builds it."""
    return build_graph(frontend)


def build_graph(frontend) -> str:
    load, tree, mask, show = (frontend.add(name, place) for name, place in (
        ("LoadImage", (0, 0)), ("QuadtreeFromImage", (350, 0)), ("QuadtreeToMask", (800, 300)), ("MaskPreview", (800, 500))))
    frontend.set_value(load, "image", PICTURE)
    frontend.set_value(tree, "max_leaf", 256)
    frontend.link(load, 0, tree, "image")
    frontend.link(tree, 0, mask, "quadtree")
    frontend.link(mask, 0, show, "mask")
    return tree


def run_and_show(frontend, tree_node) -> dict:
    """Run the graph and wait for the overlay; what the node sent to the page."""
    sent = frontend.run()[tree_node]["qtd_tree"][0]
    wait_for_leaves(frontend, sent["leaves"])
    return sent


def wait_for_leaves(frontend, amount: int) -> None:
    frontend.page.wait_for_selector(f".qtd[data-leaves='{amount}']", state="attached")


def leaves_on_server(frontend, sent: dict, **changes) -> int:
    """How many leaves the tree of a picture has with other settings, by the server's word."""
    settings = {**SETTINGS, **sent["settings"], **changes}
    return len(frontend.server.post("/quadtree_tiled_diffusion/tree", {"picture": sent["picture"], **settings})["leaves"])


def point_on_page(frontend, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the 600 x 400 picture lies on the page."""
    box = frontend.page.locator(".qtd-top").bounding_box()
    scale = min(box["width"] / 600, box["height"] / 400)
    return box["x"] + box["width"] / 2 + (x - 300) * scale, box["y"] + box["height"] / 2 + (y - 200) * scale


def touch(frontend, x: float, y: float) -> None:
    frontend.page.mouse.click(*point_on_page(frontend, x, y))


def painted(frontend, tree_node) -> list:
    text = frontend.value(tree_node, "edits")
    return json.loads(text)["squares"] if text else []


def wait_for_painted(frontend, tree_node, amount: int) -> list:
    frontend.page.wait_for_function(
        """([id, amount]) => { const text = app.graph.getNodeById(id).widgets.find(w => w.name === 'edits').value;
        return (text ? JSON.parse(text).squares.length : 0) === amount }""", arg=[tree_node, amount])
    return painted(frontend, tree_node)


def mask_pixel(frontend, outputs: dict, x: int, y: int) -> int:
    """The strength, 0..255, that the run's mask has at a pixel."""
    file = next(output["images"][0] for output in outputs.values() if "images" in output)
    picture = frontend.server.get_bytes(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type={file['type']}")
    return Image.open(io.BytesIO(picture)).convert("L").getpixel((x, y))


def line(frontend) -> str:
    return frontend.page.locator(".qtd-line").inner_text()


def test_after_a_run_the_overlay_shows_as_many_leaves_as_the_server_says(frontend, tree_node):
    assert "Run the graph once" in line(frontend)
    sent = run_and_show(frontend, tree_node)
    assert line(frontend).startswith(f"{sent['leaves']} leaves, ")
    assert "DEPRECATION" not in frontend.server.log()
    frontend.page.wait_for_timeout(500)
    frontend.shot("tree")


def test_turning_a_setting_redraws_without_a_run(frontend, tree_node):
    sent = run_and_show(frontend, tree_node)
    sent["settings"]["detail_budget"] = frontend.turn_dial(tree_node, 0.9)
    assert sent["settings"]["detail_budget"] == pytest.approx(0.9, abs=0.02)
    wait_for_leaves(frontend, leaves_on_server(frontend, sent))
    for change in ({"min_leaf": 32}, {"metric": "gradient"}, {"min_denoise": 0.5}):
        for name, value in change.items():
            frontend.set_value(tree_node, name, value)
        sent["settings"].update(change)
        wait_for_leaves(frontend, leaves_on_server(frontend, sent))
    assert frontend.run()[tree_node]["qtd_tree"][0]["leaves"] == leaves_on_server(frontend, sent)


def test_a_painted_leaf_survives_save_reload_and_conversion_and_changes_the_result(frontend, tree_node):
    run_and_show(frontend, tree_node)
    strength = mask_pixel(frontend, frontend.run(), 300, 100)
    assert strength > 0
    touch(frontend, 300, 100)
    (square,) = wait_for_painted(frontend, tree_node, 1)
    left, top, side, amount = square
    assert left <= 300 < left + side and top <= 100 < top + side and amount == 0
    saved = frontend.workflow()
    frontend.open()
    frontend.load(saved)
    assert painted(frontend, tree_node) == [square]
    assert json.loads(frontend.prompt()[tree_node]["inputs"]["edits"]) == {"size": [600, 400], "squares": [square]}
    assert mask_pixel(frontend, frontend.run(), 300, 100) == 0


def test_touching_a_leaf_keeps_then_redraws_then_releases_it(frontend, tree_node):
    run_and_show(frontend, tree_node)
    for strengths in ([0], [1], []):
        touch(frontend, 40, 40)
        assert [square[3] for square in wait_for_painted(frontend, tree_node, len(strengths))] == strengths
        frontend.page.wait_for_timeout(150)


HELD_ANSWERS = """() => { const real = window.realFetch = app.api.fetchApi; window.held = [];
    app.api.fetchApi = async function (route, ...rest) {
        const answer = await real.call(this, route, ...rest);
        if (String(route).includes("quadtree_tiled_diffusion/tree")) await new Promise((done) => held.push(done));
        return answer } }"""


def test_a_touch_goes_on_from_the_one_before_however_late_the_server_answers(frontend, tree_node):
    run_and_show(frontend, tree_node)
    page = frontend.page
    page.evaluate(HELD_ANSWERS)
    try:
        for held, strengths in enumerate(([0], [1], []), 1):
            touch(frontend, 40, 40)
            assert [square[3] for square in wait_for_painted(frontend, tree_node, len(strengths))] == strengths
            # The answer to the first comes when the second touch is done, and the second is asked for.
            if held > 1:
                page.evaluate("held.shift()()")
            page.wait_for_function("held.length === 1")
    finally:
        page.evaluate("() => { app.api.fetchApi = window.realFetch; held.forEach((done) => done()) }")
    frontend.page.wait_for_timeout(500)
    assert painted(frontend, tree_node) == []


def drag(frontend, start: tuple[float, float], end: tuple[float, float]) -> None:
    mouse = frontend.page.mouse
    mouse.move(*point_on_page(frontend, *start))
    mouse.down()
    mouse.move(*point_on_page(frontend, *end))
    mouse.up()


def press_within_a_frame(frontend, key: str) -> None:
    """Press Control and a key, and let both go before the page draws again: the host acts on keys with the next frame."""
    frontend.page.keyboard.down("Control")
    frontend.page.wait_for_timeout(100)
    frontend.page.evaluate(
        """key => { const at = document.activeElement; const options = { key, ctrlKey: true, bubbles: true, cancelable: true };
        at.dispatchEvent(new KeyboardEvent("keydown", options)); at.dispatchEvent(new KeyboardEvent("keyup", options));
        at.dispatchEvent(new KeyboardEvent("keyup", { key: "Control", bubbles: true })) }""", key)
    frontend.page.keyboard.up("Control")


def test_dragging_paints_and_the_hosts_undo_takes_back_stroke_by_stroke(frontend, tree_node):
    frontend.set_value(tree_node, "detail_budget", 1.0)
    sent = run_and_show(frontend, tree_node)
    drag(frontend, (20, 20), (250, 20))
    assert [square[3] for square in wait_for_painted(frontend, tree_node, 4)] == [0, 0, 0, 0]
    frontend.page.wait_for_timeout(300)
    frontend.shot("painted")
    drag(frontend, (20, 300), (150, 300))
    wait_for_painted(frontend, tree_node, 7)
    frontend.page.locator(".qtd-top").focus()
    for key, amount in (("z", 4), ("y", 7), ("z", 4), ("z", 0)):
        press_within_a_frame(frontend, key)
        wait_for_painted(frontend, tree_node, amount)
        frontend.page.wait_for_timeout(500)
        wait_for_leaves(frontend, sent["leaves"])
        assert len(painted(frontend, tree_node)) == amount
        assert frontend.page.locator(".qtd").count() == 1


def test_the_keyboard_reaches_every_leaf(frontend, tree_node):
    frontend.set_value(tree_node, "detail_budget", 1.0)
    run_and_show(frontend, tree_node)
    keys = frontend.page.keyboard
    frontend.page.locator(".qtd-top").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        keys.press(key)
    assert wait_for_painted(frontend, tree_node, 1) == [[64, 64, 64, 0]]
    assert frontend.page.locator(".qtd-live").text_content() == "Kept exactly."
    keys.press("Escape")
    assert frontend.page.evaluate("document.activeElement.className").find("qtd-top") == -1
    frontend.page.get_by_role("button", name="Clear", exact=True).click()
    assert frontend.value(tree_node, "edits") == ""


def test_widget_values_stay_in_place_after_a_reload(frontend, tree_node):
    values = {**SETTINGS, "detail_budget": 0.33, "min_leaf": 32, "max_leaf": 512, "max_denoise": 0.8, "metric": "combined"}
    for name, value in values.items():
        frontend.set_value(tree_node, name, value)
    saved = frontend.workflow()
    assert next(node for node in saved["nodes"] if str(node["id"]) == tree_node)["widgets_values"] == list(values.values())
    frontend.load(saved)
    assert {name: frontend.value(tree_node, name) for name in values} == values


@SOME
def test_edits_that_are_not_edits_are_named_on_the_node_and_refused(frontend, tree_node):
    run_and_show(frontend, tree_node)
    frontend.set_value(tree_node, "edits", "<img src=x onerror=alert(1)>")
    frontend.page.wait_for_selector(".qtd-error")
    assert line(frontend).startswith("edits: expected nothing, or")
    with pytest.raises(host_server.HostError, match="edits: expected nothing, or"):
        frontend.server.run_graph(frontend.prompt())
    frontend.page.get_by_role("button", name="Clear", exact=True).click()
    frontend.page.wait_for_selector(".qtd-line:not(.qtd-error)")
    frontend.problems.clear()  # Chromium writes refused requests to the console


@SOME
def test_a_picture_of_another_aspect_than_the_edits_is_refused_with_the_way_out(frontend, tree_node):
    Image.fromarray(skimage.data.astronaut()).save(frontend.server.base / "input" / "astronaut.png")
    run_and_show(frontend, tree_node)
    touch(frontend, 300, 100)
    wait_for_painted(frontend, tree_node, 1)
    graph = frontend.prompt()
    next(node for node in graph.values() if node["class_type"] == "LoadImage")["inputs"]["image"] = "astronaut.png"
    with pytest.raises(host_server.HostError, match="edits: painted on a picture of 600 x 400, but this one is 512 x 512.*Make `edits` empty"):
        frontend.server.run_graph(graph)


def contrast(picture: bytes) -> float:
    """Of the lightest to the darkest pixel, as WCAG 2 counts it."""
    pixels = numpy.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) / 255
    linear = numpy.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return (luminance.max() + 0.05) / (luminance.min() + 0.05)


@SOME
@pytest.mark.parametrize("palette", ["light", "dark"])
def test_text_stands_out_in_the_theme(frontend, tree_node, palette):
    frontend.page.evaluate("palette => app.extensionManager.setting.set('Comfy.ColorPalette', palette)", palette)
    run_and_show(frontend, tree_node)
    touch(frontend, 300, 100)
    frontend.page.wait_for_selector(".qtd-button:enabled")
    frontend.page.wait_for_timeout(500)
    frontend.shot(palette)
    for part in (".qtd-line", ".qtd-button >> nth=0", ".qtd-legend span >> nth=0", ".qtd-tip"):
        assert contrast(frontend.page.locator(part).screenshot()) > 4.5, part
    frontend.set_value(tree_node, "max_leaf", 100)
    frontend.page.wait_for_selector(".qtd-error")
    assert contrast(frontend.page.locator(".qtd-line").screenshot()) > 4.5
    assert "max_leaf: expected min_leaf (64) doubled" in line(frontend)
    frontend.problems.clear()  # Chromium writes refused requests to the console


@pytest.mark.parametrize("shared_frontend", ["newer-nodes2"], indirect=True)
def test_a_second_tab_has_its_own_tree(frontend, tree_node, browser):
    sent = run_and_show(frontend, tree_node)
    with opened(browser, frontend.server, frontend.name) as second:
        other_node = build_graph(second)
        assert "Run the graph once" in line(second)
        Image.fromarray(skimage.data.astronaut()).save(frontend.server.base / "input" / "astronaut.png")
        second.set_value(second.page.evaluate("() => String(app.graph.nodes.find(node => node.type === 'LoadImage').id)"), "image", "astronaut.png")
        other = run_and_show(second, other_node)
        assert other["picture"] != sent["picture"]
        frontend.set_value(tree_node, "detail_budget", 0.8)
        wait_for_leaves(frontend, leaves_on_server(frontend, sent, detail_budget=0.8))
        wait_for_leaves(second, other["leaves"])


@SOME
def test_a_node_removed_while_it_asks_leaves_nothing_behind(frontend, tree_node):
    run_and_show(frontend, tree_node)
    frontend.page.evaluate(
        """id => { const node = app.graph.getNodeById(id); const dial = node.widgets.find(w => w.name === 'detail_budget');
        dial.value = 0.7; dial.callback(0.7); setTimeout(() => app.graph.remove(node), 35) }""", tree_node)
    frontend.page.wait_for_timeout(500)
    assert frontend.page.locator(".qtd").count() == 0


def shown_texts(frontend) -> list[str]:
    """All that the page shows as text or in fields, and what the canvas writes into the widgets that it draws itself."""
    return frontend.page.evaluate(
        """() => [document.body.innerText, ...[...document.querySelectorAll("input, textarea")].map(field => field.value),
        ...app.graph.nodes.flatMap(node => (node.widgets ?? []).filter(w => !w.element && node.isWidgetVisible(w)).map(w => String(w.value)))]""")


def test_what_is_painted_is_nowhere_to_be_read_as_json(frontend, tree_node):
    run_and_show(frontend, tree_node)
    touch(frontend, 300, 100)
    wait_for_painted(frontend, tree_node, 1)
    frontend.page.evaluate("() => app.extensionManager.setting.set('Comfy.Node.AlwaysShowAdvancedWidgets', true)")
    frontend.until("id => app.graph.getNodeById(id).widgets.length === 8", tree_node)
    assert [text for text in shown_texts(frontend) if '"squares"' in text] == []
    frontend.page.evaluate("() => app.extensionManager.setting.set('Comfy.Node.AlwaysShowAdvancedWidgets', false)")


def test_edits_can_come_by_a_wire_and_the_node_says_so(frontend, tree_node):
    sent = run_and_show(frontend, tree_node)
    touch(frontend, 300, 100)
    own = wait_for_painted(frontend, tree_node, 1)
    text = frontend.add("PrimitiveString", (0, 500))
    frontend.set_value(text, "value", json.dumps({"size": [600, 400], "squares": [[0, 0, 256, 1]]}))
    frontend.link(text, 0, tree_node, "edits")
    frontend.page.wait_for_selector(".qtd-wired", state="visible")
    assert frontend.prompt()[tree_node]["inputs"]["edits"] == [text, 0]
    touch(frontend, 40, 300)
    assert frontend.page.locator(".qtd-live").text_content().startswith("edits is wired")
    assert frontend.page.get_by_role("button", name="Clear", exact=True).is_disabled()
    assert painted(frontend, tree_node) == own
    saved = frontend.workflow()
    assert mask_pixel(frontend, frontend.run(), 128, 128) == 255
    frontend.shot("wired")
    frontend.load(saved)
    assert painted(frontend, tree_node) == own
    frontend.page.wait_for_selector(".qtd-wired", state="visible")
    frontend.page.evaluate("id => { const node = app.graph.getNodeById(id); node.disconnectInput(node.inputs.findIndex(input => input.name === 'edits')) }", tree_node)
    frontend.page.wait_for_selector(".qtd-wired", state="hidden")
    assert json.loads(frontend.prompt()[tree_node]["inputs"]["edits"])["squares"] == own
    assert sent["settings"]["edits"] == ""


def test_the_threshold_is_offered_while_the_budget_is_0_or_wired_and_keeps_its_value(frontend, tree_node):
    frontend.set_value(tree_node, "content_threshold", 40.0)
    assert not frontend.is_offered(tree_node, "content_threshold")
    sent = run_and_show(frontend, tree_node)
    frontend.set_value(tree_node, "detail_budget", 0.0)
    wait_for_leaves(frontend, leaves_on_server(frontend, sent, detail_budget=0.0, content_threshold=40.0))
    assert frontend.is_offered(tree_node, "content_threshold")
    frontend.shot("threshold")
    saved = frontend.workflow()
    frontend.turn_dial(tree_node, 0.5)
    frontend.until("id => app.graph.getNodeById(id).widgets[1].hidden", tree_node)
    frontend.page.wait_for_function("() => true", polling="raf")
    assert not frontend.is_offered(tree_node, "content_threshold")
    assert frontend.prompt()[tree_node]["inputs"]["content_threshold"] == 40.0
    assert frontend.value(tree_node, "content_threshold") == 40.0
    budget = frontend.add("PrimitiveFloat", (0, 500))
    frontend.link(budget, 0, tree_node, "detail_budget")
    frontend.until("id => !app.graph.getNodeById(id).widgets[1].hidden", tree_node)
    frontend.load(saved)
    frontend.page.wait_for_function("() => true", polling="raf")
    assert frontend.is_offered(tree_node, "content_threshold") and frontend.value(tree_node, "content_threshold") == 40.0


@SOME
def test_a_hidden_threshold_has_no_socket_under_another_widgets(frontend, tree_node):
    frontend.set_value(tree_node, "detail_budget", 0.0)
    frontend.until("id => app.graph.getNodeById(id).widgets[1].hidden === false", tree_node)
    frontend.set_value(tree_node, "detail_budget", 0.5)
    frontend.until("id => app.graph.getNodeById(id).widgets[1].hidden", tree_node)
    frontend.until(
        """id => { app.canvas.draw(true, true); const node = app.graph.getNodeById(id); const [hidden, next] = [1, 2].map(i => node.widgets[i]);
        return Math.abs(hidden.y - next.y) > 10 }""", tree_node)


def test_a_copy_has_what_was_painted_on_the_node(frontend, tree_node):
    run_and_show(frontend, tree_node)
    touch(frontend, 300, 100)
    squares = wait_for_painted(frontend, tree_node, 1)
    frontend.page.evaluate(
        "id => { app.canvas.selectItems([app.graph.getNodeById(id)]); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard() }", tree_node)
    frontend.until("() => app.graph.nodes.filter(node => node.type === 'QuadtreeFromImage').length === 2")
    copies = frontend.page.evaluate("() => app.graph.nodes.filter(node => node.type === 'QuadtreeFromImage').map(node => String(node.id))")
    assert [painted(frontend, copy) for copy in copies] == [squares, squares]


@SOME
def test_a_subgraph_keeps_what_was_painted(frontend, tree_node):
    run_and_show(frontend, tree_node)
    touch(frontend, 300, 100)
    squares = wait_for_painted(frontend, tree_node, 1)
    frontend.page.evaluate("id => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])) }", tree_node)
    saved = frontend.workflow()
    assert json.loads(saved["definitions"]["subgraphs"][0]["nodes"][0]["widgets_values"][7])["squares"] == squares
    frontend.load(saved)
    (tree,) = (node for node in frontend.prompt().values() if node["class_type"] == "QuadtreeFromImage")
    assert json.loads(tree["inputs"]["edits"])["squares"] == squares
    assert mask_pixel(frontend, frontend.run(), 300, 100) == 0
    frontend.page.evaluate("() => { const outer = app.graph.nodes.find(node => node.subgraph); app.canvas.openSubgraph(outer.subgraph, outer) }")
    frontend.page.wait_for_selector(".qtd-line:has-text('kept exactly')")
    frontend.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")


def texts_of(locale: str) -> dict:
    return json.loads((ROOT / "locales" / locale / "main.json").read_text("utf-8"))["quadtreeTiledDiffusion"]


# Chinese as it is written in Taiwan has no texts of its own, French none at all.
@SOME
@pytest.mark.parametrize("locale, family", [("zh", "zh"), ("ja", "ja"), ("zh-TW", "zh"), ("fr", None)])
def test_the_picture_speaks_the_language_of_the_page(frontend, tree_node, locale, family):
    sent = run_and_show(frontend, tree_node)
    texts = texts_of(family) if family else {
        "strengthZero": "strength 0", "clear": "Clear", "tree": "{leaves} leaves, {kept} % kept exactly. Estimated cost: {cost} % of sampling everything.",
        "errors": {"max_leaf_doubled": "max_leaf: expected min_leaf ({min_leaf}) doubled some times, got {max_leaf}. The nearest are {below} and {above}."}}
    frontend.set_locale(locale)
    try:
        said = texts["tree"].format(leaves=sent["leaves"], kept=30, cost=97)
        frontend.until("said => document.querySelector('.qtd-line')?.textContent === said", said)
        assert frontend.page.locator(".qtd-legend span >> nth=0").inner_text() == texts["strengthZero"]
        assert frontend.page.locator(".qtd-button").inner_text() == texts["clear"]
        frontend.set_value(tree_node, "max_leaf", 104)
        frontend.page.wait_for_selector(".qtd-error")
        assert line(frontend) == texts["errors"]["max_leaf_doubled"].format(min_leaf=64, max_leaf=104, below=64, above=128)
        frontend.shot(f"locale-{locale}")
        frontend.set_value(tree_node, "max_leaf", 256)
        frontend.until("said => document.querySelector('.qtd-line')?.textContent === said", said)
    finally:
        frontend.set_locale("en")
        frontend.until("() => document.querySelector('.qtd-line')?.textContent.includes('sampling everything')")
    frontend.problems.clear()  # Chromium writes refused requests to the console


@SOME
def test_widgets_that_do_not_fit_are_marked_by_the_host(frontend, tree_node):
    frontend.set_value(tree_node, "min_denoise", 0.9)
    frontend.set_value(tree_node, "max_denoise", 0.2)
    frontend.page.evaluate("() => app.queuePrompt(0, 1).catch(() => {})")
    frontend.until("id => app.graph.getNodeById(id).has_errors", tree_node)
    if frontend.name.endswith("nodes2"):
        # The first in the host's own page, the second in the newer one.
        frontend.until(
            """id => ["min_denoise", "max_denoise"].every(name => [...document.querySelectorAll(`[data-node-id='${id}'] .text-node-stroke-error,
            [data-node-id='${id}'] [aria-invalid=true]`)].some(row => row.innerText.includes(name)))""", tree_node)
    else:
        frontend.until("id => app.graph.getNodeById(id).inputs.filter(i => i.hasErrors).map(i => i.name).includes('min_denoise')", tree_node)
    frontend.shot("refused")
    frontend.problems.clear()  # the page writes the refusal to the console


@SOME
def test_a_run_is_summed_up_on_the_node_that_patches_the_model(frontend):
    patch = build_sampling(frontend)
    line = frontend.page.locator(".qtd-run")
    assert line.inner_text().startswith("After a run")
    frontend.run()
    frontend.page.wait_for_function("() => document.querySelector('.qtd-run').textContent.includes('kept exactly')")
    assert line.inner_text() in frontend.server.log()
    check_time(frontend, patch)
    assert "qtd_run" not in json.dumps(frontend.workflow())
    known = frontend.server.get("/object_info/QuadtreeTiledDiffusion")["QuadtreeTiledDiffusion"]["input"]
    assert set(frontend.prompt()[patch]["inputs"]) == {*known["required"], *known["optional"]} - {"original", "sigmas"}
    frontend.page.wait_for_timeout(500)
    frontend.shot("run")


def change(frontend, node: str, name: str, value) -> None:
    """Change a node's mode or one of its widgets, as one step of the host's undo."""
    frontend.page.evaluate(
        """([id, name, value]) => { const node = app.graph.getNodeById(id); const widget = node.widgets?.find(w => w.name === name);
        app.canvas.emitBeforeChange(); if (widget) widget.value = value; else node[name] = value; app.canvas.emitAfterChange() }""", [node, name, value])


def wait_for_time(frontend, shown: bool) -> None:
    frontend.until("shown => document.querySelector('.qtd-line').textContent.includes(', about ') === shown", shown)


def seconds_shown(frontend) -> float:
    return float(re.search(r"about ([\d.]+) s\.$", line(frontend))[1])


def check_time(frontend, patch: str) -> None:
    """The line under the tree tells the time of the run, until something that decides about it is changed."""
    model, sampler = (frontend.page.evaluate("type => String(app.graph.nodes.find(node => node.type === type).id)", kind) for kind in ("UNETLoader", "KSampler"))
    wait_for_time(frontend, True)
    assert seconds_shown(frontend) > 0
    for node, name, value, before in ((model, "weight_dtype", "fp8_e4m3fn", "default"), (sampler, "steps", 8, 4), (patch, "mode", 4, 0)):
        change(frontend, node, name, value)
        wait_for_time(frontend, False)
        change(frontend, node, name, before)
        wait_for_time(frontend, True)


def tell_of_run(frontend, patch: str, seconds: float) -> None:
    """Send the page what the server sends it after a run."""
    frontend.page.evaluate(
        """([node, seconds]) => app.api.dispatchEvent(new CustomEvent("quadtree_tiled_diffusion.run",
        { detail: { node, text: "", values: { seconds, windows: 1, grid_windows: 2, steps: 20, cost: 0.5, kept: 0 } } }))""", [patch, seconds])


@pytest.fixture
def timed(frontend, tree_node) -> tuple[str, str, str]:
    """A tree of a picture of 1800 x 1200 px, wired to a patch through a Quadtree Adjust and a reroute; their ids."""
    load = frontend.page.evaluate("() => String(app.graph.nodes.find(node => node.type === 'LoadImage').id)")
    scale, adjust, reroute, patch = (frontend.add(name, place) for name, place in (
        ("ImageScale", (0, 500)), ("QuadtreeAdjust", (800, 0)), ("Reroute", (1100, 0)), ("QuadtreeTiledDiffusion", (1200, 0))))
    for name, value in (("width", 1800), ("height", 1200)):
        frontend.set_value(scale, name, value)
    frontend.link(load, 0, scale, "image")
    frontend.link(scale, 0, tree_node, "image")
    for source, target, name in ((tree_node, adjust, "quadtree"), (adjust, reroute, ""), (reroute, patch, "quadtree")):
        frontend.link(source, 0, target, name)
    return tree_node, adjust, patch


@SOME
def test_the_time_under_the_tree_is_the_last_runs_scaled_to_the_cost(frontend, timed):
    tree, _, patch = timed
    sent = run_and_show(frontend, tree)
    assert "about" not in line(frontend)
    tell_of_run(frontend, patch, 50.0)
    wait_for_time(frontend, True)
    assert seconds_shown(frontend) == 50
    frontend.run()  # the host has the result in its cache, and gives it after the run
    for budget in (0.15, 0.8):
        frontend.set_value(tree, "detail_budget", budget)
        cost = frontend.server.post("/quadtree_tiled_diffusion/tree", {"picture": sent["picture"], **SETTINGS, **sent["settings"], "detail_budget": budget})["cost"]
        frontend.until(f"() => document.querySelector('.qtd-line').textContent.includes(' {round(cost * 100)} % of')")
        assert seconds_shown(frontend) == pytest.approx(50 * cost / sent["cost"], abs=0.6)
    scale = frontend.page.evaluate("() => String(app.graph.nodes.find(node => node.type === 'ImageScale').id)")
    frontend.set_value(scale, "width", 1200)
    frontend.set_value(scale, "height", 800)
    frontend.run()
    wait_for_time(frontend, False)


@SOME
def test_the_time_is_found_in_subgraphs_and_only_where_the_tree_goes(frontend, timed):
    tree, adjust, patch = timed
    run_and_show(frontend, tree)
    other = frontend.add("QuadtreeTiledDiffusion", (1200, 500))
    tell_of_run(frontend, other, 80.0)
    tell_of_run(frontend, patch, 50.0)
    wait_for_time(frontend, True)
    assert seconds_shown(frontend) == 50
    frontend.link(tree, 0, other, "quadtree")
    wait_for_time(frontend, False)
    tell_of_run(frontend, other, 30.0)
    wait_for_time(frontend, True)
    assert seconds_shown(frontend) == 80
    frontend.page.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", other)
    inner = frontend.page.evaluate(
        """ids => { const { node } = app.graph.convertToSubgraph(new Set(ids.map(id => app.graph.getNodeById(id)))); return String(node.id) }""", [adjust, patch])
    wait_for_time(frontend, False)
    tell_of_run(frontend, f"{inner}:{patch}", 20.0)
    wait_for_time(frontend, True)
    assert seconds_shown(frontend) == 20


@SOME
def test_a_sampling_error_is_told_on_the_node_that_patches_the_model(frontend):
    build_sampling(frontend)
    load, encode = (frontend.page.evaluate("type => String(app.graph.nodes.find(node => node.type === type).id)", kind) for kind in ("LoadImage", "VAEEncode"))
    scale = frontend.add("ImageScale", (350, 900))
    for name in ("width", "height"):
        frontend.set_value(scale, name, 256)
    frontend.link(load, 0, scale, "image")
    frontend.link(scale, 0, encode, "pixels")
    with pytest.raises(host_server.HostError, match=r"KSampler .node \d+.: ValueError: Quadtree Tiled Diffusion, quadtree: made for a picture of 600 x 400"):
        frontend.server.run_graph(frontend.prompt())
    frontend.page.evaluate("() => app.queuePrompt(0, 1)")
    frontend.page.wait_for_selector(".qtd-run.qtd-error")
    assert frontend.page.locator(".qtd-run").inner_text().startswith("quadtree: made for a picture of 600 x 400")
    frontend.shot("failed")


def build_sampling(frontend) -> str:
    """A graph that samples a photo with a small FLUX; the id of the node that patches the model."""
    for name in ("diffusion_models/flux1-dev.safetensors", "text_encoders/clip_l.safetensors", "vae/ae.safetensors"):
        write_stand_in(frontend.server.base / "models", name)
    tree = build_graph(frontend)
    places = {
        "UNETLoader": (0, 500), "CLIPLoader": (0, 650), "VAELoader": (0, 800), "CLIPTextEncode": (350, 750), "VAEEncode": (800, 750),
        "QuadtreeTiledDiffusion": (800, 50), "KSampler": (1150, 50), "VAEDecode": (1150, 400), "PreviewImage": (1150, 500)}
    ids = {name: frontend.add(name, place) for name, place in places.items()} | {
        "QuadtreeFromImage": tree, "LoadImage": frontend.page.evaluate("() => String(app.graph.nodes.find(node => node.type === 'LoadImage').id)")}
    for name, widget, value in (
        ("UNETLoader", "unet_name", "flux1-dev.safetensors"), ("CLIPLoader", "clip_name", "clip_l.safetensors"), ("CLIPLoader", "type", "sd3"),
        ("VAELoader", "vae_name", "ae.safetensors"), ("KSampler", "steps", 4), ("KSampler", "cfg", 1.0),
        ("QuadtreeTiledDiffusion", "min_window", 64), ("QuadtreeTiledDiffusion", "max_window", 128),
    ):
        frontend.set_value(ids[name], widget, value)
    for source, output, target, name in (
        ("UNETLoader", 0, "QuadtreeTiledDiffusion", "model"), ("QuadtreeFromImage", 0, "QuadtreeTiledDiffusion", "quadtree"),
        ("QuadtreeTiledDiffusion", 0, "KSampler", "model"), ("CLIPLoader", 0, "CLIPTextEncode", "clip"), ("CLIPTextEncode", 0, "KSampler", "positive"),
        ("CLIPTextEncode", 0, "KSampler", "negative"), ("LoadImage", 0, "VAEEncode", "pixels"), ("VAELoader", 0, "VAEEncode", "vae"),
        ("VAEEncode", 0, "KSampler", "latent_image"), ("KSampler", 0, "VAEDecode", "samples"), ("VAELoader", 0, "VAEDecode", "vae"),
        ("VAEDecode", 0, "PreviewImage", "images"),
    ):
        frontend.link(ids[source], output, ids[target], name)
    return ids["QuadtreeTiledDiffusion"]


BYPASSED = 4


def build_composite(frontend) -> tuple[dict, dict]:
    """A graph with all six nodes, whose result is a negative; the ids of its nodes, and the workflow as first versions saved it."""
    ids = {name: frontend.add(name, place) for name, place in {
        "LoadImage": (0, 0), "ImageInvert": (0, 400), "QuadtreeFromImage": (350, 0), "QuadtreeAdjust": (800, 0), "QuadtreeToMask": (800, 300),
        "MaskPreview": (1150, 300), "QuadtreeComposite": (800, 500), "PreviewImage": (1150, 600), "UNETLoader": (0, 600), "QuadtreeTiledDiffusion": (350, 600),
        "ModelSamplingFlux": (800, 700)}.items()}
    frontend.set_value(ids["LoadImage"], "image", PICTURE)
    for source, output, target, name in (
        ("LoadImage", 0, "ImageInvert", "image"), ("LoadImage", 0, "QuadtreeFromImage", "image"), ("QuadtreeFromImage", 0, "QuadtreeAdjust", "quadtree"),
        ("QuadtreeAdjust", 0, "QuadtreeToMask", "quadtree"), ("QuadtreeToMask", 0, "MaskPreview", "mask"), ("LoadImage", 0, "QuadtreeComposite", "original"),
        ("ImageInvert", 0, "QuadtreeComposite", "image"), ("QuadtreeAdjust", 0, "QuadtreeComposite", "quadtree"),
        ("QuadtreeComposite", 0, "PreviewImage", "images"), ("UNETLoader", 0, "QuadtreeTiledDiffusion", "model"),
        ("QuadtreeAdjust", 0, "QuadtreeTiledDiffusion", "quadtree"), ("QuadtreeTiledDiffusion", 0, "ModelSamplingFlux", "model"),
    ):
        frontend.link(ids[source], output, ids[target], name)
    old = frontend.workflow()
    node = next(node for node in old["nodes"] if node["type"] == "QuadtreeComposite")
    node["inputs"].sort(key=lambda entry: ["original", "image", "quadtree", "feather"].index(entry["name"]))
    slots = {entry["link"]: index for index, entry in enumerate(node["inputs"])}
    for link in old["links"]:
        if str(link[3]) == str(node["id"]):
            link[4] = slots[link[0]]
    return ids, old


def bypass(frontend, node: str) -> None:
    frontend.page.evaluate("([id, mode]) => { app.graph.getNodeById(id).mode = mode }", [node, BYPASSED])


@pytest.mark.parametrize("saved_by", ["this version", "first versions", "first versions, bypassed"])
def test_a_bypassed_composite_passes_on_the_result(frontend, saved_by):
    ids, old = build_composite(frontend)
    if saved_by != "this version":
        if saved_by.endswith("bypassed"):
            next(node for node in old["nodes"] if node["type"] == "QuadtreeComposite")["mode"] = BYPASSED
        frontend.load(old)
    composite = ids["QuadtreeComposite"]
    if not saved_by.endswith("bypassed"):
        inputs = frontend.prompt()[composite]["inputs"]
        assert inputs == {"original": [ids["LoadImage"], 0], "image": [ids["ImageInvert"], 0], "quadtree": [ids["QuadtreeAdjust"], 0], "feather": 32}
        bypass(frontend, composite)
    for _ in range(2):
        told = frontend.prompt()
        assert composite not in told
        assert told[ids["PreviewImage"]]["inputs"]["images"] == [ids["ImageInvert"], 0]
        frontend.load(frontend.workflow())


@SOME
@pytest.mark.parametrize("node, reader, name, source", [
    ("QuadtreeAdjust", "QuadtreeComposite", "quadtree", ["QuadtreeFromImage", 0]), ("QuadtreeTiledDiffusion", "ModelSamplingFlux", "model", ["UNETLoader", 0])])
def test_a_bypassed_node_passes_on_what_it_changes(frontend, node, reader, name, source):
    ids, _ = build_composite(frontend)
    bypass(frontend, ids[node])
    assert frontend.page.evaluate(
        "async ([reader, name]) => (await app.graphToPrompt()).output[reader]?.inputs[name]", [ids[reader], name]) == [ids[source[0]], source[1]]


@SOME
def test_a_bypassed_tree_passes_on_the_picture_and_no_tree(frontend):
    ids, _ = build_composite(frontend)
    frontend.link(ids["QuadtreeFromImage"], 1, ids["PreviewImage"], "images")
    bypass(frontend, ids["QuadtreeFromImage"])
    told = frontend.prompt()
    assert told[ids["PreviewImage"]]["inputs"]["images"] == [ids["LoadImage"], 0]
    assert "quadtree" not in told[ids["QuadtreeAdjust"]]["inputs"]


@SOME
def test_a_mask_node_saved_before_edges_opens_with_their_start_value(frontend):
    node = frontend.add("QuadtreeFromMask")
    frontend.set_value(node, "min_leaf", 32)
    saved = frontend.workflow()
    entry = next(entry for entry in saved["nodes"] if str(entry["id"]) == node)
    entry["widgets_values"] = entry["widgets_values"][:2]
    entry["inputs"] = [slot for slot in entry["inputs"] if slot["name"] != "edges"]
    frontend.load(saved)
    assert [frontend.value(node, name) for name in ("min_leaf", "max_leaf", "edges")] == [32, 0, "keep black"]

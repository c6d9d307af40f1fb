"""The host's real pages in headless Chromium: both renderers, in the frontend that the host has and in a newer one."""
from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import skimage.data
from PIL import Image
from conftest import ROOT, host_server, load_module

FRONTEND_PIN = "comfyui-frontend-package==1.58.1"
FRONTEND_SHA256 = "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_ARGUMENTS = (
    "--no-sandbox", "--use-gl=swiftshader", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run")
RENDERERS = ("classic", "nodes2", "newer-classic", "newer-nodes2")
PICTURE = "coffee.png"
SCREENSHOTS = "QTD_SCREENSHOTS"
WAIT_MS = 30_000


def missing(what: str) -> None:
    """Skip the test for want of something; in CI, where nothing may be missing, fail it."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


def browser_file() -> str | None:
    """The Chromium or Chrome to use: the one CHROME names, else one in PATH."""
    given = os.environ.get("CHROME")
    return given or next(filter(None, map(shutil.which, BROWSERS)), None)


def newer_frontend() -> Path:
    """The folder of the pinned newer frontend, fetched into the cache once."""
    run = load_module("run_for_frontend", ROOT / "run.py")
    cache = run.cache_folder()
    folder = cache / FRONTEND_PIN.replace("==", "-")
    cache.mkdir(parents=True, exist_ok=True)
    with run.locked(cache):
        if not folder.exists():
            fetch_frontend(run, folder)
    return folder / "comfyui_frontend_package" / "static"


def fetch_frontend(run, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    wanted = partial / "requirements.txt"
    wanted.write_text(f"{FRONTEND_PIN} --hash=sha256:{FRONTEND_SHA256}\n", "utf-8")
    try:
        run.run_pip([*run.pip_command(Path(sys.prefix)), "download", "--no-deps", "--dest", str(partial), "--requirement", str(wanted)], partial / "pip.log")
    except run.SetupError as problem:
        missing(f"{FRONTEND_PIN}: {problem}")
    with zipfile.ZipFile(next(partial.glob("*.whl"))) as wheel:
        wheel.extractall(partial)
    partial.rename(folder)


@dataclass
class Frontend:
    """One page of one server. name: as in RENDERERS. problems: errors that the page wrote to its console."""

    server: object
    page: object
    name: str
    problems: list[str] = field(default_factory=list)

    def open(self, query: str = "") -> None:
        """Load the page anew, and wait until the graph can be used."""
        self.page.goto(self.server.url + "/" + query)
        self.page.wait_for_function("Boolean(window.app?.graph && window.app.vueAppReady && LiteGraph.registered_node_types.QuadtreeFromImage)", timeout=2 * WAIT_MS)
        # The page begins with the host's own example and writes what it lacks of it to the console.
        self.page.wait_for_load_state("networkidle")
        self.clear()
        self.problems.clear()

    def clear(self) -> None:
        """Show an empty graph; of a new id, since the page keeps widgets' values by the ids of graph and node."""
        self.load({"id": str(uuid.uuid4()), "last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4})

    def load(self, workflow: dict) -> None:
        """Open a workflow in place of what is open."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow, true, true)", workflow)
        self.page.wait_for_timeout(200)

    def add(self, node_type: str, position=(0, 0)) -> str:
        """Add a node and return its id."""
        return self.page.evaluate(
            """([type, position]) => { const node = LiteGraph.createNode(type); node.pos = position; app.graph.add(node); return String(node.id) }""",
            [node_type, list(position)])

    def link(self, source: str, output: int, target: str, input_name: str) -> None:
        """Connect a node's output to another's input of that name."""
        self.page.evaluate(
            """([source, output, target, name]) => { const to = app.graph.getNodeById(target);
            app.graph.getNodeById(source).connect(output, to, to.inputs.findIndex(input => input.name === name)) }""", [source, output, target, input_name])

    def value(self, node: str, widget: str):
        return self.page.evaluate("([id, name]) => app.graph.getNodeById(id).widgets.find(w => w.name === name).value", [node, widget])

    def set_value(self, node: str, widget: str, value) -> None:
        """Set a widget as its user does: its value, then what it calls back."""
        self.page.evaluate(
            """([id, name, value]) => { const widget = app.graph.getNodeById(id).widgets.find(w => w.name === name);
            widget.value = value; widget.callback?.(value) }""", [node, widget, value])

    def turn_dial(self, node: str, value: float) -> float:
        """Turn the node's detail_budget by hand; what it is then."""
        if self.name.endswith("nodes2"):
            field = self.page.locator(f"[data-node-id='{node}'] input[role=spinbutton]").first
            field.click()
            for keys in ("Control+a", *str(value), "Enter"):
                field.press(keys)
        else:
            x, y = self.page.evaluate(
                """([id, value]) => { const node = app.graph.getNodeById(id); const { scale, offset } = app.canvas.ds; const box = app.canvas.canvas.getBoundingClientRect();
                return [box.x + (node.pos[0] + 15 + (node.size[0] - 30) * value + offset[0]) * scale, box.y + (node.pos[1] + node.widgets[0].last_y + 10 + offset[1]) * scale] }""",
                [node, value])
            self.page.mouse.click(x, y)
        return self.value(node, "detail_budget")

    def until(self, condition: str, argument=None) -> None:
        """Wait until a function of JavaScript holds for the argument."""
        self.page.wait_for_function(condition, arg=argument)

    def is_offered(self, node: str, widget: str) -> bool:
        """Whether the node shows a widget, as its renderer says."""
        if self.name.endswith("nodes2"):
            return self.page.locator(f"[data-node-id='{node}']").get_by_text(widget, exact=True).count() > 0
        return self.page.evaluate(
            "([id, name]) => { const node = app.graph.getNodeById(id); return node.isWidgetVisible(node.widgets.find(w => w.name === name)) }", [node, widget])

    def set_locale(self, locale: str) -> None:
        """Change the language of the page, as its settings do, and wait until the host has built the graph anew."""
        self.page.evaluate("locale => { for (const node of app.graph.nodes) node.isOld = true; return app.extensionManager.setting.set('Comfy.Locale', locale) }", locale)
        self.until("() => app.graph.nodes.length > 0 && !app.graph.nodes.some(node => node.isOld)")

    def workflow(self) -> dict:
        """What the page would save."""
        return self.page.evaluate("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).workflow))")

    def prompt(self) -> dict:
        """What the page would queue, in API format."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def run(self) -> dict:
        """Queue the graph and wait for its end; its outputs by node id, as /history gives them. A failure raises HostError."""
        before = set(self.server.get("/history"))
        self.page.evaluate("async () => { await app.queuePrompt(0, 1) }")
        self.page.wait_for_timeout(100)
        for _ in range(600):
            finished = {key: entry for key, entry in self.server.get("/history").items() if key not in before and entry["status"]["completed"]}
            if finished:
                self.page.wait_for_timeout(200)
                return host_server.HostServer._outputs(next(iter(finished.values())))
            self.page.wait_for_timeout(100)
        raise TimeoutError("the graph did not end")

    def shot(self, name: str) -> None:
        """Write a screenshot into the folder that QTD_SCREENSHOTS names, if it names one."""
        folder = os.environ.get(SCREENSHOTS)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{folder}/{name}-{self.name}.png")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, shared by all tests that ask for it."""
    file = browser_file()
    if file is None:
        missing("no Chromium: install it (Debian, Ubuntu: apt install chromium), or set CHROME to the file of a Chromium or Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=file, args=list(BROWSER_ARGUMENTS))
        yield running
        running.close()


@pytest.fixture(scope="session")
def newer_server(comfyui_dir, tmp_path_factory):
    """A server that shows the newer frontend."""
    arguments = ("--cpu", "--front-end-root", str(newer_frontend()))
    with host_server.HostServer(comfyui_dir, tmp_path_factory.mktemp("newer"), arguments) as running:
        yield running


def is_problem(message) -> bool:
    """Whether a line in the console is an error, or says that something used is deprecated.

    The models of the host's example lie on the web, where its own page may not look for them.
    """
    if "Content Security Policy" in message.text:
        return False
    return message.type == "error" or (message.type == "warning" and "deprecated" in message.text)


@contextlib.contextmanager
def opened(browser, server, name: str):
    """A page of that server, with the renderer that the name ends with, in a browser profile of its own."""
    # LoadImage takes the first picture there is; the page complains of none.
    Image.fromarray(skimage.data.coffee()).save(server.base / "input" / PICTURE)
    server.post("/settings", {"Comfy.VueNodes.Enabled": name.endswith("nodes2"), "Comfy.TutorialCompleted": True})
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    frontend = Frontend(server, page, name)
    page.on("console", lambda message: frontend.problems.append(f"{message.text} ({message.location.get('url')})") if is_problem(message) else None)
    page.on("pageerror", lambda error: frontend.problems.append(str(error)))
    frontend.open()
    yield frontend
    context.close()


@pytest.fixture(scope="session", params=RENDERERS)
def shared_frontend(request, browser):
    """One page per renderer and frontend, shared by all tests that ask for it."""
    server = request.getfixturevalue("newer_server" if request.param.startswith("newer") else "server")
    with opened(browser, server, request.param) as frontend:
        yield frontend


@pytest.fixture
def frontend(shared_frontend):
    """The shared page with an empty graph. At the end no error may have been written to its console."""
    shared_frontend.clear()
    shared_frontend.problems.clear()
    yield shared_frontend
    assert shared_frontend.problems == []

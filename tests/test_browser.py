"""The tree on the node in real browsers: it shows what the server built, follows the dial, and can be painted on."""
from __future__ import annotations

import pytest
from browser_tools import PICTURE


@pytest.fixture
def tree_node(frontend):
    """A graph that loads a photo and builds its tree; the id of the node that builds it."""
    load, tree, mask, show = (frontend.add(name, place) for name, place in (
        ("LoadImage", (0, 0)), ("QuadtreeFromImage", (350, 0)), ("QuadtreeToMask", (800, 0)), ("MaskPreview", (800, 300))))
    frontend.set_value(load, "image", PICTURE)
    frontend.link(load, 0, tree, "image")
    frontend.link(tree, 0, mask, "quadtree")
    frontend.link(mask, 0, show, "mask")
    return tree


def wait_for_leaves(frontend, amount: int) -> None:
    frontend.page.wait_for_selector(f".qtd[data-leaves='{amount}']")


def test_after_a_run_the_overlay_shows_as_many_leaves_as_the_server_says(frontend, tree_node):
    outputs = frontend.run()
    wait_for_leaves(frontend, outputs[tree_node]["qtd_tree"][0]["leaves"])
    frontend.page.wait_for_timeout(1000)
    frontend.shot(f"first-{frontend.renderer}-{frontend.page.evaluate('window.__COMFYUI_FRONTEND_VERSION__')}")

"""What do the browser and the server say to each other? The tree of a picture that a node has seen, for other settings.

The node keeps the picture's statistics with the server, under a key that goes to the browser with the node's result;
the browser sends the key back with the settings that its widgets show. The tree is built by quadtree.py in both cases.

Whoever can reach the server can ask, so a request takes bounded time and memory whatever it is, and nobody is told of a
picture whose key he has not been given.
"""
from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import json
import math
import secrets
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from aiohttp import web

from .denoise_schedule import on_steps, share_at
from .drawing import VIRIDIS, strength_colour
from .painting import edit_quadtree, painted_cells, parse_edits
from .quadtree import METRICS, CellStatistics, Quadtree, check_leaves, coarsen, grow_quadtree, measure_cells
from .sampling_run import strengths_in_cells
from .settings import STEP_PX
from .tiled_diffusion import TiledDiffusion
from .utils import Refusal
from .windows import WindowCost, full_grid, plan_windows, window_sizes

ROUTE = "/quadtree_tiled_diffusion/tree"
EVENT = "quadtree_tiled_diffusion.run"

# The smallest leaf that the node offers: from its statistics those of all larger ones follow.
FINEST_PX = 8

# The estimate is for this many steps and for cells and patches of this size, as in most models.
STEPS = 20
CELL_PX = 8
PATCH_CELLS = 2

# What the server keeps and answers at most. A picture of 4096 x 4096 px takes 15 MB.
MOST_PICTURES = 16
MOST_BYTES = 256 << 20
LONGEST_REQUEST = 1 << 20
MOST_CELLS = 1 << 18
MOST_LEAVES = 50_000
LARGEST_LEAF = 8192
MOST_PAINTED = 1 << 29  # cells, those under several squares counted for each

# The server's threads belong to the host; so many requests are worked on, and so many may wait or arrive, at once.
AT_ONCE = 2
MOST_OPEN = 128
SECONDS_TO_ARRIVE = 20.0

NUMBERS = ("detail_budget", "content_threshold", "min_denoise", "max_denoise")
SIDES = ("min_leaf", "max_leaf")
TEXTS = ("metric", "edits")


class Pictures:
    """Statistics of the pictures that were seen last, by a key made from them and from a secret of this process."""

    def __init__(self):
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[str, CellStatistics] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, cells: CellStatistics) -> str:
        """Keep a picture's statistics and return its key; what was used longest ago goes when there is too much."""
        cells = dataclasses.replace(cells, **{name: value.cpu() for name, value in vars(cells).items() if torch.is_tensor(value)})
        key = _key(cells, self._secret)
        with self._lock:
            self._kept[key] = cells
            self._kept.move_to_end(key)
            while len(self._kept) > MOST_PICTURES or sum(map(_bytes, self._kept.values())) > MOST_BYTES:
                self._kept.popitem(last=False)
        return key

    def find(self, key: str) -> CellStatistics | None:
        """The statistics kept under a key, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)


PICTURES = web.AppKey("quadtree_tiled_diffusion", Pictures)


def running_server():
    """The host's server, or None where the host runs without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def kept_pictures() -> Pictures | None:
    """The running server's pictures, or None where there is none that answers for them."""
    server = running_server()
    return None if server is None else server.app.get(PICTURES)


def add_route(server) -> None:
    """Let the server keep pictures and answer for them; to be called before it starts."""
    pictures = server.app[PICTURES] = Pictures()
    desk = _Desk(pictures)

    @server.routes.post(ROUTE)
    async def tree(request: web.Request) -> web.Response:
        status, answer = await desk.answer(request)
        # Whatever takes it for a page finds no tag in it.
        text = json.dumps(answer).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        return web.Response(text=text, status=status, content_type="application/json", headers={"X-Content-Type-Options": "nosniff"})


class _Desk:
    """Where requests are taken in: few at once, and none that is too long, too slow or of another kind."""

    def __init__(self, pictures: Pictures):
        self._pictures = pictures
        self._open = 0
        self._places = asyncio.Semaphore(AT_ONCE)

    async def answer(self, request: web.Request) -> tuple[int, dict]:
        status, problem = self._refusal_of(request)
        if problem is not None:
            return status, said(problem)
        self._open += 1
        try:
            body = await asyncio.wait_for(_body_of(request), SECONDS_TO_ARRIVE)
            if body is None:
                return 413, said(_too_long())
            async with self._places:
                return await asyncio.to_thread(answer_to, self._pictures, body)
        except asyncio.TimeoutError:
            return 408, said(Refusal("slow", "The settings did not arrive in time. Change a setting to ask again."))
        finally:
            self._open -= 1

    def _refusal_of(self, request: web.Request) -> tuple[int, Refusal | None]:
        """Why a request is not read, by its headers alone; None if it is."""
        if request.content_type != "application/json":
            return 415, Refusal("no_json", "expected JSON.")
        # aiohttp unpacks what comes in, and its length is that of what was sent: as little as a thousandth of what would be read.
        if any(name.strip().lower() != "identity" for name in request.headers.getall("Content-Encoding", ())):
            return 415, Refusal("packed", "expected JSON that is not compressed.")
        if request.content_length is None or request.content_length > LONGEST_REQUEST:
            return 413, _too_long()
        if self._open >= MOST_OPEN:
            return 503, Refusal("busy", "The server is asked for too many trees at once. Change a setting to ask again.")
        return 200, None


async def _body_of(request: web.Request) -> bytes | None:
    """What was sent, or None if it is too long, whatever length was declared; no more of it is read than tells that."""
    found = bytearray()
    while len(found) <= LONGEST_REQUEST:
        part = await request.content.read(LONGEST_REQUEST + 1 - len(found))
        if not part:
            return bytes(found)
        found += part
    return None


def _too_long() -> Refusal:
    return Refusal("too_long", "The settings are too long. Make `edits` shorter or empty.")


def teller(node_id: str) -> Callable[..., None] | None:
    """What shows a line on a node, in the browser that queued the graph; None where there is no server.

    The line comes with its numbers by name, so that the browser can say it in other languages and reckon with them. The host's own progress text would vanish at the end of the run, in newer frontends.
    """
    server = running_server()

    def tell(line: str, **values) -> None:
        if server.client_id is not None:
            server.send_sync(EVENT, {"node": node_id, "text": line, "values": values}, server.client_id)

    return None if server is None else tell


def measure(image: torch.Tensor, min_leaf: int) -> CellStatistics:
    """The statistics from which the tree for min_leaf, and wherever possible for any other, can be built."""
    return measure_cells(image, FINEST_PX if min_leaf % FINEST_PX == 0 else max(min_leaf, 1))


def tree_of(cells: CellStatistics, *, min_leaf: int, max_leaf: int, edits: str, **settings) -> Quadtree:
    """Build the tree with the settings of QuadtreeFromImage, edits included."""
    check_leaves(min_leaf, max_leaf)
    if min_leaf % cells.cell_px:
        raise Refusal(
            "min_leaf_multiple", "min_leaf: expected a multiple of {cell_px}, got {min_leaf}. Run the graph to see the tree for other sizes.",
            cell_px=cells.cell_px, min_leaf=min_leaf)
    tree = grow_quadtree(coarsen(cells, min_leaf // cells.cell_px), max_leaf=max_leaf, **settings)
    return edit_quadtree(tree, parse_edits(edits))


def answer_to(pictures: Pictures, body: bytes) -> tuple[int, dict]:
    """The HTTP status and the answer to a request, {"picture": key, settings of the node}."""
    try:
        given = json.loads(body)
        settings = _checked_settings(given)
        cells = pictures.find(given["picture"]) if isinstance(given.get("picture"), str) else None
        if cells is None:
            return 404, said(Refusal("no_picture", "The server no longer has this picture. Run the graph to see its tree."))
        return 200, _answer(cells, settings)
    except RecursionError:
        return 400, said(Refusal("nested", "The request is nested too deeply."))
    except ValueError as problem:
        return 400, said(problem)


def said(problem: ValueError) -> dict:
    """An error as JSON: a sentence in English and, where the browser can say it in other languages, its code and values."""
    named = {"code": problem.code, "values": problem.values} if isinstance(problem, Refusal) else {}
    return {"error": str(problem), **named}


def estimated_cost(tree: Quadtree) -> float:
    """The model's work with the patch's defaults, as a share of sampling everything."""
    height, width = max(tree.height // CELL_PX, 1), max(tree.width // CELL_PX, 1)
    strengths = on_steps(TiledDiffusion.schedule, strengths_in_cells(tree, height, width, cell_px=CELL_PX), STEPS)
    sides = (side // CELL_PX for side in (TiledDiffusion.min_window, TiledDiffusion.max_window, TiledDiffusion.tile_overlap))
    sizes, cost = window_sizes(*sides, PATCH_CELLS, step=STEP_PX // CELL_PX), WindowCost(PATCH_CELLS)
    levels, costs, total = strengths.unique(), {}, 0.0
    for step in range(STEPS):
        active = int((share_at(TiledDiffusion.schedule, levels, step / STEPS) > 0).sum())
        if active not in costs:
            costs[active] = plan_windows(share_at(TiledDiffusion.schedule, strengths, step / STEPS) > 0, sizes, cost).cost
        total += costs[active]
    return total / (STEPS * full_grid(height, width, sizes, cost).cost)


def describe(tree: Quadtree, painted: torch.Tensor) -> dict:
    """The tree as JSON for the browser.

    painted: from painted_cells. leaves: [left, top, side, detail, index into strengths, 1 if painted], px.
    strengths: [strength, colour, steps in which it is sampled]. palette: colours at even steps from strength 0 to 1.
    """
    indices = {strength: index for index, strength in enumerate(sorted({leaf.strength for leaf in tree.leaves}))}
    is_painted = (~painted.isnan()).tolist()
    return {
        "width": tree.width, "height": tree.height, "min_leaf": tree.min_leaf, "steps": STEPS,
        "leaves": [
            [leaf.rect.left, leaf.rect.top, leaf.side, round(leaf.detail, 1), indices[leaf.strength],
             int(is_painted[leaf.rect.top // tree.min_leaf][leaf.rect.left // tree.min_leaf])]
            for leaf in tree.leaves],
        "strengths": [[round(strength, 4), _hex(strength), _steps_of(strength)] for strength in indices],
        "palette": ["#%02x%02x%02x" % colour for colour in VIRIDIS],
        "kept_share": tree.kept_share, "mean_strength": tree.mean_strength, "cost": estimated_cost(tree),
    }


def _answer(cells: CellStatistics, settings: dict) -> dict:
    """Describe the tree, unless it is too large to be drawn."""
    rows, cols = (math.ceil(length / settings["min_leaf"]) for length in (cells.height, cells.width))
    amount = rows * cols
    if amount > MOST_CELLS:
        raise Refusal(
            "too_many_cells", "{amount} leaves of {min_leaf} px are too many to be drawn here. The run itself is not affected.",
            amount=amount, min_leaf=settings["min_leaf"])
    edits = parse_edits(settings["edits"])
    if edits is not None and sum(min((square.side * cols / edits.width + 1) * (square.side * rows / edits.height + 1), amount) for square in edits.squares) > MOST_PAINTED:
        raise _too_long()
    tree = tree_of(cells, **settings)
    if len(tree.leaves) > MOST_LEAVES:
        raise Refusal(
            "too_many_leaves", "{amount} leaves are too many to be drawn here, where at most {most} are. The run itself is not affected.",
            amount=len(tree.leaves), most=MOST_LEAVES)
    return describe(tree, painted_cells(tree, edits))


def _checked_settings(given) -> dict:
    """The node's settings in a request, none of a size that arithmetic fails at.

    Raises Refusal. quadtree.py checks the ranges of shares and strengths; what comes by a wire may lie outside of a widget's.
    """
    if not isinstance(given, dict):
        raise Refusal("no_settings", "expected the settings of the node.")
    _check_types(given)
    # A tensor can be compared to any float, but not to any whole number.
    settings = {name: float(given[name]) if name in NUMBERS else given[name] for name in NUMBERS + SIDES + TEXTS}
    if not (FINEST_PX <= settings["min_leaf"] <= LARGEST_LEAF and 0 <= settings["max_leaf"] <= LARGEST_LEAF):
        raise Refusal(
            "leaf_range", "min_leaf and max_leaf: expected {least} to {most} px, got {min_leaf} and {max_leaf}.",
            least=FINEST_PX, most=LARGEST_LEAF, **{name: str(settings[name])[:80] for name in SIDES})
    if settings["metric"] not in METRICS:
        raise Refusal("not_offered", "{name}: expected one of {offered}, got {got!r}.", name="metric", offered=", ".join(METRICS), got=settings["metric"][:80])
    return settings


def _check_types(given: dict) -> None:
    for names, kinds, code, kind in (
        (NUMBERS, (int, float), "not_a_number", "a finite number"), (SIDES, (int,), "not_whole", "a whole number"), (TEXTS, (str,), "not_a_text", "a text"),
    ):
        for name in names:
            value = given.get(name)
            if type(value) not in kinds or (name in NUMBERS and not abs(value) <= sys.float_info.max):
                raise Refusal(code, "{name}: expected " + kind + ", got {got!r}.", name=name, got=str(value)[:80])


def _key(cells: CellStatistics, secret: bytes) -> str:
    """The same for equal pictures, and not to be found out by who knows the picture but not the secret."""
    found = hmac.new(secret, f"{cells.height} {cells.width} {cells.cell_px}".encode(), hashlib.sha256)
    for values in (cells.sums, cells.squares, cells.gradients):
        if values is not None:
            found.update(values.contiguous().numpy())
    return found.hexdigest()


def _bytes(cells: CellStatistics) -> int:
    return sum(value.numel() * value.element_size() for value in vars(cells).values() if torch.is_tensor(value))


def _hex(strength: float) -> str:
    return "#%02x%02x%02x" % tuple((strength_colour(torch.tensor(strength)) * 255).round().int().tolist())


def _steps_of(strength: float) -> int:
    """In how many of the steps a leaf of this strength is sampled."""
    value = on_steps(TiledDiffusion.schedule, torch.tensor(strength), STEPS)
    return sum(bool(share_at(TiledDiffusion.schedule, value, step / STEPS) > 0) for step in range(STEPS))

"""What does the user wire? Ten nodes, those of regions in region_nodes.py; each is a schema and a call."""
from __future__ import annotations

import logging
import math

import comfy.utils
from comfy_api.latest import ComfyAPI, ComfyExtension, io, ui

from . import preview
from .blending import METHODS, SHIFTS
from .compositing import composite
from .decode import decode_changed
from .denoise_schedule import SCHEDULES
from .drawing import draw_quadtree
from .painting import parse_edits
from .placement import sides_in_proportion, strength_raster
from .quadtree import METRICS, check_leaves, check_strengths
from .region_nodes import CATEGORY, TREE, QuadtreeRegionPrompts, QuadtreeRegions, QuadtreeRegionText
from .settings import check_windows
from .strengths import MASK_EDGES, adjust_quadtree, quadtree_from_mask
from .tiled_diffusion import TiledDiffusion
from .windows import WINDOW_SHAPES, WRAPS
from .wiring import WIRING, Wiring

# Longer side of the picture that the browser gets.
PREVIEW_PX = 1024

# Overlays up to this many bytes are always drawn: leaving one out has its price once it is connected.
SMALL_OVERLAY = 256 << 20
OVERLAY = 1  # its place among the outputs

log = logging.getLogger(__name__)


def _min_leaf():
    return io.Int.Input("min_leaf", default=64, min=8, max=1024, step=8, tooltip="Side of the smallest leaves, in pixels. Smaller leaves follow detail more closely.")


def _max_leaf():
    return io.Int.Input("max_leaf", default=0, min=0, max=8192, step=8, tooltip="Side of the largest leaves, in pixels: min_leaf doubled some times (128, 256, 512, 1024 for 64). 0 fits the picture: about a quarter of its longer side.")


def _first_problem(node, *checks) -> bool | str:
    """What validate_inputs answers: True, or in words what is wrong with the values of the node's widgets.

    checks: functions that raise ValueError, each with its arguments; None is what comes by a wire, and checked when the node runs.
    An input that validate_inputs names is no longer checked for its range by the host, so that is done here.
    """
    ranges = {entry.id: entry for entry in node.define_schema().inputs if getattr(entry, "max", None) is not None}
    for check, given in checks:
        for name, value in given.items():
            if value is not None and name in ranges and not ranges[name].min <= value <= ranges[name].max:
                return f"{name}: expected {ranges[name].min} to {ranges[name].max}, got {value}."
        try:
            if None not in given.values():
                check(**given)
        except ValueError as problem:
            return str(problem)
    return True


class QuadtreeFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeFromImage", display_name="Quadtree from Image", category=CATEGORY,
            description="Cuts a picture into squares, large where it is flat and small where it is busy, and gives each a denoise strength.",
            search_aliases=["tiled diffusion", "variance", "detail map", "adaptive tiles"],
            inputs=[
                io.Image.Input("image", tooltip="The picture that you encode. Several images share one tree, which is as fine as the busiest of them."),
                io.Float.Input("detail_budget", default=0.4, min=0.0, max=1.0, step=0.01, display_mode=io.NumberDisplay.slider, tooltip="The share of the picture to redraw: the mean strength of its leaves before min_denoise and max_denoise. 0 uses content_threshold instead."),
                io.Float.Input("content_threshold", default=25.0, min=0.0, max=442.0, step=0.5, tooltip="Used when detail_budget is 0: a square is split while its content, on the 0..255 scale, is above this."),
                _min_leaf(),
                _max_leaf(),
                io.Float.Input("min_denoise", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Strength of the largest leaves. 0 keeps them exactly, and costs nothing."),
                io.Float.Input("max_denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Strength of the smallest leaves. 1 redraws them wholly; it is relative to the steps of the sampler."),
                io.Combo.Input("metric", options=list(METRICS), default="variance", advanced=True, tooltip="What counts as content: variance sees contrast, gradient sees edges and texture, combined sees both."),
                # Shown as the picture that is painted on; see js/quadtree.js.
                io.String.Input("edits", default="", optional=True, extra_dict={"widgetType": "QTD_EDITS"}, tooltip="What is painted on the picture: click a leaf to keep it, again to redraw it, once more to let it go; drag to paint several. It goes before everything else. By a wire: JSON, with squares in pixels."),
            ],
            outputs=[
                TREE.Output("quadtree", tooltip="The leaves and their strengths."),
                io.Image.Output("overlay", tooltip="The picture with its leaves: dark violet is kept, yellow is redrawn."),
            ],
            hidden=[io.Hidden.unique_id],
            # Without it the host sends nothing to a browser that reloads while the node's result is cached.
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, min_leaf=None, max_leaf=None, min_denoise=None, max_denoise=None, edits=None) -> bool | str:
        return _first_problem(
            cls, (check_leaves, {"min_leaf": min_leaf, "max_leaf": max_leaf}),
            (check_strengths, {"min_denoise": min_denoise, "max_denoise": max_denoise}), (parse_edits, {"text": edits}))

    @classmethod
    def execute(cls, image, edits="", **settings) -> io.NodeOutput:
        cells = preview.measure(image, settings["min_leaf"])
        tree = preview.tree_of(cells, edits=edits, **settings)
        overlay = draw_quadtree(image, tree) if _overlay_is_wanted(image, cls) else image[..., :3]
        return io.NodeOutput(tree, overlay, ui=_shown(image, cells, tree, {**settings, "edits": edits}, cls))

    @classmethod
    def fingerprint_inputs(cls, **settings) -> int:
        """Another one if the overlay is connected now and was left out before: the node then runs again."""
        wiring = _wiring(cls)
        return 0 if wiring is None else wiring.number(cls.hidden.unique_id, OVERLAY)


def _wiring(cls) -> Wiring | None:
    """What the server knows of the graph that this node is in, if anything."""
    server = preview.running_server()
    return None if server is None or not cls.hidden or cls.hidden.unique_id is None else server.app.get(WIRING)


def _overlay_is_wanted(image, cls) -> bool:
    """False for a large overlay that goes nowhere, as far as the host tells."""
    wiring = _wiring(cls)
    is_small = math.prod(image.shape[:3]) * 3 * 4 <= SMALL_OVERLAY
    return is_small or wiring is None or not wiring.may_leave_out(cls.hidden.unique_id, OVERLAY)


def _shown(image, cells, tree, settings, cls) -> dict | None:
    """What the browser is told of a picture and its tree; None where there is no browser."""
    pictures = preview.kept_pictures()
    if pictures is None:
        return None
    scale = min(PREVIEW_PX / max(image.shape[1:3]), 1)
    height, width = (max(round(side * scale), 1) for side in image.shape[1:3])
    small = comfy.utils.common_upscale(image[:1, ..., :3].expand(-1, -1, -1, 3).movedim(-1, 1), width, height, "area", "disabled").movedim(1, -1)
    picture = ui.PreviewImage(small, cls=cls).as_dict()["images"][0]
    told = {"cost": preview.estimated_cost(tree), "size": [tree.width, tree.height]}
    # Not under "images", which the host would show a second time.
    return {"qtd_tree": [{"picture": pictures.keep(cells), "image": picture, "leaves": len(tree.leaves), "settings": settings, **told}]}


class QuadtreeFromMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeFromMask", display_name="Quadtree from Mask", category=CATEGORY,
            description="Makes a quadtree whose strengths are a mask's: white is redrawn, what is black is kept exactly, to the last pixel.",
            inputs=[
                io.Mask.Input("mask", tooltip="White = strength 1 = redraw, black = 0 = keep, grey in between. Of the aspect of the picture that you encode, before or after its crop."),
                _min_leaf(),
                _max_leaf(),
                io.Combo.Input("edges", options=list(MASK_EDGES), default=MASK_EDGES[0], optional=True, tooltip="Of the smallest leaves that hold black and other pixels. keep black: they are kept, so that all that is black is. mean: they get the mean, which also changes the black in them."),
            ],
            outputs=[TREE.Output("quadtree", tooltip="Leaves as large as the mask is even; on its edges min_leaf large.")],
        )

    @classmethod
    def validate_inputs(cls, min_leaf=None, max_leaf=None) -> bool | str:
        return _first_problem(cls, (check_leaves, {"min_leaf": min_leaf, "max_leaf": max_leaf}))

    @classmethod
    def execute(cls, mask, min_leaf, max_leaf, edges=MASK_EDGES[0]) -> io.NodeOutput:
        tree = quadtree_from_mask(mask, min_leaf=min_leaf, max_leaf=max_leaf, edges=edges)
        painted = float((mask.amax(0) if mask.ndim == 3 else mask).float().clamp(0, 1).mean())
        if painted == 0:
            log.warning("mask: it is black, so the whole picture is kept. Load Image gives such a mask until something is painted in its mask editor.")
        elif tree.mean_strength < painted / 2:
            log.warning(
                "mask: %.0f %% of what is to be redrawn shares leaves of %d px with black and is kept. Lower min_leaf, or set edges to mean.",
                100 * (1 - tree.mean_strength / painted), min_leaf)
        return io.NodeOutput(tree)


class QuadtreeAdjust(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeAdjust", display_name="Quadtree Adjust", category=CATEGORY,
            description="Changes the strengths of a quadtree: range, gamma, inversion, and parts that a mask protects.",
            inputs=[
                TREE.Input("quadtree", tooltip="The tree to change; it is not changed itself, a new one comes out."),
                io.Float.Input("min_denoise", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="What a strength of 0 becomes. Above 0 nothing is kept exactly any more."),
                io.Float.Input("max_denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="What a strength of 1 becomes."),
                io.Float.Input("gamma", default=1.0, min=0.1, max=10.0, step=0.05, tooltip="Strength to this power, before the range: 2 spares middle strengths, 0.5 favours them, 1 changes nothing."),
                io.Boolean.Input("invert", default=False, tooltip="Redraw what was kept and keep what was redrawn, before gamma and range."),
                io.Mask.Input("protect", optional=True, tooltip="White parts are kept exactly, whatever their strength. Leaves on its edge are split down to the tree's smallest. A mask in which nothing is painted changes nothing."),
            ],
            outputs=[TREE.Output("quadtree", tooltip="The tree with its new strengths.")],
        )

    @classmethod
    def validate_inputs(cls, min_denoise=None, max_denoise=None) -> bool | str:
        return _first_problem(cls, (check_strengths, {"min_denoise": min_denoise, "max_denoise": max_denoise}))

    @classmethod
    def execute(cls, quadtree, min_denoise, max_denoise, gamma, invert, protect=None) -> io.NodeOutput:
        return io.NodeOutput(adjust_quadtree(quadtree, min_denoise=min_denoise, max_denoise=max_denoise, gamma=gamma, invert=invert, protect=protect))


class QuadtreeToMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeToMask", display_name="Quadtree to Mask", category=CATEGORY,
            description="The strengths of a quadtree as a mask, for previews and for other nodes.",
            inputs=[
                TREE.Input("quadtree", tooltip="The tree to draw."),
                io.Int.Input("width", default=0, min=0, max=16384, tooltip="Width of the mask in pixels; 0 follows from the height, and takes the tree's own if that is 0, too."),
                io.Int.Input("height", default=0, min=0, max=16384, tooltip="Height of the mask in pixels; 0 follows from the width, and takes the tree's own if that is 0, too."),
            ],
            outputs=[io.Mask.Output("mask", tooltip="White = strength 1, black = 0.")],
        )

    @classmethod
    def execute(cls, quadtree, width, height) -> io.NodeOutput:
        return io.NodeOutput(strength_raster(quadtree, *sides_in_proportion(quadtree, height, width))[None])


class QuadtreeTiledDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeTiledDiffusion", display_name="Quadtree Tiled Diffusion", category=CATEGORY,
            description="Patches a model to sample window by window, each leaf of a quadtree as much as its strength says. Put it before any sampler node; set that sampler's denoise to 1.",
            search_aliases=["multidiffusion", "mixture of diffusers", "spotdiffusion", "tiled sampler", "upscale"],
            inputs=[
                io.Model.Input("model", tooltip="Any image or video model. It is not changed; a patched copy comes out."),
                TREE.Input("quadtree", tooltip="Which part is to change how much. Made for the picture that is sampled, or for a smaller version of it."),
                io.Combo.Input("method", options=list(METHODS), default=METHODS[0], tooltip="How windows are joined. Mixture of Diffusers trusts their middles, MultiDiffusion averages, SpotDiffusion moves windows without overlap at every step."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=SCHEDULES[0], tooltip="img2img: a leaf of strength d is sampled for the last d of the steps. blend: a cross-fade at every step. ramp: kept first, free at the end."),
                io.Int.Input("tile_overlap", default=64, min=0, max=512, step=8, tooltip="Pixels that a window sees beyond what it was chosen for, on every side. More hides seams better and costs more."),
                io.Int.Input("tile_batch_size", default=0, min=0, max=64, tooltip="Windows of one shape that run at once; 0 takes as many as memory allows.", advanced=True),
                io.Float.Input("skip_diffusion_below", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Leaves with a strength below this are kept exactly and never run."),
                io.Int.Input("min_window", default=512, min=64, max=4096, step=64, advanced=True, tooltip="Shortest side of what a window is chosen for, in pixels of the picture that is sampled."),
                io.Int.Input("max_window", default=1024, min=64, max=4096, step=64, tooltip="Longest side of what a window is chosen for, in pixels of the picture that is sampled. About the size that the model was trained on."),
                io.Combo.Input("shift_method", options=list(SHIFTS), default=SHIFTS[0], advanced=True, tooltip="SpotDiffusion only: in which order windows move."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, advanced=True, control_after_generate=False, tooltip="SpotDiffusion only: seed of the windows' movement."),
                io.Latent.Input("original", optional=True, tooltip="For sampling that is split over several samplers: the encoded picture. A later stage starts from a half-sampled latent and cannot know it."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="For sampling that is split over several samplers: the whole schedule, before the split."),
                io.Combo.Input("wrap", options=list(WRAPS), default="none", optional=True, advanced=True, tooltip="For pictures that go on over their border: panoramas (horizontal) and textures (both). Windows then lie over the border, too, so that no seam shows there."),
                io.Float.Input("hold_tones", default=0.0, min=0.0, max=1.0, step=0.05, optional=True, advanced=True, tooltip="Holds the picture's tones where windows drift apart in colour at high strengths: what varies more slowly than over a window is pulled to the original, most at the first steps. 0 holds nothing, 1 most."),
                io.Combo.Input("window_shapes", options=list(WINDOW_SHAPES), default="tight", optional=True, advanced=True, tooltip="tight: rectangles as small as what is active allows, the cheapest. square: squares of a few sizes, for what is made anew for each shape; a compiled model gets them by itself."),
                io.Float.Input("hold_layout", default=0.0, min=0.0, max=1.0, step=0.05, optional=True, advanced=True, tooltip="Holds windows together where each would make up a picture of its own, at strengths near 1: the model also looks at the whole picture, small, and what is large follows that look, most at the first steps. One window more at each step that needs it. 0 holds nothing, 1 most."),
            ],
            outputs=[io.Model.Output("model", tooltip="The patched model, for any sampler node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, min_window=None, max_window=None) -> bool | str:
        return _first_problem(cls, (check_windows, {"min_window": min_window, "max_window": max_window}))

    @classmethod
    def execute(cls, model, quadtree, original=None, **settings) -> io.NodeOutput:
        tell = preview.teller(cls.hidden.unique_id) if cls.hidden else None
        return io.NodeOutput(TiledDiffusion(quadtree, original=None if original is None else original["samples"], tell=tell, **settings).patched(model))


def _feather():
    return io.Int.Input("feather", default=32, min=0, max=512, step=2, tooltip="Width in pixels of the passage between the two. It lies inside the leaves that changed, so that kept pixels stay exact.")


def _result():
    return io.Image.Output("image", tooltip="The result in the original's size, with strength-0 leaves exactly as in the original.")


class QuadtreeComposite(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeComposite", display_name="Quadtree Composite", category=CATEGORY,
            description="Puts the original's pixels back where the strength is 0, bit for bit. A VAE changes every pixel on its way, so this is what makes kept parts exact.",
            inputs=[
                # First, since a bypassed node passes on its first input of the output's type.
                io.Image.Input("image", tooltip="The decoded result."),
                io.Image.Input("original", tooltip="The picture that was encoded: of the size of image, or a little larger where the VAE has cropped it. The result has its size."),
                TREE.Input("quadtree", tooltip="The tree that was sampled with."),
                _feather(),
            ],
            outputs=[_result()],
        )

    @classmethod
    def execute(cls, original, image, quadtree, feather) -> io.NodeOutput:
        return io.NodeOutput(composite(original, image, quadtree, feather=feather))


class QuadtreeDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeDecode", display_name="Quadtree Decode", category=CATEGORY,
            description="Decodes only what changed, and keeps the original's pixels where the strength is 0, bit for bit. Takes the place of VAE Decode and Quadtree Composite, in a fraction of their time and memory.",
            search_aliases=["vae decode", "tiled vae", "tiled decode"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE that made the latent. It is not changed."),
                io.Latent.Input("samples", tooltip="The latent that was sampled."),
                io.Image.Input("original", tooltip="The picture that was encoded: of the size of the result, or a little larger where the VAE has cropped it. The result has its size."),
                TREE.Input("quadtree", tooltip="The tree that was sampled with."),
                _feather(),
                io.Int.Input("window", default=0, min=0, max=8192, step=64, advanced=True, tooltip="Longest side in pixels of what is decoded at once; 0 takes what memory allows. Smaller windows need less memory and a little more time; the result is the same."),
            ],
            outputs=[_result()],
        )

    @classmethod
    def execute(cls, vae, samples, original, quadtree, feather, window) -> io.NodeOutput:
        return io.NodeOutput(decode_changed(vae, samples["samples"], original, quadtree, feather=feather, window=window))


def _of_predecessor() -> list[io.NodeReplace]:
    """The nodes of comfyui-quadtree-tile and what takes their place.

    Its sizes of tiles have no counterpart: there a leaf was a window. Its skipping went by size, ours by strength.
    """
    tree = {"detail_budget": 0.0, "min_leaf": 64, "max_leaf": 1024, "metric": "variance"}
    patch = {
        "schedule": SCHEDULES[0], "tile_batch_size": 0, "skip_diffusion_below": 0.0, "min_window": 512, "max_window": 1024,
        "shift_method": SHIFTS[0], "seed": 0,
    }
    return [
        io.NodeReplace(
            "QuadtreeFromImage", "QuadtreeVisualizer", ["content_threshold", "min_tile_size", "min_denoise", "max_denoise", "line_thickness"],
            _mapping(("image", "content_threshold", "min_denoise", "max_denoise"), tree), [{"new_idx": 1, "old_idx": 0}, {"new_idx": 0, "old_idx": 1}]),
        io.NodeReplace(
            "QuadtreeTiledDiffusion", "QuadtreeDiffusion", ["method", "enable_overlap", "tile_overlap", "tile_batch_size", "skip_diffusion_below"],
            _mapping(("model", "quadtree", "method", "tile_overlap"), patch), [{"new_idx": 0, "old_idx": 0}]),
    ]


def _mapping(same: tuple[str, ...], values: dict) -> list[dict]:
    """Inputs that keep their name and value, and inputs that are new."""
    return [{"new_id": name, "old_id": name} for name in same] + [{"new_id": name, "set_value": value} for name, value in values.items()]


class QuadtreeExtension(ComfyExtension):
    async def on_load(self) -> None:
        server = preview.running_server()
        if server is not None:
            preview.add_route(server)
            server.app[WIRING] = Wiring(server)
            for replacement in _of_predecessor():
                await ComfyAPI().node_replacement.register(replacement)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [QuadtreeFromImage, QuadtreeFromMask, QuadtreeAdjust, QuadtreeToMask, QuadtreeTiledDiffusion, QuadtreeComposite, QuadtreeRegions, QuadtreeRegionText, QuadtreeRegionPrompts, QuadtreeDecode]

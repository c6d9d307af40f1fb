"""What is the host's model: its patch, and the price and the memory of a window?"""
from __future__ import annotations

import inspect
import math

import torch

import comfy.model_management

from .conditioning import REFERENCES, cut_conds
from .network_work import network_work
from .windows import WindowCost

# A device takes as long for fewer pixels of windows as for these, the size that models are made for.
FILLING_PX = 1024 * 1024


def patch_cells(model) -> int:
    """The side of the model's patch, in cells; 8 for a UNet, which halves its input three times."""
    network = model.diffusion_model
    # SD3 keeps it in its embedder, LTX-Video in its patchifier.
    holders = (network, getattr(network, "x_embedder", None), getattr(network, "patchifier", None))
    patch = next((holder.patch_size for holder in holders if getattr(holder, "patch_size", None)), 8)
    return int(patch[-1] if isinstance(patch, (tuple, list)) else patch)


def is_compiled(patcher) -> bool:
    """True if torch.compile is on a model: by the host's node, which leaves its arguments, or on a part of the network by another pack's."""
    return "torch_compile_kwargs" in patcher.model_options or any(map(_is_compiled_module, patcher.model.diffusion_model.modules()))


def _is_compiled_module(module: torch.nn.Module) -> bool:
    """By what torch.compile leaves on a module, in its place, and on a forward of its own."""
    forward = vars(module).get("forward")
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None or hasattr(forward, "_torchdynamo_orig_callable")


def window_cost(model, conds, shape) -> WindowCost:
    """The cost of a window for this model, by its layers, its patch and its text."""
    network = model.diffusion_model
    names = ("hidden_size", "inner_dim", "dim", "model_channels")
    width = next((getattr(network, name) for name in names if isinstance(getattr(network, name, None), int)), 2048)
    frames, patch = math.prod(shape[2:-2]), patch_cells(model)
    beside = [_tokens_beside(entry["model_conds"], shape, patch) for entries in conds for entry in entries]
    cut, whole = (max(tokens, default=0) for tokens in zip(*beside)) if beside else (0, 0)
    return network_work(network, width).cost(patch, frames + cut, whole, width)


def _tokens_beside(model_conds, shape, patch: int) -> tuple[int, int]:
    """What a transformer sees beside a window: how many more of its size, cut from references, and tokens that pass whole."""
    cut, whole = 0, model_conds["c_crossattn"].cond.shape[1] if "c_crossattn" in model_conds else 0
    for key in REFERENCES & model_conds.keys():
        value = model_conds[key].cond
        for picture in [value] if torch.is_tensor(value) else value:
            frames, (height, width) = math.prod(picture.shape[2:-2]), picture.shape[-2:]
            if (height, width) == tuple(shape[-2:]):
                cut += frames
            else:
                whole += frames * math.ceil(height / patch) * math.ceil(width / patch)
    return cut, whole


def windows_that_fit(model, conds, x, group, canvas, known: dict) -> int:
    """How many of these windows the host would run at once, with all conditionings, by its own estimate.

    known: the answers of this run, since asking takes a cut and the device's memory.
    """
    if len(group) == 1:
        return 1
    rects = [group[0].rect]
    key = (tuple(x.shape), rects[0].height, rects[0].width, *(None if entries is None else len(entries) for entries in conds))
    if key not in known:
        known[key] = _asked_memory(model, conds, x, rects, canvas)
    return known[key]


def windows_that_fill(rect, model, x) -> int:
    """How many windows of this size a device is not faster without."""
    cell_px = model.latent_format.spacial_downscale_ratio
    return math.ceil(FILLING_PX / (x.shape[0] * math.prod(x.shape[2:-2]) * rect.height * rect.width * cell_px ** 2))


def fills_devices(rect, model, x) -> bool:
    """Whether one window is so large that the host had better share out its conditionings, whatever becomes of the last bit."""
    return windows_that_fill(rect, model, x) == 1


def _asked_memory(model, conds, x, rects, canvas) -> int:
    entries = [entry for entries in cut_conds([conds], rects, canvas) if entries is not None for entry in entries]
    rows = x.shape[0] * max(len(entries), 1)
    shapes: dict = {}
    for entry in entries:
        for key, cond in entry["model_conds"].items():
            # The host repeats a conditioning to x's rows before it asks.
            shapes.setdefault(key, []).append([x.shape[0], *cond.size()[1:]])
    needed = _memory_required(model, [rows, *x.shape[1:-2], rects[0].height, rects[0].width], shapes) * 1.5
    # Without what the host could free by moving weights out: more windows at once are not worth that.
    return max(1, int(comfy.model_management.get_free_memory(x.device) // max(needed, 1)))


def _memory_required(model, shape: list[int], cond_shapes: dict) -> float:
    """The host's estimate, asked of whom the host asks.

    Hosts up to 0.30 ask the model. Newer ones have attention chosen for each patcher, which tells the model by
    `memory_efficient_attention`, or is asked itself.
    """
    patcher = model.current_patcher
    profile = getattr(patcher, "model_options", {}).get("optimized_attention_memory_efficient")
    known = {"cond_shapes": cond_shapes} | ({} if profile is None else {"memory_efficient_attention": profile})
    for holder in (patcher, model):
        takes = inspect.signature(holder.memory_required).parameters if hasattr(holder, "memory_required") else {}
        if "cond_shapes" in takes:
            break
    return holder.memory_required(shape, **{name: value for name, value in known.items() if name in takes})

"""What does one window see of what model patches, attention patches and their like hold?

Everything that they hold lies in `transformer_options`, where it is complete only when a batch of rows is evaluated: the
host adds what conditionings bring, by their hooks, just then. Patches of the host that keep a picture have a rule each;
of others, masks are cut. The user's objects are never changed: a batch of windows has copies.
"""
from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from dataclasses import replace

import torch

import comfy.hooks
import comfy.latent_formats
import comfy.model_patcher
import comfy.sd
import comfy.utils

from .canvas import Canvas, cut_padded, cut_rows, passes_whole, run_alone, scaled
from .control import with_models_kept
from .copies import CLOSED, Copies, is_closed, parts
from .masks import View, as_tensor, covers, cut_attention, cut_to, empty_caches, is_mask, is_no_picture, is_picture
from .utils import Rect, in_units_of

# In transformer_options: the windows of a batch, and the canvas that they are cut from.
WINDOWS = "quadtree_tiled_diffusion_windows"

# Where the host says which of several devices a batch is evaluated on.
DEVICE = "multigpu_thread_device"

# Of these, the host's state and ours, nothing is cut.
PASSED_ON = frozenset({"wrappers", "callbacks", "sigmas", "sample_sigmas", "cond_or_uncond", "uuids", "context_window", "quadtree_tiled_diffusion", WINDOWS, DEVICE})

# What is a model, or belongs to one, is not looked into.
MODELS = (torch.Tensor, comfy.model_patcher.ModelPatcher, comfy.sd.VAE, comfy.sd.CLIP, comfy.latent_formats.LatentFormat)


def with_windows(model_options: dict, rects: Sequence[Rect], canvas: Canvas) -> dict:
    """The options for a batch of windows."""
    return model_options | {"transformer_options": model_options["transformer_options"] | {WINDOWS: (tuple(rects), canvas)}}


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    """Cut what patches hold to the windows that these rows are."""
    if WINDOWS in transformer_options:
        rects, canvas = transformer_options[WINDOWS]
        device = transformer_options.get(DEVICE, canvas.device)
        with canvas.lock:
            transformer_options = cut_patches(transformer_options, rects, canvas if device == canvas.device else replace(canvas, device=device))
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def cut_patches(options: dict, rects: Sequence[Rect], canvas: Canvas) -> dict:
    """The transformer_options for a batch of windows, with the same copies wherever one occurs."""
    return {key: value if key in PASSED_ON else _cut(value, str(key), tuple(rects), canvas) for key, value in options.items()}


def windows_are_alone(model_options: dict, canvas: Canvas) -> bool:
    """True if a patch holds a mask: whether its rows are images, regions or something else is known to its pack alone."""
    _keep_counts(canvas)
    if "alone" not in canvas.prepared:
        canvas.prepared["alone"] = any(as_tensor(value) is not None for value in what_is_cut(model_options, canvas))
        if canvas.prepared["alone"]:
            run_alone(canvas, "a patch that holds a mask of the picture")
    return canvas.prepared["alone"]


def what_is_cut(model_options: dict, canvas: Canvas) -> list:
    """What patches hold, and they themselves, that windows have a part or a copy of; found out once in a run."""
    if "cut" not in canvas.prepared:
        whole = (Rect(0, 0, *canvas.size),)
        cut_patches(model_options["transformer_options"], whole, canvas)
        canvas.prepared["cut"] = [original for original, part in _copies(whole, canvas).made.values() if part is not original]
    return canvas.prepared["cut"]


def home_of_patches(rects: tuple[Rect, ...], canvas: Canvas) -> torch.device | None:
    """The device that has these windows' copies of patches, which count and keep what belongs to them; None if any will do."""
    for key, copies in canvas.copies.items():
        if key[:2] == ("patches", rects) and any(part is not original for original, part in copies.made.values()):
            return key[2]
    return None


def bring_patches(hooks: comfy.hooks.HookGroup | None) -> bool:
    """True if a conditioning's hooks bring patches of their own into the model."""
    return hooks is not None and any(hook.hook_type == comfy.hooks.EnumHookType.TransformerOptions for hook in hooks.hooks)


def _copies(rects: tuple[Rect, ...], canvas: Canvas) -> Copies:
    key = "patches", rects, canvas.device
    if key not in canvas.copies:
        view = View(rects, canvas.size, canvas)
        canvas.copies[key] = Copies(lambda path, value: _replaced(path, value, view), finish=lambda value, part: _go_on(value, part, canvas), closed=MODELS)
    return canvas.copies[key]


def _keep_counts(canvas: Canvas) -> None:
    """Remember what patches have counted up to this step, for windows that begin with it."""
    latest = canvas.prepared.get("latest", {})
    canvas.prepared["counts"] = {number: (value, _counts(part)) for number, (value, part) in latest.items()}


def _go_on(value, part, canvas: Canvas) -> None:
    """Let a new copy of an object count from where its former copies are, and make what it caches by itself."""
    if hasattr(part, "__dict__") and not isinstance(part, types.FunctionType):
        empty_caches(part, MODELS)
        _, counts = canvas.prepared.get("counts", {}).get(id(value), (value, {}))
        part.__dict__.update({name: count for name, count in counts.items() if type(part.__dict__.get(name)) is type(count)})
        canvas.prepared.setdefault("latest", {})[id(value)] = value, part


def _counts(part) -> dict:
    return {name: count for name, count in vars(part).items() if type(count) in (int, float)}


def _cut(value, name: str, rects: tuple[Rect, ...], canvas: Canvas):
    """The host copies plain containers for every batch: what lies in them is what is known again."""
    if type(value) is dict:
        parts = {key: _cut(part, key if isinstance(key, str) else name, rects, canvas) for key, part in value.items()}
        return value if all(parts[key] is part for key, part in value.items()) else parts
    if type(value) in (list, tuple):
        parts = [_cut(part, name, rects, canvas) for part in value]
        return value if all(part is old for part, old in zip(parts, value)) else type(value)(parts)
    if isinstance(value, CLOSED) and not callable(value) or ("uncut", id(value)) in canvas.prepared:
        return value
    try:
        part = _copies(rects, canvas).of(value, name if torch.is_tensor(value) else called(value))
    except TypeError:
        passes_whole(canvas, f"what {called(value)} holds")
        part = value
    if part is value:  # for one window nothing, for all nothing
        canvas.prepared["uncut", id(value)] = value
    return part


def called(value) -> str:
    """The name of a function, or of an object's class, for the user."""
    value = getattr(value, "func", value)
    value = value if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)) else type(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _replaced(path: Sequence[str], value, view: View):
    if as_tensor(value) is not None:
        return _cut_tensor(path, value, view)
    if isinstance(value, types.FunctionType):
        _say_globals(value, view)
    elif is_closed(value) and (len(path) == 1 or is_mask(path)) and not isinstance(value, torch.Tensor) and not parts(value):
        passes_whole(view.canvas, f"what {'.'.join(filter(None, path))} ({type(value).__name__}) holds")
    rule = None if isinstance(value, MODELS) else next((rule for names, rule in RULES_OF_PATCHES.items() if _has(value, names)), None)
    return rule and rule(value, view.rects, view.canvas)


def _cut_tensor(path: Sequence[str], value, view: View):
    """A mask's part; of what is not cut, the log names whatever may belong to a part of the picture."""
    tensor, where = as_tensor(value), ".".join(filter(None, path))
    if tensor.ndim < 2:
        return None
    if is_mask(path):
        part = _cut_between_tokens(tensor, view)
        part = cut_to(value, view) if part is None else part
        if part is None and min(tensor.shape[-2:]) > 1:
            passes_whole(view.canvas, f"mask {where}, {tuple(tensor.shape)},")
        return part
    if tensor.ndim >= 3 and covers(tensor, view) and (is_picture(path) or _is_of_the_canvas(tensor, view) and not is_no_picture(path)):
        passes_whole(view.canvas, f"picture {where}, {tuple(tensor.shape)},")
    return None


def _cut_between_tokens(tensor: torch.Tensor, view: View) -> torch.Tensor | None:
    """What a transformer's attention is told of text and picture: square, with more tokens than a mask of the picture has rows."""
    side, px = tensor.shape[-1], max(view.size) * view.cell_px
    return cut_attention(tensor, view.rects, view.canvas) if side > px or covers(tensor, view) is None else None


def _is_of_the_canvas(tensor: torch.Tensor, view: View) -> bool:
    """True for the very size of the picture or its latent, if that is no common width of a layer."""
    height, width = view.size
    found = tuple(tensor.shape[dim] for dim in covers(tensor, view))
    return height != width and found in ((height, width), (height * view.cell_px, width * view.cell_px))


def _say_globals(function: types.FunctionType, view: View) -> None:
    for name in function.__code__.co_names:
        value = as_tensor(function.__globals__.get(name))
        if value is not None and is_mask((name,)) and covers(value, view):
            passes_whole(view.canvas, f"mask {name} of the module of {function.__qualname__}")


def _has(value, names: Sequence[str]) -> bool:
    inside = getattr(value, "__dict__", None)
    return isinstance(inside, dict) and all(name in inside or hasattr(type(value), name) for name in names)


def _cut_encoded_image(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """The controls of Qwen-Image (DiffSynth) and Z-Image (Fun), which keep a latent of the picture."""
    # Z-Image pads its input to whole patches; Qwen-Image does not, and its control pads the latent itself.
    multiple = canvas.patch if hasattr(patch, "inpaint_image") else 1
    cell_px = patch.vae.spacial_compression_encode()
    latent = _encoded_image(patch, cell_px, multiple, canvas)
    part = copy.copy(patch)
    # Copied, for the host's model scales it in place, and moved, which the host does only while it loads a model.
    part.encoded_image = cut_padded(latent, rects, canvas.size, 1, multiple, canvas.rows).to(canvas.device, copy=True)
    part.encoded_image_size = tuple(length * cell_px for length in part.encoded_image.shape[-2:])
    part.temp_data = None
    if hasattr(patch.model_patch.model, "process_input_latent_image"):
        part.encoded_image = patch.model_patch.model.process_input_latent_image(part.encoded_image)
    if len(rects) > 1:
        part.window_images = part.encoded_image
        part.__class__ = type("WindowPatch", (_RowsOfBatch, type(patch)), {})
    return part


def _encoded_image(patch, cell_px: int, multiple: int, canvas: Canvas) -> torch.Tensor:
    """The latent of the pictures and their mask, as the host would make it for the whole."""
    key = "encoded", id(patch)
    if key not in canvas.prepared:
        size = [-(-length // multiple) * multiple * cell_px for length in canvas.size]
        names = [name for name in ("image", "inpaint_image") if hasattr(patch, name)]
        pictures = [_pixels(getattr(patch, name), *size, "area") for name in names]
        canvas.prepared[key] = with_models_kept(lambda: patch.encode_latent_cond(*pictures))
    return canvas.prepared[key]


class _RowsOfBatch:
    """These patches add one row to all; windows need their own, for each conditioning in the batch."""

    def __call__(self, kwargs):
        rows = kwargs["img"].shape[0]
        if self.encoded_image.shape[0] != rows:
            self.encoded_image = comfy.utils.repeat_to_batch_size(self.window_images, rows)
        return super().__call__(kwargs)


def _cut_render(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """The control of Wan (Uni3C), which keeps a latent of a video."""
    key = "render", id(patch), canvas.shape[2]
    if key not in canvas.prepared:
        size = [-(-length // canvas.patch) * canvas.patch for length in canvas.size]
        canvas.prepared[key] = patch.encode_render_video((canvas.shape[2], *size))
    part = copy.copy(patch)
    part.prepared_render = cut_padded(canvas.prepared[key], rects, canvas.size, 1, canvas.patch, canvas.rows)
    part.temp_data = None
    return part


def _cut_hint_latent(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """SUPIR's control, whose latent the host leaves as large as its picture."""
    part = copy.copy(patch)
    height, width = canvas.size
    latent = scaled(patch.hint_latent, height, width, "bilinear")
    part.hint_latent = cut_rows(latent, in_units_of(latent, rects, 1, 1), canvas.rows)
    part.cached_features = None
    return part


def _cut_conditioning_image(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """Anima's LLLite, which scales its picture to 8 px per cell at every call."""
    part = copy.copy(patch)
    height, width = (length * 8 for length in canvas.size)
    part.image = _cut_pixels(_pixels(patch.image, height, width, "bicubic"), rects, canvas)
    if patch.mask is not None:
        mask = patch.mask[:, None] if patch.mask.ndim == 3 else patch.mask
        mask = scaled(mask.float(), height, width, "nearest-exact")
        part.mask = cut_rows(mask, in_units_of(mask, rects, 8, 8), canvas.rows)
    return part


def _pixels(picture: torch.Tensor | None, height: int, width: int, algorithm: str) -> torch.Tensor | None:
    """An IMAGE (b, height, width, colours) of another size."""
    return None if picture is None else scaled(picture.movedim(-1, 1), height, width, algorithm).movedim(1, -1)


def _cut_pixels(picture: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor:
    planes = picture.movedim(-1, 1)
    return cut_rows(planes, in_units_of(planes, rects, 8, 8), canvas.rows).movedim(1, -1)


# By their attributes: the host loads its nodes under names of its own, so their classes cannot be imported.
RULES_OF_PATCHES = {
    ("encode_latent_cond", "encoded_image", "encoded_image_size"): _cut_encoded_image,
    ("encode_render_video", "prepared_render"): _cut_render,
    ("hint_latent", "cached_features"): _cut_hint_latent,
    ("image", "mask", "sigma_start", "sigma_end"): _cut_conditioning_image,
}

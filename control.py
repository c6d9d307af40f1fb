"""What does one window see of each control? Its part of the picture that the control was given, in px of the picture.

The host scales a hint to whatever it samples. So a hint is scaled to the whole canvas, and encoded if its control has a
VAE, once in a run; windows get their part of that. The user's objects are never changed: a batch of windows has copies,
which share the networks. They are shallow, as a run has already given the originals what the host's own copies lack.
"""
from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import comfy.controlnet
import comfy.model_management
import comfy.utils

from .canvas import Canvas, common_part, cut_rows, in_units_of, moved_to, passes_whole
from .quadtree import Rect


def cut_control(control, rects: Sequence[Rect], place: Rect, canvas: Canvas):
    """The control that a batch of windows gets.

    place: the cells that its hint covers. The same copy for the same windows: the host lets cond and uncond share a batch
    only if they have one control.
    """
    key = control, tuple(rects), place
    if key not in canvas.copies:
        canvas.copies[key] = _copy_for_windows(control, rects, place, canvas)
    return canvas.copies[key]


def cut_model_options(model_options: dict, rects: Sequence[Rect], canvas: Canvas) -> dict:
    """The options with model patches that hold a picture cut to the windows, the same copy wherever one occurs."""
    options = model_options["transformer_options"]
    whole = options.get("patches", {})
    patches = {place: [_cut_patch(patch, tuple(rects), canvas) for patch in several] for place, several in whole.items()}
    return model_options if patches == whole else model_options | {"transformer_options": options | {"patches": patches}}


def _copy_for_windows(control, rects: Sequence[Rect], place: Rect, canvas: Canvas):
    if not isinstance(control, comfy.controlnet.ControlBase):
        passes_whole(canvas, f"control {type(control).__name__}")
        return control
    part = copy.copy(control)
    part.cond_hint = part.extra_concat = None
    if control.cond_hint_original is not None:
        _cut_hint(part, rects, place, canvas)
    if isinstance(control, comfy.controlnet.T2IAdapter):
        part.control_input = None
        part.__class__ = type("WindowAdapter", (_FreshFeatures, type(control)), {})
    if control.previous_controlnet is not None:
        part.previous_controlnet = cut_control(control.previous_controlnet, rects, place, canvas)
    part.multigpu_clones = {device: cut_control(clone, rects, place, canvas) for device, clone in control.multigpu_clones.items()}
    return part


def _cut_hint(part, rects: Sequence[Rect], place: Rect, canvas: Canvas) -> None:
    """Give a copy of a control the windows' part of its hint, and of what is concatenated to that."""
    rects, size = [moved_to(common_part(rect, place), place) for rect in rects], (place.height, place.width)
    element, unshuffle = part.compression_ratio, getattr(getattr(part, "t2i_model", None), "unshuffle_amount", 1)
    cell_px = element * (part.vae.spacial_compression_encode() if part.vae is not None else 1)
    whole = _whole_hint(part, size, cell_px, unshuffle, canvas)
    if part.vae is not None:
        latent = _whole_latent(part, whole, canvas)
        part.vae = _EncodedHint(cell_px // element, cut_rows(latent, in_units_of(latent, rects, element, element), canvas.rows))
    part.cond_hint_original = cut_rows(whole, in_units_of(whole, rects, cell_px, cell_px, unshuffle), canvas.rows)
    concat = [_scaled(value, size[0] * element, size[1] * element, part.upscale_algorithm) for value in part.extra_concat_orig]
    part.extra_concat_orig = [cut_rows(value, in_units_of(value, rects, element, element), canvas.rows) for value in concat]


def _whole_hint(control, size: tuple[int, int], cell_px: int, unshuffle: int, canvas: Canvas) -> torch.Tensor:
    """The hint as the host would scale it for the whole, kept for the run."""
    height, width = (-(-length * cell_px // unshuffle) * unshuffle for length in size)
    hint = control.cond_hint_original
    key = "hint", id(hint), (height, width), control.upscale_algorithm
    if key not in canvas.prepared:
        canvas.prepared[key] = _scaled(hint, height, width, control.upscale_algorithm)
    return canvas.prepared[key]


def _whole_latent(control, hint: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """The hint after the VAE, whose receptive field reaches beyond a window."""
    key = "latent", id(hint), control.vae, control.preprocess_image
    if key not in canvas.prepared:
        canvas.prepared[key] = _with_models_kept(lambda: control.vae.encode(control.preprocess_image(hint).movedim(1, -1)))
    return canvas.prepared[key]


def _with_models_kept(encode):
    """Encode, and load again what the VAE has displaced."""
    loaded = comfy.model_management.loaded_models(only_currently_used=True)
    latent = encode()
    comfy.model_management.load_models_gpu(loaded)
    return latent


def _scaled(value: torch.Tensor, height: int, width: int, algorithm: str) -> torch.Tensor:
    return value if tuple(value.shape[-2:]) == (height, width) else comfy.utils.common_upscale(value, width, height, algorithm, "center")


@dataclass(frozen=True, eq=False)
class _EncodedHint:
    """In the place of a control's VAE: what encoding the windows gives is known already."""

    cell_px: int
    latent: torch.Tensor

    def spacial_compression_encode(self) -> int:
        return self.cell_px

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.latent


class _FreshFeatures:
    """A T2I adapter keeps its features however many rows come next, which suits only a hint of one row."""

    def get_control(self, x_noisy, *args):
        if self.cond_hint is not None and self.cond_hint.shape[0] not in (1, x_noisy.shape[0]):
            self.control_input = None
        return super().get_control(x_noisy, *args)


def _cut_patch(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """A model patch for a batch of windows: a copy if it holds a picture or belongs to one that does, else itself."""
    if isinstance(patch, tuple):
        return tuple(_cut_patch(part, rects, canvas) for part in patch)
    if isinstance(patch, types.MethodType):
        owner = _cut_patch(patch.__self__, rects, canvas)
        return patch if owner is patch.__self__ else types.MethodType(patch.__func__, owner)
    rule = next((rule for names, rule in RULES_OF_PATCHES.items() if all(hasattr(patch, name) for name in names)), None)
    if rule is None:
        return patch
    key = id(patch), rects
    if key not in canvas.copies:
        canvas.copies[key] = rule(patch, rects, canvas)
    return canvas.copies[key]


def _cut_encoded_image(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """The controls of Qwen-Image (DiffSynth) and Z-Image (Fun), which keep a latent of the picture."""
    # Z-Image pads its input to whole patches; Qwen-Image does not, and its control pads the latent itself.
    multiple = canvas.patch if hasattr(patch, "inpaint_image") else 1
    cell_px = patch.vae.spacial_compression_encode()
    latent = _encoded_image(patch, cell_px, multiple, canvas)
    windows = in_units_of(latent, rects, 1, 1, multiple)
    part = copy.copy(patch)
    # Copied, for the host's model scales it in place, and moved, which the host does only while it loads a model.
    part.encoded_image = cut_rows(latent, windows, canvas.rows).to(canvas.device, copy=True)
    part.encoded_image_size = windows[0].height * cell_px, windows[0].width * cell_px
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
        canvas.prepared[key] = _with_models_kept(lambda: patch.encode_latent_cond(*pictures))
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
    latent = canvas.prepared[key]
    part = copy.copy(patch)
    part.prepared_render = cut_rows(latent, in_units_of(latent, rects, 1, 1, canvas.patch), canvas.rows)
    part.temp_data = None
    return part


def _cut_hint_latent(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """SUPIR's control, whose latent the host leaves as large as its picture."""
    part = copy.copy(patch)
    height, width = canvas.size
    latent = _scaled(patch.hint_latent, height, width, "bilinear")
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
        mask = _scaled(mask.float(), height, width, "nearest-exact")
        part.mask = cut_rows(mask, in_units_of(mask, rects, 8, 8), canvas.rows)
    return part


def _cut_owner(patch, rects: tuple[Rect, ...], canvas: Canvas):
    """A patch that looks up what another one has left: it has to be the copy of that."""
    owner = _cut_patch(patch.patch, rects, canvas)
    if owner is patch.patch:
        return patch
    part = copy.copy(patch)
    part.patch = owner
    return part


def _pixels(picture: torch.Tensor | None, height: int, width: int, algorithm: str) -> torch.Tensor | None:
    """An IMAGE (b, height, width, colours) of another size."""
    return None if picture is None else _scaled(picture.movedim(-1, 1), height, width, algorithm).movedim(1, -1)


def _cut_pixels(picture: torch.Tensor, rects: Sequence[Rect], canvas: Canvas) -> torch.Tensor:
    planes = picture.movedim(-1, 1)
    return cut_rows(planes, in_units_of(planes, rects, 8, 8), canvas.rows).movedim(1, -1)


# By their attributes: the host loads its nodes under names of its own, so their classes cannot be imported.
RULES_OF_PATCHES = {
    ("encode_latent_cond", "encoded_image", "encoded_image_size"): _cut_encoded_image,
    ("encode_render_video", "prepared_render"): _cut_render,
    ("hint_latent", "cached_features"): _cut_hint_latent,
    ("image", "mask", "sigma_start", "sigma_end"): _cut_conditioning_image,
    ("patch",): _cut_owner,
}

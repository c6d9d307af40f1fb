"""What does one window see of each control? Its part of the picture that the control was given, in px of the picture.

The host scales a hint to whatever it samples. So a hint is scaled to the whole canvas, and encoded if its control has a
VAE, once in a run; windows get their part of that. The user's objects are never changed: a batch of windows has copies,
which share the networks. They are shallow, as a run has already given the originals what the host's own copies lack;
but what is bound to an original, or holds one, follows the copy, and masks that a control keeps are cut.
"""
from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

import comfy.controlnet
import comfy.hooks
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd

from .canvas import Canvas, cut_padded, cut_rows, passes_whole, run_alone, scaled
from .copies import Copies, are_copies, reachable
from .masks import View, cut_to, empty_caches, is_hint, is_mask
from .utils import Rect, in_units_of, parts_in_window

# Those of the host, which have rules of their own.
HINTS = frozenset({"cond_hint_original", "cond_hint", "extra_concat_orig", "extra_concat"})

# Called before and after sampling, on the original.
NOT_IN_WINDOWS = frozenset({
    "cleanup", "copy", "copy_to", "deepclone_multigpu", "get_extra_hooks", "get_models", "get_models_only_self", "inference_memory_requirements", "pre_run",
    "set_cond_hint", "set_extra_arg", "set_previous_controlnet"})

# What is a model, or belongs to one, is not looked into.
MODELS = (
    torch.Tensor, torch.nn.Module, comfy.model_patcher.ModelPatcher, comfy.sd.VAE, comfy.sd.CLIP, comfy.latent_formats.LatentFormat, comfy.hooks.HookGroup)

def cut_control(control, rects: Sequence[Rect], place: Rect, canvas: Canvas, index: int = 0):
    """The control that a batch of windows gets.

    place: the cells that its hint covers. index: which of its parts in the windows, where they show several. The same
    copy for the same windows: the host lets cond and uncond share a batch only if they have one control. Raises
    ValueError as check_controls does.
    """
    key = "controls", tuple(rects), place, index
    if counts_rows(control):
        run_alone(canvas, f"control {type(control).__name__}")
    else:
        control = _first_alike(control, canvas)
    if key not in canvas.copies:
        parts = tuple(parts_in_window(place, rect, canvas.size)[index][1] for rect in rects)
        canvas.copies[key] = _copies(View(parts, (place.height, place.width), canvas))
    return _copy_of(control, canvas.copies[key])


def _first_alike(control, canvas: Canvas):
    """The first of copies that hold the same: the host's ControlNetApply makes one for each entry of a conditioning."""
    seen = canvas.prepared.setdefault("seen controls", [])
    found = next((one for one in seen if are_copies(one, control)), None)
    if found is None:
        seen.append(control)
    return control if found is None else found


def check_controls(conds: Iterable[list[dict]]) -> None:
    """Raise ValueError for a control of these conditionings that windows cannot be cut from."""
    copies = Copies(lambda path, value: None, _is_control, closed=MODELS)
    for entry in (entry for entries in conds for entry in entries or ()):
        if entry.get("control") is not None:
            _copy_of(entry["control"], copies)


def counts_rows(control) -> bool:
    """True if a control of the chain is not the host's own, and may take the rows of a batch for images of one."""
    while isinstance(control, comfy.controlnet.ControlBase):
        if type(control).__module__ != comfy.controlnet.__name__ or _replaced_methods(control):
            return True
        control = control.previous_controlnet
    return False


def _copy_of(control, copies: Copies):
    if not isinstance(control, comfy.controlnet.ControlBase):
        raise _refused(control, "which is none of ComfyUI's")
    try:
        return copies.of(control, type(control).__name__)
    except TypeError as error:
        if control.previous_controlnet is not None:
            _copy_of(control.previous_controlnet, Copies(lambda path, value: None, _is_control, closed=MODELS))
        raise _refused(control, f"something in which cannot be copied ({error})") from error


def _copies(view: View) -> Copies:
    return Copies(lambda path, value: _replaced(path, value, view), _is_control, lambda value, part: _finish(part, view), MODELS)


def _replaced(path: Sequence[str], value, view: View):
    """The part of a mask, or of a hint in another place than the host's."""
    if path[-1] in HINTS or getattr(value, "ndim", 0) < 2 or not (is_mask(path) or is_hint(path)):
        return None
    part = cut_to(value, view, "bilinear" if is_mask(path) else "nearest-exact")
    if part is None and min(value.shape[-2:]) > 1:
        passes_whole(view.canvas, f"mask {'.'.join(filter(None, path))}, {tuple(value.shape)},")
    return part


def _is_control(value) -> bool:
    if not isinstance(value, comfy.controlnet.ControlBase):
        return False
    _check_methods(value)
    return True


def _check_methods(control) -> None:
    for name, function in _replaced_methods(control).items():
        if name in NOT_IN_WINDOWS:
            continue
        while isinstance(function, (functools.partial, types.MethodType)):
            function = function.func if isinstance(function, functools.partial) else function.__func__
        if isinstance(function, types.FunctionType) and any(isinstance(part, comfy.controlnet.ControlBase) for part in reachable(function, MODELS)):
            raise _refused(control, f"whose {name} is a function made for that one object ({function.__qualname__})")
        elif not isinstance(function, types.FunctionType) and not isinstance(getattr(type(function), "__call__", None), types.FunctionType):
            raise _refused(control, f"whose {name} is not written in Python ({type(function).__name__})")
    if control.previous_controlnet is not None and not isinstance(control.previous_controlnet, comfy.controlnet.ControlBase):
        raise _refused(control.previous_controlnet, "which is none of ComfyUI's")
    if control.cond_hint_original is not None and not torch.is_tensor(control.cond_hint_original):
        raise _refused(control, f"whose hint is no picture ({type(control.cond_hint_original).__name__})")


def _replaced_methods(control) -> dict:
    """What an object has in the place of methods of its class."""
    return {name: value for name, value in vars(control).items() if callable(value) and callable(getattr(type(control), name, None))}


def _refused(control, why: str) -> ValueError:
    return ValueError(
        f"control {type(control).__name__}: expected one whose part for a window can be taken, got one {why}. "
        "Remove it, use ComfyUI's own Apply ControlNet, or make min_window as large as the picture, so that there is one window.")


def _finish(part, view: View) -> None:
    """Complete the copy of a control, or of what belongs to one."""
    empty_caches(part, MODELS)
    if not isinstance(part, comfy.controlnet.ControlBase):
        return
    part.cond_hint = part.extra_concat = None
    if part.cond_hint_original is not None:
        _cut_hint(part, view)
    if isinstance(part, comfy.controlnet.T2IAdapter):
        part.control_input = None
        part.__class__ = type("WindowAdapter", (_FreshFeatures, type(part)), {})


def _cut_hint(part, view: View) -> None:
    """Give a copy of a control the windows' part of its hint, and of what is concatenated to that."""
    rects, size, canvas = view.rects, view.size, view.canvas
    algorithm, element, unshuffle = part.upscale_algorithm, part.compression_ratio, getattr(getattr(part, "t2i_model", None), "unshuffle_amount", 1)
    cell_px = element * (part.vae.spacial_compression_encode() if part.vae is not None else 1)
    whole = _whole_hint(part, size, cell_px, unshuffle, canvas)
    part.cond_hint_original = cut_padded(whole, rects, size, cell_px, unshuffle, canvas.rows)
    if part.vae is not None:
        encoded = _whole_latent(part, whole, canvas)
        _give_encoded(part, cell_px // element, cut_rows(encoded, in_units_of(encoded, rects, element, element), canvas.rows))
    concat = [scaled(value, size[0] * element, size[1] * element, algorithm) for value in part.extra_concat_orig]
    part.extra_concat_orig = [cut_rows(value, in_units_of(value, rects, element, element), canvas.rows) for value in concat]


def _give_encoded(part, px: int, latent: torch.Tensor) -> None:
    """Let a control have the windows' latents for its hint, which has so many px per element of them.

    Beside its VAE the host loads all models again, whatever else they are just doing: its own classes are left none.
    """
    if type(part).__module__ != comfy.controlnet.__name__ or "get_control" in vars(part):
        part.vae = _EncodedHint(part.vae, px, latent)
        return
    part.cond_hint_original = latent if part.latent_format is None else part.latent_format.process_in(latent)
    # Of the same size, no value is changed.
    part.vae, part.latent_format, part.preprocess_image, part.upscale_algorithm = None, None, _as_it_is, "nearest-exact"


def _as_it_is(hint: torch.Tensor) -> torch.Tensor:
    return hint


def _whole_hint(control, size: tuple[int, int], cell_px: int, unshuffle: int, canvas: Canvas) -> torch.Tensor:
    """The hint as the host would scale it for the whole, kept for the run."""
    height, width = (-(-length * cell_px // unshuffle) * unshuffle for length in size)
    hint = control.cond_hint_original
    key = "hint", id(hint), (height, width), control.upscale_algorithm
    if key not in canvas.prepared:
        canvas.prepared[key] = scaled(hint, height, width, control.upscale_algorithm)
    return canvas.prepared[key]


def _whole_latent(control, hint: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """The hint after the VAE, whose receptive field reaches beyond a window."""
    key = "latent", id(hint), control.vae, control.preprocess_image
    if key not in canvas.prepared:
        canvas.prepared[key] = with_models_kept(lambda: control.vae.encode(control.preprocess_image(hint).movedim(1, -1)))
    return canvas.prepared[key]


def with_models_kept(encode):
    """Encode, and load again what the VAE has displaced."""
    loaded = comfy.model_management.loaded_models(only_currently_used=True)
    latent = encode()
    # The host lists models that are gone as None, and fails on them.
    comfy.model_management.load_models_gpu([model for model in loaded if model is not None])
    return latent


@dataclass(frozen=True, eq=False)
class _EncodedHint:
    """In the place of a control's VAE: what encoding the windows gives is known already."""

    vae: object
    cell_px: int
    latent: torch.Tensor

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.vae, name)

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

"""How is the part of a window taken from what covers the whole canvas? In cells of the latent, unless said otherwise."""
from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import comfy.utils

from .utils import Rect, cut_latent, in_units_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Canvas:
    """The latent that windows are cut from.

    model: the host's, which its conditionings were made for. shape: of x, (B, C, [T,] height, width). patch: the side of the
    model's patch. prepared: what was made once for the run. copies: what was made for batches of windows; the second part of
    a key is their windows. wraps: which axes are rings, see windows.py. lock: held by whoever looks into these, as several
    devices may evaluate windows at once.
    """

    model: object
    shape: tuple[int, ...]
    device: torch.device
    patch: int
    prepared: dict
    copies: dict
    wraps: tuple[bool, bool] = (False, False)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]


def cut_rows(value: torch.Tensor, rects: Sequence[Rect], rows: int) -> torch.Tensor:
    """Cut a tensor with a row for all images, or one each, to windows."""
    if len(rects) > 1:
        value = comfy.utils.repeat_to_batch_size(value, rows)
    return cut_latent(value, rects)


def scaled(value: torch.Tensor, height: int, width: int, algorithm: str) -> torch.Tensor:
    """Planes of another size, a picture of another proportion around its middle, as the host scales hints."""
    return value if tuple(value.shape[-2:]) == (height, width) else comfy.utils.common_upscale(value, width, height, algorithm, "center")


def cut_padded(value: torch.Tensor, rects: Sequence[Rect], size: tuple[int, int], cell: int, multiple: int, rows: int) -> torch.Tensor:
    """Cut what has `cell` elements per cell, and more at its end, to windows of whole multiples of elements.

    A window over the border goes on without what there is beyond `size`, (height, width) in cells.
    """
    if len(rects) > 1:
        value = comfy.utils.repeat_to_batch_size(value, rows)
    parts = []
    for rect in rects:
        inside = value[..., :size[0] * cell if rect.top < 0 else None, :size[1] * cell if rect.left < 0 else None]
        parts.append(cut_latent(inside, in_units_of(inside, [rect], cell, cell, multiple)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def passes_whole(canvas: Canvas, what: str) -> None:
    """Say once in a run that windows see the whole of something."""
    say_once(canvas, f"{what} is not known to belong to a part of the picture: every window sees the whole of it")


def run_alone(canvas: Canvas, what: str) -> None:
    """Say once in a run that windows do not share a batch."""
    say_once(canvas, f"{what} may take the windows of a batch for images: they are run one at a time")


def say_once(canvas: Canvas, line: str) -> None:
    if ("said", line) not in canvas.prepared:
        canvas.prepared["said", line] = True
        log.info("%s", line)

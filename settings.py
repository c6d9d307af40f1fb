"""What did the user choose for a run?"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .blending import METHODS, SHIFTS
from .denoise_schedule import SCHEDULES
from .model_facts import patch_cells
from .quadtree import Quadtree
from .windows import WINDOW_SHAPES, WRAPS, WindowSizes, window_sizes

# Windows as tight as what is active have lengths that are multiples of this; half of it was measured to save 1 % more.
STEP_PX = 64


@dataclass(frozen=True, eq=False)
class Settings:
    """What the user chose. Sizes are pixels of the picture that is sampled; tile_batch_size 0 is as memory allows.

    original, sigmas: the clean latent, as the host's nodes pass it, and the whole schedule, for a stage of several.
    tell: is given lines for the user, how far a step is and in the end what the run did, each with its numbers by name.
    wrap: along which axes the picture goes on over its border, one of WRAPS.
    hold_tones: how much of the original's tones is held against windows that drift apart, see tones.py.
    hold_layout: how far windows follow a look at the whole picture, see layout.py.
    window_shapes: one of WINDOW_SHAPES.
    """

    tree: Quadtree
    method: str = "Mixture of Diffusers"
    schedule: str = "img2img"
    tile_overlap: int = 64
    tile_batch_size: int = 0
    skip_diffusion_below: float = 0.0
    min_window: int = 512
    max_window: int = 1024
    shift_method: str = "random"
    seed: int = 0
    original: torch.Tensor | None = None
    sigmas: torch.Tensor | None = None
    tell: Callable[..., None] | None = None
    wrap: str = "none"
    hold_tones: float = 0.0
    window_shapes: str = "tight"
    hold_layout: float = 0.0

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("schedule", SCHEDULES), ("shift_method", SHIFTS), ("wrap", WRAPS), ("window_shapes", WINDOW_SHAPES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}.")
        check_windows(self.min_window, self.max_window)
        if self.tile_overlap < 0 or self.tile_batch_size < 0:
            raise ValueError(f"tile_overlap and tile_batch_size: expected 0 or more, got {self.tile_overlap} and {self.tile_batch_size}.")
        if not 0 <= self.skip_diffusion_below <= 1:
            raise ValueError(f"skip_diffusion_below: expected a strength from 0 to 1, got {self.skip_diffusion_below}.")
        for name in ("hold_tones", "hold_layout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}.")

    def sizes(self, model, are_square: bool = False) -> WindowSizes:
        """The windows' sizes in cells of this model's latents. are_square: whatever the user chose."""
        cell_px = model.latent_format.spacial_downscale_ratio
        overlap = 0 if self.method == "SpotDiffusion" else self.tile_overlap
        step = 0 if are_square or self.window_shapes == "square" else math.ceil(STEP_PX / cell_px)
        return window_sizes(self.min_window // cell_px, self.max_window // cell_px, math.ceil(overlap / cell_px), patch_cells(model), WRAPS[self.wrap], step)


def check_windows(min_window: int, max_window: int) -> None:
    """Raise ValueError unless the sides of windows, in pixels, are in order."""
    if not 0 < min_window <= max_window:
        raise ValueError(
            f"min_window: expected at least 1 px and at most max_window ({max_window}), got {min_window}. Make min_window smaller or max_window larger.")

"""How do windows add up, and where does a grid without overlap move? In cells of the latent."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .utils import Rect, cut, pieces, slices
from .windows import TilePlan, Window

METHODS = ("Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion")

SHIFTS = ("random", "sorted", "fibonacci")


def blend_weight(method: str, height: int, width: int, overlap: int) -> torch.Tensor:
    """The weight of a window's cells, (height, width), above 0 everywhere.

    MultiDiffusion (arXiv 2302.08113) averages; Mixture of Diffusers (arXiv 2302.02412) trusts the middle. Its Gaussian
    passes from one window to the next within two to seven cells; here the weight is flat in the middle and falls along
    each axis as a raised cosine over all the cells that neighbours share, twice the overlap.
    """
    if method == "MultiDiffusion":
        return torch.ones(height, width)
    if method != "Mixture of Diffusers":
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    falloffs = []
    for length in (height, width):
        depth = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 0.5
        falloffs.append(torch.sin(math.pi / 2 * (depth / max(2 * overlap, 1)).clamp(max=1)).square())
    return falloffs[0][:, None] * falloffs[1]


@dataclass(frozen=True, slots=True)
class Blend:
    """How the windows of one plan add up: weights per shape, and their sum over the latent."""

    weights: dict[tuple[int, int], torch.Tensor]
    total: torch.Tensor | None

    def part_of(self, window: Window) -> Rect:
        """The cells of a window that are taken from it."""
        return window.core if self.total is None else window.rect

    def weight_of(self, window: Window, like: torch.Tensor) -> torch.Tensor:
        """The weight of a window's cells, (height, width); the weights of all windows sum to 1 on every active cell."""
        if self.total is None:
            return _core_only(window, like)
        return (self.weights[window.rect.height, window.rect.width] / cut(self.total, window.rect)).to(like.dtype)


def plan_blend(method: str, plan: TilePlan, overlap: int, device: torch.device) -> Blend:
    """Make the weights of a plan whose windows overlap by so many cells on every side.

    SpotDiffusion (arXiv 2407.15507) does not blend: each cell comes from the window whose core holds it.
    """
    if method == "SpotDiffusion":
        return Blend({}, None)
    shapes = {(window.rect.height, window.rect.width) for window in plan.windows}
    weights = {shape: blend_weight(method, *shape, overlap).to(device) for shape in shapes}
    total = torch.zeros(plan.height, plan.width, device=device)
    for window in plan.windows:
        for here, there in pieces(window.rect, *total.shape):
            total[slices(here)] += weights[window.rect.height, window.rect.width][slices(there)]
    return Blend(weights, total)


def shift_offsets(method: str, steps: int, side: int, patch: int, seed: int) -> list[tuple[int, int]]:
    """How far SpotDiffusion moves its grid at each step: multiples of an eighth of the side.

    random: uniform. sorted: the same, in growing order. fibonacci: the golden ratio's sequence, which spreads seams most evenly.
    """
    if method not in SHIFTS:
        raise ValueError(f"shift_method: expected one of {', '.join(SHIFTS)}, got {method!r}.")
    places = torch.rand(steps, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if method == "sorted":
        places = places.sort(0).values
    if method == "fibonacci":
        ratios = torch.tensor([0.6180339887498949, 0.7548776662466927], dtype=torch.float64)
        places = (places[:1] + torch.arange(steps)[:, None] * ratios) % 1
    stride = max(side // 8 // patch, 1) * patch
    return [(down * stride, across * stride) for down, across in (places * (side // stride)).long().tolist()]


def _core_only(window: Window, like: torch.Tensor) -> torch.Tensor:
    """1 on the window's core, 0 on the rest of it."""
    weight = like.new_zeros(window.rect.height, window.rect.width)
    core, rect = window.core, window.rect
    weight[core.top - rect.top:core.bottom - rect.top, core.left - rect.left:core.right - rect.left] = 1
    return weight

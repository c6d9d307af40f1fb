"""How are the original's tones held, where windows would drift apart? In cells of the latent.

Windows know each other through the latent alone, so at high strengths their colours drift. What is slow in the picture,
over about a window, is pulled back to the original's while there is noise to hide it (arXiv 2504.06232, 2406.18459).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F


def hold_at(hold: float, progress: float) -> float:
    """How much of the difference in tones is taken back at a progress from 0 to 1."""
    return hold * (1 - progress)


def low_pass(value: torch.Tensor, side: int, wraps: tuple[bool, bool] = (False, False)) -> torch.Tensor:
    """What varies more slowly than over `side` cells: the means of squares, read evenly between their middles.

    value: (..., height, width); what is no number in it counts as 0, so that it does not spread. wraps: along which axes, (down,
    across), the last cells are neighbours of the first.
    """
    planes = value.flatten(0, -3)[:, None].float().nan_to_num(0.0, 0.0, 0.0)
    height, width = planes.shape[-2:]
    rows, cols = (max(round(length / side), 1) for length in (height, width))
    means = F.adaptive_avg_pool2d(planes, (rows, cols))
    means = F.pad(means, (0, 0, 1, 1), mode="circular" if wraps[0] and rows > 1 else "replicate")
    means = F.pad(means, (1, 1, 0, 0), mode="circular" if wraps[1] and cols > 1 else "replicate")
    return _between(_between(means, height, rows, -2), width, cols, -1).view(value.shape).to(value)


def _between(means: torch.Tensor, length: int, count: int, dim: int) -> torch.Tensor:
    """Read `length` values evenly between `count` means, which have one more on either side."""
    places = (torch.arange(length, device=means.device) + 0.5) * count / length + 0.5
    first = places.floor().long()
    weight = (places - first).to(means.dtype)
    weight = weight if dim == -1 else weight[:, None]
    return torch.lerp(means.index_select(dim, first), means.index_select(dim, first + 1), weight)

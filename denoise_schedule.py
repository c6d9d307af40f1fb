"""How much of the model does a leaf get at a sigma? From a leaf's strength to its share at each step.

Contract of every schedule, with `strength` d in 0..1: the share lies in 0..1, d = 0 gives 0 at every step, d = 1 gives 1 at
every step, and a larger d never gives less.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

SCHEDULES = ("img2img", "blend", "ramp")

# Without an original nothing can be preserved: a slower model still ends without noise, a stopped one does not.
TXT2IMG_FLOOR = 0.70

# Over how many cells strengths rise at a border; see eased.
EASE_CELLS = 4

# How far a strength may be from the one that was meant: half of the hundredth that is typed, and half a level of an 8-bit mask.
ROUNDING = 0.005 + 0.5 / 255

# Half of the smallest step that a schedule of thousands of steps takes; strengths come from float32.
TOLERANCE = 1e-5


def share_at(schedule: str, strength: torch.Tensor, progress: float) -> torch.Tensor:
    """The model's share of the result for each strength, at a progress from 0 (first step) to 1 (end).

    img2img: 0 until the last d of the steps, then 1. blend: d throughout. ramp: from d to 1, but 0 for d = 0.
    """
    if schedule == "img2img":
        return ((strength > 0) & (strength + progress >= 1 - TOLERANCE)).to(strength.dtype)
    if schedule == "blend":
        return strength
    if schedule == "ramp":
        return torch.where(strength > 0, strength + (1 - strength) * progress, torch.zeros_like(strength))
    raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}.")


def on_steps(schedule: str, strength: torch.Tensor, steps: int) -> torch.Tensor:
    """The strengths that were meant: with img2img, what lies just below one that takes a step more is raised to it.

    0.33 of 3 steps, or 191/255 of 8, is 1/3 and 3/4 as well as it can be typed or painted. Just below: by ROUNDING, and by
    a quarter of a step at most. 0 stays 0. The other schedules use every strength as it is.
    """
    if schedule != "img2img" or steps < 1:
        return strength
    above = (strength.double() * steps - TOLERANCE).ceil() / steps
    meant = (strength > 0) & (above - strength.double() <= min(ROUNDING, 0.25 / steps) + TOLERANCE)
    return torch.where(meant, above.to(strength.dtype), strength)


def eased(strength: torch.Tensor, cells: int, wraps: tuple[bool, bool] = (False, False)) -> torch.Tensor:
    """Let the strength rise evenly over so many cells at every border, whatever the height of the step.

    strength: (height, width). The rise lies in the leaf that changes more: no strength is raised, 0 stays 0, and what
    is `cells` away from every weaker cell is as it was. A step between two strengths shows as a line in the result.
    wraps: along which axes, (down, across), the first cells are neighbours of the last.
    """
    rising = strength
    for distance in range(1, cells):
        weakest = -F.max_pool2d(-_with_neighbours(strength, distance, wraps)[None], 2 * distance + 1, stride=1)[0]
        rising = torch.minimum(rising, torch.lerp(weakest, strength, distance / cells))
    return rising


def _with_neighbours(strength: torch.Tensor, cells: int, wraps: tuple[bool, bool]) -> torch.Tensor:
    """The strengths and so many cells around: those at the other end, or the nearest ones again."""
    places = (torch.arange(-cells, length + cells, device=strength.device) for length in strength.shape)
    rows, cols = (place % length if ring else place.clamp(0, length - 1) for place, length, ring in zip(places, strength.shape, wraps))
    return strength[rows][:, cols]


def txt2img_share_at(strength: torch.Tensor, progress: float, steps: int) -> torch.Tensor:
    """The share of the model's velocity where there is no original: max(0.70, d), rising to 1 on the last step."""
    last = (steps - 1) / steps
    rise = 1.0 if progress >= last - TOLERANCE else progress / last
    slow = strength.clamp_min(TXT2IMG_FLOOR)
    return slow + (1 - slow) * rise

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

# Half of the smallest step that a schedule of thousands of steps takes; strengths come from float32.
_TOLERANCE = 1e-5


def share_at(schedule: str, strength: torch.Tensor, progress: float) -> torch.Tensor:
    """The model's share of the result for each strength, at a progress from 0 (first step) to 1 (end).

    img2img: 0 until the last d of the steps, then 1. blend: d throughout. ramp: from d to 1, but 0 for d = 0.
    """
    if schedule == "img2img":
        return ((strength > 0) & (strength + progress >= 1 - _TOLERANCE)).to(strength.dtype)
    if schedule == "blend":
        return strength
    if schedule == "ramp":
        return torch.where(strength > 0, strength + (1 - strength) * progress, torch.zeros_like(strength))
    raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}.")


def eased(strength: torch.Tensor, cells: int) -> torch.Tensor:
    """Let the strength rise evenly over so many cells at every border, whatever the height of the step.

    strength: (height, width). The rise lies in the leaf that changes more: no strength is raised, 0 stays 0, and what
    is `cells` away from every weaker cell is as it was. A step between two strengths shows as a line in the result.
    """
    rising = strength
    for distance in range(1, cells):
        weakest = -F.max_pool2d(-strength[None], 2 * distance + 1, stride=1, padding=distance)[0]
        rising = torch.minimum(rising, torch.lerp(weakest, strength, distance / cells))
    return rising


def txt2img_share_at(strength: torch.Tensor, progress: float, steps: int) -> torch.Tensor:
    """The share of the model's velocity where there is no original: max(0.70, d), rising to 1 on the last step."""
    last = (steps - 1) / steps
    rise = 1.0 if progress >= last - _TOLERANCE else progress / last
    slow = strength.clamp_min(TXT2IMG_FLOOR)
    return slow + (1 - slow) * rise


def progress_at(sigma: float, sigmas: tuple[float, ...]) -> float:
    """The position of a sigma in a falling schedule, from 0 (its first) to 1 (its last), interpolated between entries.

    A sigma that occurs several times counts at its first place; one outside the schedule at the nearest end.
    """
    steps = len(sigmas) - 1
    for step, (here, below) in enumerate(zip(sigmas, sigmas[1:])):
        # The host rounds sigmas to the model's precision on the way: equal to five digits is equal.
        if sigma >= here * (1 - 1e-5):
            return step / steps
        if sigma > below * (1 + 1e-5):
            return (step + (here - sigma) / (here - below)) / steps
    return 1.0

"""How much of the model does a leaf get at a sigma? From a leaf's strength to its share at each step.

Contract of every schedule, with `strength` d in 0..1: the share lies in 0..1, d = 0 gives 0 at every step, d = 1 gives 1 at
every step, and a larger d never gives less.
"""
from __future__ import annotations

import math

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
_TOLERANCE = 1e-5

# Calls of the model that one step takes at most, as long as a sampler has not shown how many it takes.
_MOST_STAGES = 3


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


def on_steps(schedule: str, strength: torch.Tensor, steps: int) -> torch.Tensor:
    """The strengths that were meant: with img2img, what lies just below one that takes a step more is raised to it.

    0.33 of 3 steps, or 191/255 of 8, is 1/3 and 3/4 as well as it can be typed or painted. Just below: by ROUNDING, and by
    a quarter of a step at most. 0 stays 0. The other schedules use every strength as it is.
    """
    if schedule != "img2img" or steps < 1:
        return strength
    above = (strength.double() * steps - _TOLERANCE).ceil() / steps
    meant = (strength > 0) & (above - strength.double() <= min(ROUNDING, 0.25 / steps) + _TOLERANCE)
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


def falling_part(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    """The schedule that strengths count in: it begins at its largest sigma; sigmas that only rise stay as they are.

    Samplers that resample put a 0 in front.
    """
    largest = max(range(len(sigmas)), key=sigmas.__getitem__, default=0)
    return sigmas[largest:] if largest < len(sigmas) - 1 else sigmas


class Clock:
    """How far a sampler is: the progress of each of its calls of the model, from 0 to 1, which never falls.

    Known from the sigma of each call and, where the sampler calls back, from its steps, since some tell the model another
    sigma than the latent has. The host's samplers call back after a step's first call, others at its end, some never.

    sigmas: the sampler's own. schedule: what progress counts in, of which they are a part.
    counts: False if callbacks count steps that are not the schedule's.
    """

    def __init__(self, sigmas: tuple[float, ...], schedule: tuple[float, ...], counts: bool = True):
        self.sigmas, self.schedule, self.counts = sigmas, schedule, counts
        self.first = len(sigmas) - len(falling_part(sigmas))
        found = [progress_at(sigma, schedule) for sigma in sigmas[self.first:]]
        self.begins = (found[0],) * self.first + tuple(max(found[:step + 1]) for step in range(len(found)))
        self.progress = self.begins[0]
        self.step: int | None = None  # the step of the last call
        self.back: int | None = None  # the number that was last called back with, and how many steps there were said to be
        self.total: int | None = None
        self.shift = 0  # what is to be added to these numbers
        self.twice = False  # whether it came a second time
        self.late = False  # whether the sampler calls back at a step's end
        self.calls = 0  # calls since it called back
        self.usual: int | None = None  # calls from one callback to the next
        self.told = self.begun = 0.0  # the sigma of the last call, and of the step's first
        self.ratio = 1.0  # told over scheduled, where the last known step began
        self.latest: tuple[torch.Tensor, torch.Tensor] | None = None  # x and denoised of the first callback

    @property
    def at_end(self) -> bool:
        """Whether the last step was sampled, or one that is nearer to it than to the one before."""
        last = len(self.sigmas) - 2
        return last < 0 or (self.step is not None and self.progress >= (self.begins[last] + self.begins[max(last - 1, 0)]) / 2)

    def call(self, sigma: float, x: torch.Tensor) -> float:
        """The progress of a call of the model."""
        self.calls += 1
        if not self.counts:
            self.step, found = 0, progress_at(sigma, self.schedule)
        elif (step := self._begins_with(sigma)) is not None:
            self.step, self.begun, found = step, sigma, self.begins[step]
            self._compare(sigma)
        else:
            found = self._within(sigma, x)
        self.told, self.latest = sigma, None
        self.progress = max(self.progress, found)
        return self.progress

    def callback(self, number: int, total: int | None = None, latest: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """The sampler's own word for the step that it is in. latest: x and denoised of the step."""
        if not self.counts or self.step is None:
            return
        if self.back is None or number < self.back or total != self.total:
            self._count_anew(number)
        elif number == self.back:
            self.twice = True
            return
        else:
            self.usual = math.ceil(self.calls / (number - self.back))
        self.twice = False
        self.back, self.total, self.calls, self.latest = number, total, 0, latest if self.usual is None else None
        self._set_step(number + self.shift)

    def _count_anew(self, number: int) -> None:
        """The first callback, or that of a further part of a chain of samplers, which counts from 0 again."""
        first = self.back is None
        self.late = self.late or (first and self.calls > 1)
        if not first:
            self.step = max(self.step, sum(begin <= self.progress + _TOLERANCE for begin in self.begins) - 1)
        self.shift = max(self.step - number, 0) if first else self.step - number
        self.usual = math.ceil(self.calls / (number + 1)) if self.late else None

    def _set_step(self, step: int) -> None:
        self.counts = 0 <= step < len(self.sigmas) - 1
        if self.counts:
            self.step = step
            self.progress = max(self.progress, self.begins[step])
            if not self.late:
                self.begun = self.told
                self._compare(self.told)

    def _begins_with(self, sigma: float) -> int | None:
        """The step whose first call this is, if that is sure."""
        if self.step is None:
            return self.first if sigma > self.sigmas[self.first] / 2 else 0
        if self.back is None or self.step + 2 > len(self.sigmas) - 1:
            return None
        if self.late:
            return self._told_step(sigma) if self.calls == 1 else None
        if self.twice and (ahead := self._told_step(sigma)) > self.step + 1:
            # A chain of samplers whose first took one step.
            self.shift, self.twice = self.shift + ahead - self.step - 1, False
            return ahead
        if self.usual is None:
            return None
        # Some evaluate a step's beginning twice.
        again = math.isclose(sigma, self.begun, rel_tol=1e-6) and self.sigmas[self.step] != self.sigmas[self.step + 1]
        return self.step + 1 if self.calls == self.usual and not again else None

    def _told_step(self, sigma: float) -> int:
        """The step after the one that was called back, or a later one where the sampler calls back even later, if sigmas tell."""
        if self.ratio != 1:
            return self.step + 1
        return next((step for step in range(self.step + 2, len(self.sigmas) - 1) if math.isclose(sigma, self.sigmas[step], rel_tol=1e-5)), self.step + 1)

    def _has_next_noise(self, x: torch.Tensor) -> bool:
        """Whether x lies where a first step of first order ends, whatever sigma the model is told."""
        if self.latest is None or self.latest[0].shape != x.shape:
            return False
        before, denoised = self.latest
        direction, reached = before - denoised, x - denoised
        length = float(direction.square().sum())
        left = float((reached * direction).sum()) / max(length, 1e-12)
        here, below = self.sigmas[self.step:self.step + 2]
        # On the way there, with no noise of the sampler's own beside it.
        beside = float((reached - left * direction).square().sum())
        return abs(left * here - below) < 0.01 * (here - below) and beside < 1e-4 * length

    def _within(self, sigma: float, x: torch.Tensor) -> float:
        """By its sigma, as the sampler tells sigmas, between the steps that are known to have begun and not to have."""
        if self._has_next_noise(x):
            return self.begins[self.step + 1]
        found = progress_at(sigma / self.ratio, self.schedule)
        above = next((begin for begin in self.begins if begin >= found), 1.0)
        if above - found < 0.02 / (len(self.schedule) - 1):
            found = above
        if self.back is not None and self.calls <= (self.usual or _MOST_STAGES):
            found = min(found, self.begins[self.step + 1])
        return found

    def _compare(self, sigma: float) -> None:
        """Learn how the sampler tells sigmas; one that is far from the step's own belongs to another step."""
        scheduled = self.sigmas[self.step]
        ratio = sigma / scheduled if scheduled > 0 and sigma > 0 else 1.0
        self.counts = 0.5 <= ratio <= 2
        # The host moves a first sigma of 1 by a ten-thousandth.
        self.ratio = 1.0 if abs(ratio - 1) < 1e-3 else ratio

"""How far is a sampler? The progress of each of its calls of the model, from 0 to 1, which never falls."""
from __future__ import annotations

import math

import torch

from .denoise_schedule import TOLERANCE

# Calls of the model that one step takes at most, as long as a sampler has not shown how many it takes.
_MOST_STAGES = 3


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


def places(sigmas: tuple[float, ...], schedule: tuple[float, ...]) -> list[float]:
    """The progress at which each of the sigmas is reached: by their order where they are a stretch of the schedule, else one by one.

    By their order, sigmas that are repeated are steps like all others.
    """
    steps = len(schedule) - 1
    for first in range(steps + 2 - len(sigmas)):
        if steps and all(math.isclose(sigma, other, rel_tol=1e-5) for sigma, other in zip(sigmas, schedule[first:])):
            return [(first + step) / steps for step in range(len(sigmas))]
    return [progress_at(sigma, schedule) for sigma in sigmas]


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
        found = places(sigmas[self.first:], schedule)
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
            self.step = max(self.step, sum(begin <= self.progress + TOLERANCE for begin in self.begins) - 1)
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
        found = self._repeated(sigma) or progress_at(sigma / self.ratio, self.schedule)
        above = next((begin for begin in self.begins if begin >= found), 1.0)
        if above - found < 0.02 / (len(self.schedule) - 1):
            found = above
        if self.back is not None and self.calls <= (self.usual or _MOST_STAGES):
            found = min(found, self.begins[self.step + 1])
        return found

    def _repeated(self, sigma: float) -> float | None:
        """Where the next step of the same sigma begins, if the schedule repeats it."""
        same = [begin for begin, scheduled in zip(self.begins, self.sigmas) if math.isclose(sigma, scheduled * self.ratio, rel_tol=1e-5)]
        return next((begin for begin in same if begin > self.progress), None) if len(same) > 1 else None

    def _compare(self, sigma: float) -> None:
        """Learn how the sampler tells sigmas; one that is far from the step's own belongs to another step."""
        scheduled = self.sigmas[self.step]
        ratio = sigma / scheduled if scheduled > 0 and sigma > 0 else 1.0
        self.counts = 0.5 <= ratio <= 2
        # The host moves a first sigma of 1 by a ten-thousandth.
        self.ratio = 1.0 if abs(ratio - 1) < 1e-3 else ratio

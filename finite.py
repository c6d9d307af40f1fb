"""Did the model return numbers, and if not, where and at which step?

What is no number spreads: a window that overlaps one has nothing but such at the next step, and the picture is black there.
So the first step of it counts, and its cells.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .utils import Rect, slices

# Rectangles named in one line.
NAMED = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Glance:
    """What one evaluation gave: which cells, (height, width), are numbers, at a step of so many, in these windows.

    Made on the latent's device, which is not waited for.
    """

    finite: torch.Tensor
    step: int
    steps: int
    rects: tuple[Rect, ...]

    @classmethod
    def at(cls, denoised: torch.Tensor, step: int, steps: int, rects: Sequence[Rect]) -> Glance:
        """A sum is a number only if all that is summed are."""
        return cls(denoised.sum(dim=tuple(range(denoised.ndim - 2))).isfinite(), step, steps, tuple(rects))

    def warning(self, cell_px: int) -> str | None:
        """The line about cells that are no numbers, in pixels; None if all are. Waits for the device."""
        if bool(self.finite.all()):
            return None
        lost = ~self.finite.cpu()
        rows, cols = lost.any(1).nonzero(), lost.any(0).nonzero()
        region = Rect(int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1)
        # Windows over the border of a ring are not told apart.
        whole = [rect for rect in self.rects if min(rect.top, rect.left) >= 0 and bool(lost[slices(rect)].all())]
        windows = f", all of {'windows' if len(whole) > 1 else 'window'} {_listed(whole, cell_px)}" if whole else ""
        return (
            f"step {self.step} of {self.steps}: the model returned what is no number (NaN or infinity) for {100 * float(lost.double().mean()):.0f} % of the picture, "
            f"within {_in_px(region, cell_px)}{windows}. It will be black or noise there. Use another precision (--fp32-unet, --bf16-unet), attention or sampler, "
            "or look for a damaged model, LoRA or prompt.")


@dataclass(eq=False)
class Lookout:
    """Looks at what every call gives until something was found. found: its line, which is in the log by then."""

    cell_px: int
    found: list[str]
    _last: Glance | None = None

    def look(self, denoised: torch.Tensor, step: int, steps: int, rects: Sequence[Rect]) -> None:
        """Remember a call's result, of the last two dimensions (height, width), and say what there is to say of the one before.

        That one's device is waited for in any case when the sampler asks again.
        """
        self.tell()
        if not self.found:
            self._last = Glance.at(denoised, step, steps, rects)

    def tell(self) -> None:
        line = self._last and self._last.warning(self.cell_px)
        self._last = None
        if line:
            self.found.append(line)
            log.warning("%s", line)


def _listed(rects: Sequence[Rect], cell_px: int) -> str:
    more = f" and {len(rects) - NAMED} more" if len(rects) > NAMED else ""
    return ", ".join(_in_px(rect, cell_px) for rect in rects[:NAMED]) + more


def _in_px(rect: Rect, cell_px: int) -> str:
    return f"{rect.width * cell_px} x {rect.height * cell_px} px at {rect.left * cell_px}, {rect.top * cell_px}"

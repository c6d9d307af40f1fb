"""Which windows does a decode of what changed need, and what do they cost? In cells of what the decoder gets.

A window's core is a rectangle of whole blocks. Around it lies what the steps that are left still look at; as it is trimmed
after each, a margin that is wide where the picture is small and cheap costs little where it is large.

Normalisations need the statistics of all the picture. What no window holds is told from what they hold: its blocks are
given weights with which their features, known everywhere from the decoder's coarsest resolution, add up to those of the whole
picture (calibration: Deville and Sarndal 1992). A few small samples of the rest show what there is nowhere else.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .decoders import FAR_CELLS, FULL, Decoder, Step
from .utils import Rect, block_means, grown, scaled, shrunk

# Side of a block. A sample is one: many small ones say more of a picture than few large ones of the same cost.
BLOCK = 2

# The least number of samples. More come as far as all operations stay below AIM times the share that changed, and themselves
# below MOST_SAMPLES of a whole decode's.
LEAST_SAMPLES, MOST_SAMPLES, AIM = 24, 0.04, 1.3

# Where less than FEW of the picture changed, windows say so little of the rest that the least grows, to LEAST_OF_FEW at most.
FEW, LEAST_OF_FEW = 0.25, 128

# A sample has so much of what the steps look at around it: more samples say more than a few whose borders are exact.
REACH = 0.5

# Principal components of a block's channels that are its features, at most and for how many blocks each; how much their weights
# are held back, and how much more a sample may be moved than a block of a window: it shows what there is elsewhere.
FEATURES, BLOCKS_PER_FEATURE, RIDGE, TRUST = 128, 10, 0.003, 10.0

# How many cuts are tried together with a second one where none saves anything by itself.
AHEAD = 12

# Full resolution near windows: the attention of cells that are farther off hardly counts.
NEAR_CELLS = 4


def seen(step: Step, rect: Rect, height: int, width: int) -> Rect:
    """What a step looks at for a rectangle to come out of it; height, width: of the picture before the step."""
    rect = grown(rect, step.after, height * step.grows, width * step.grows)
    return grown(shrunk(rect, step.grows), step.before, height, width)


def cores_of(rect: Rect, largest: int, height: int, width: int) -> list[Rect]:
    """A rectangle of whole blocks in some of whole blocks, with sides of at most `largest` (of one block, if that is less)."""
    return [grown(scaled(part, BLOCK), 0, height, width) for part in parts_of(shrunk(rect, BLOCK), max(largest // BLOCK, 1))]


def margins_of(steps: Sequence[Step], reach: float = 1.0) -> tuple[int, ...]:
    """How far around a core the steps that are left look, before each step and after the last; reach: the share of it that is taken."""
    margins = [0]
    for step in reversed(steps):
        margins.append(-(-(margins[-1] + step.after) // step.grows) + step.before)
    return tuple(math.ceil(margin * reach) for margin in reversed(margins))


def rects_through(steps: Sequence[Step], core: Rect, height: int, width: int, reach: float = 1.0) -> tuple[Rect, ...]:
    """What a window covers before each step, and after the last: each in its own resolution. With all their reach it is right in its core."""
    rects, scale = [], 1
    for margin, grows in zip(margins_of(steps, reach), (*(step.grows for step in steps), 1)):
        rects.append(grown(scaled(core, scale), margin, height * scale, width * scale))
        scale *= grows
    return tuple(rects)


def parts_of(rect: Rect, largest: int) -> list[Rect]:
    """A rectangle in parts of nearly one size, with sides of at most `largest`."""
    rows, cols = (_even(first, last, math.ceil((last - first) / largest)) for first, last in ((rect.top, rect.bottom), (rect.left, rect.right)))
    return [Rect(top, left, bottom, right) for top, bottom in rows for left, right in cols]


def _even(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """A stretch in so many parts of nearly one length."""
    ends = [first + (last - first) * index // count for index in range(count + 1)]
    return list(zip(ends, ends[1:]))


@dataclass(frozen=True)
class Price:
    """Operations (multiply-adds) of a decoder over a picture of height x width cells."""

    decoder: Decoder
    height: int
    width: int

    def of(self, rows: torch.Tensor, cols: torch.Tensor, reach: float = 1.0) -> torch.Tensor:
        """The steps of windows with cores of so many rows and columns, inside a picture."""
        scale, total = 1, torch.zeros(())
        for margin, step in zip(margins_of(self.decoder.steps, reach), self.decoder.steps):
            sides = [torch.minimum(cells * scale + 2 * margin, torch.tensor(most * scale)) for cells, most in ((rows, self.height), (cols, self.width))]
            scale *= step.grows
            total = total + step.weights * step.grows ** 2 * sides[0].double() * sides[1]
        return total

    def of_one(self, rows: int, cols: int) -> float:
        return float(self.of(torch.tensor(rows), torch.tensor(cols)))

    @property
    def of_sample(self) -> float:
        return float(self.of(torch.tensor(BLOCK), torch.tensor(BLOCK), REACH))

    @property
    def whole(self) -> float:
        return self.entry(1.0) + self.of_one(self.height, self.width)

    def of_plan(self, plan: Plan) -> float:
        """All that is done for the windows of a plan, samples included."""
        entry = self.entry(float(plan.near.float().mean()) if plan.samples else 1.0)
        return entry + sum(self.of_one(core.height, core.width) for core in plan.windows) + plan.samples * self.of_sample

    def entry(self, near: float) -> float:
        """What is done once, for the whole picture, where a share `near` of the cells counts."""
        cells = self.height * self.width
        attending = 1.0 if near > FULL else near + 1 / FAR_CELLS ** 2
        return cells * self.decoder.entry_weights + 2 * self.decoder.attention * cells * cells * attending


def cover(active: torch.Tensor, price: Price, largest: int) -> list[Rect]:
    """Rectangles of whole blocks that hold all active cells, cut where that makes them cheaper.

    active: bool, (height, width). largest: the longest side. From the smallest rectangle around everything, as long as two are
    cheaper than one, or three.
    """
    height, width = active.shape
    active, largest = F.max_pool2d(active[None, None].float(), BLOCK, ceil_mode=True)[0, 0] > 0, max(largest // BLOCK, 1)
    found = _cheapest(active, Rect(0, 0, *active.shape), price, largest)[1]
    return sorted((grown(scaled(rect, BLOCK), 0, height, width) for rect in found), key=lambda rect: (rect.top, rect.left))


def _cheapest(active: torch.Tensor, box: Rect, price: Price, largest: int) -> tuple[float, list[Rect]]:
    """The cost of what is active in a box, and the rectangles of it."""
    box = _tight(active, box)
    if box is None:
        return 0.0, []
    alone, cuts = _alone(box, price, largest), _cuts(active, box, price, largest)
    if cuts and cuts[0][0] >= 0.999 * alone:
        # Two cuts may save what neither saves by itself.
        cuts = sorted(((sum(_after_a_cut(active, half, price, largest) for half in halves), halves) for _, halves in cuts[:AHEAD]), key=lambda cut: cut[0])
    if not cuts or cuts[0][0] >= 0.999 * alone:
        return alone, parts_of(box, largest)
    costs, rects = zip(*(_cheapest(active, half, price, largest) for half in cuts[0][1]))
    return sum(costs), [rect for found in rects for rect in found]


def _after_a_cut(active: torch.Tensor, box: Rect, price: Price, largest: int) -> float:
    """What a box costs at most, cut once or not."""
    box = _tight(active, box)
    return min([_alone(box, price, largest)] + [cost for cost, _ in _cuts(active, box, price, largest)[:1]])


def _alone(box: Rect, price: Price, largest: int) -> float:
    return float(_in_parts(price, torch.tensor(box.height), torch.tensor(box.width), largest))


def _tight(active: torch.Tensor, box: Rect) -> Rect | None:
    """The smallest rectangle around what is active in a box."""
    rows, cols = active[box.top:box.bottom, box.left:box.right].nonzero(as_tuple=True)
    if not len(rows):
        return None
    return Rect(box.top + int(rows.min()), box.left + int(cols.min()), box.top + int(rows.max()) + 1, box.left + int(cols.max()) + 1)


def _cuts(active: torch.Tensor, box: Rect, price: Price, largest: int) -> list[tuple[float, tuple[Rect, Rect]]]:
    """The cuts across a box between rows or columns that are not alike, and what its two parts cost, each as tight as it can be; the cheapest first."""
    found = []
    part = active[box.top:box.bottom, box.left:box.right]
    for turned in (False, True):
        rows = part.T if turned else part
        places = ((rows[1:] != rows[:-1]).any(1).nonzero()[:, 0] + 1).tolist()
        if not places:
            continue
        costs = _cost_of_heads(rows, price, largest, turned)[:-1] + _cost_of_heads(rows.flip(0), price, largest, turned)[:-1].flip(0)
        found += [(float(costs[place - 1]), turned, place) for place in places]
    return [(cost, _halves(box, turned, place)) for cost, turned, place in sorted(found)]


def _halves(box: Rect, turned: bool, place: int) -> tuple[Rect, Rect]:
    if turned:
        return Rect(box.top, box.left, box.bottom, box.left + place), Rect(box.top, box.left + place, box.bottom, box.right)
    return Rect(box.top, box.left, box.top + place, box.right), Rect(box.top + place, box.left, box.bottom, box.right)


def _cost_of_heads(rows: torch.Tensor, price: Price, largest: int, turned: bool) -> torch.Tensor:
    """What the tight box around the first 1, 2, 3, ... rows costs; the first row holds something active."""
    so_far = rows.int().cummax(0).values
    width = so_far.shape[1] - so_far.flip(1).argmax(1) - so_far.argmax(1)
    last = (torch.arange(len(rows)) * rows.any(1)).cummax(0).values + 1
    return _in_parts(price, *((width, last) if turned else (last, width)), largest)


def _in_parts(price: Price, rows: torch.Tensor, cols: torch.Tensor, largest: int) -> torch.Tensor:
    """The cost of boxes of so many rows and columns, cut evenly into windows."""
    counts = [(length / largest).ceil() for length in (rows, cols)]
    return counts[0] * counts[1] * price.of((rows / counts[0]).ceil() * BLOCK, (cols / counts[1]).ceil() * BLOCK)


@dataclass(frozen=True)
class Plan:
    """windows: cores, none in another. samples: how many are to stand for what lies outside of all windows.

    largest: the longest side of what is computed at once. Where normalisations make all windows wait for each other after each
    step, they may be larger: they are whole rectangles then, of which a step is taken part by part.
    """

    height: int
    width: int
    windows: tuple[Rect, ...]
    samples: int
    largest: int

    @property
    def near(self) -> torch.Tensor:
        """The cells in and beside windows, bool, (height, width)."""
        near = torch.zeros(self.height, self.width, dtype=torch.bool)
        for rect in self.windows:
            rect = grown(rect, NEAR_CELLS, self.height, self.width)
            near[rect.top:rect.bottom, rect.left:rect.right] = True
        return near


def plan_decode(decoder: Decoder, active: torch.Tensor, largest: int) -> Plan:
    """Find the windows for the active cells, bool, (height, width). largest: the longest side of what is computed at once.

    Where little would be left out, or samples cost as much, windows take everything, which needs no samples.
    """
    height, width = active.shape
    price, share = Price(decoder, height, width), float(active.float().mean())
    windows, everything = (cover(cells, price, max(height, width) if decoder.has_norms else largest) for cells in (active, torch.ones_like(active)))
    near = float(Plan(height, width, tuple(windows), 0, largest).near.float().mean())
    cost, all_of_it = (sum(price.of_one(core.height, core.width) for core in cores) for cores in (windows, everything))
    if not decoder.has_norms:
        return Plan(height, width, tuple(windows if cost < all_of_it else everything), 0, largest)
    with_samples = price.entry(near) + cost + least_samples(share) * price.of_sample
    if price.entry(1.0) + all_of_it <= max(AIM * share * price.whole, with_samples):
        return Plan(height, width, tuple(everything), 0, largest)
    return Plan(height, width, tuple(windows), sample_count(price, near, cost, share), largest)


def sample_count(price: Price, near: float, windows: float, share: float) -> int:
    """How many samples there is room for beside windows of so many operations, where such a share of the picture changed."""
    room = min(AIM * share * price.whole - price.entry(near) - windows, MOST_SAMPLES * price.whole)
    return max(int(room / price.of_sample), least_samples(share))


def least_samples(share: float) -> int:
    return min(int(LEAST_SAMPLES * max(FEW / max(share, 1e-6), 1.0) ** 3), LEAST_OF_FEW)


def _border(grid: torch.Tensor) -> torch.Tensor:
    """The outermost places of a grid, bool."""
    border = torch.ones_like(grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border


def represented(features: torch.Tensor, windows: torch.Tensor, count: int) -> tuple[list[Rect], torch.Tensor]:
    """Samples of what no window holds, and the weight in cells of each block, (rows, cols) float64, with which all stand for the picture.

    features: (C, height, width), of the decoder's coarsest resolution. windows: bool, (rows, cols), the blocks they hold. Each
    block stands for itself at first; then all are moved by as little as makes their features those of the whole picture. The
    next sample is the block that takes the most from what is uncertain in the sum over the rest (Elfving's criterion).
    """
    area, known = _areas(features.shape[-2:]).flatten(), windows.flatten().clone()
    described = _described(features, min(int(known.sum()) // BLOCKS_PER_FEATURE + 1, FEATURES))
    inside = described[:, known]
    gram = inside @ inside.T
    gram.diagonal().add_(RIDGE * int(known.sum()))
    inverse, trust, rest = torch.linalg.inv(gram), torch.ones_like(area), described @ (area * ~known)
    places = []
    for _ in range(min(count, int((~known).sum()))):
        moved = inverse @ described
        uncertain = 1 / TRUST + (described * moved).sum(0)
        best = int(((rest @ moved).square() / uncertain).masked_fill(known, -1.0).argmax())
        inverse -= torch.outer(moved[:, best], moved[:, best]) / uncertain[best]
        known[best], trust[best] = True, TRUST
        places.append(divmod(best, windows.shape[1]))
    weights = area * known
    short = described @ (area - weights)
    weights[known] += trust[known] * (described[:, known].T @ (inverse @ short))
    samples = [grown(scaled(Rect(row, col, row + 1, col + 1), BLOCK), 0, *features.shape[-2:]) for row, col in places]
    return samples, weights.view(windows.shape)


def _areas(size: tuple[int, int]) -> torch.Tensor:
    """The number of cells in each block."""
    rows, cols = (torch.arange(0, length, BLOCK, dtype=torch.float64) for length in size)
    return (size[0] - rows).clamp_max(BLOCK)[:, None] * (size[1] - cols).clamp_max(BLOCK)


def _described(features: torch.Tensor, count: int) -> torch.Tensor:
    """What is known of every block: 1, and principal components of its channels' means and deviations, at the border once more."""
    mean, square = (block_means(values, BLOCK).flatten(1) for values in (features.float(), features.float().square()))
    known = torch.cat([mean, square.sqrt()]).cpu().double()
    known = (known - known.mean(1, keepdim=True)) / known.std(1, keepdim=True).clamp_min(1e-6)
    if len(known) > count:
        _, vectors = torch.linalg.eigh(known @ known.T)
        known = vectors[:, -count:].T @ known
        known = known / known.std(1, keepdim=True).clamp_min(1e-6)
    border = _border(torch.empty(-(-features.shape[-2] // BLOCK), -(-features.shape[-1] // BLOCK))).flatten().double()
    return torch.cat([torch.ones_like(border)[None], known, 3 * border[None], known * border])

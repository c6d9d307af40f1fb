"""How do windows go through a decoder? In cells of what it gets (see decoders.py), unless said otherwise.

Each window starts with as much around its core as the steps before it look at, and is trimmed after every step, so that it
ends as its core and equals that part of a whole decode.

Normalisations need the mean and variance of the whole picture. All windows therefore take a step together, and what no
window holds is represented by small samples of it, which go along. Windows that wait for each other have no reason to be small:
a step is taken part by part, each part with no more around it than that step looks at. One part at a time is on the VAE's device
with all its layer needs; the rest waits, as far as it takes no more memory than the host reckons for a window, else in the
computer's memory.
"""
from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import comfy.model_management
import comfy.ops

from .decode_plan import BLOCK, LEAST_SAMPLES, REACH, Plan, cores_of, margins_of, parts_of, rects_through, represented, seen
from .decoders import Decoder, Step
from .utils import Rect, area, block_means, common_part, cut, moved_to, scaled, shrunk

log = logging.getLogger(__name__)

# What is computed at once is not halved below this side.
LEAST_PART = 4

# Elements whose squares are taken at once.
CHUNK = 1 << 24

# The variance of the whole picture is taken for no less than so much of that of what is decoded.
LEAST_VARIANCE = 0.05


@dataclass(frozen=True, eq=False)
class Piece:
    """A window, or samples of one shape, on its way through the decoder.

    core: what it is for; of several samples that of the first, as all lie alike. rects: what it covers before each step and
    after the last, in that resolution. x, skip: (B, C, [1,] h, w). weights: (B, rows, cols), of each block for the statistics.
    """

    core: Rect
    rects: tuple[Rect, ...]
    x: torch.Tensor
    skip: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    is_sample: bool = False


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each group of channels over the whole picture, (groups,) float64 on the CPU."""

    mean: torch.Tensor
    variance: torch.Tensor


@dataclass(frozen=True)
class Limits:
    """Where pieces are computed, where they wait, and how many bytes of them may wait on the device they are computed on."""

    device: torch.device
    away: torch.device
    room: float


@dataclass
class Pace:
    """The longest side of what is computed at once, without what it looks at; less as soon as memory does not suffice."""

    side: int


@dataclass(frozen=True, eq=False)
class Walk:
    """One image's way through the decoder.

    features: of the whole picture, where windows begin. together: windows whose statistics count. samples: blocks for all that
    they do not hold. weights: (rows, cols), in cells, of each block for the statistics. later: windows that are taken by
    themselves. tell(cells) is called with how many cells' worth of windows is done.
    """

    decoder: Decoder
    features: torch.Tensor
    together: Sequence[Rect]
    later: Sequence[Rect]
    samples: Sequence[Rect]
    weights: torch.Tensor | None
    limits: Limits
    pace: Pace
    tell: Callable

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.decoder.steps

    @property
    def size(self) -> tuple[int, int]:
        return self.features.shape[-2], self.features.shape[-1]

    def scale(self, index: int) -> int:
        """Elements before a step per cell."""
        return math.prod(step.grows for step in self.steps[:index])

    def sides(self) -> tuple[int, ...]:
        """The longest side of what is computed at once before each step, and after the last: what a window of that size covers there."""
        return tuple(self.pace.side * self.scale(index) + 2 * margin for index, margin in enumerate(margins_of(self.steps)))


def begin(decoder: Decoder, plan: Plan, latent: torch.Tensor, limits: Limits, tell: Callable) -> Walk:
    """Do what is done once for the whole picture."""
    together, later = _that_fit(decoder, plan, limits, latent.element_size())
    features = decoder.whole(decoder.enter(latent), plan.near)
    samples, weights = represented(features[0], held(plan, together), plan.samples or (LEAST_SAMPLES if later else 0)) if together else ((), None)
    return Walk(decoder, features, together, later, samples, weights, limits, Pace(plan.largest), tell)


def held(plan: Plan, rects: Sequence[Rect]) -> torch.Tensor:
    """The blocks that lie in rectangles, bool, (rows, cols)."""
    inside = torch.zeros(-(-plan.height // BLOCK), -(-plan.width // BLOCK), dtype=torch.bool)
    for rect in rects:
        rect = shrunk(rect, BLOCK)
        inside[rect.top:rect.bottom, rect.left:rect.right] = True
    return inside


def window_piece(walk: Walk, core: Rect, reach: float = 1.0) -> Piece:
    rects = rects_through(walk.steps, core, *walk.size, reach)
    weights = None if walk.weights is None else cut(walk.weights, shrunk(core, BLOCK))[None]
    return Piece(core, rects, cut(walk.features, rects[0]).clone(), weights=weights)


def sample_pieces(walk: Walk) -> list[Piece]:
    """Samples that lie alike to the picture's border go through the decoder as one batch."""
    groups: dict = {}
    for core in walk.samples:
        piece = window_piece(walk, core, REACH)
        first = piece.rects[0]
        lies = (first.top - core.top, first.left - core.left, first.bottom - core.top, first.right - core.left, core.height, core.width)
        groups.setdefault(lies, []).append(piece)
    return [
        replace(alike[0], x=torch.cat([piece.x for piece in alike]), weights=torch.cat([piece.weights for piece in alike]), is_sample=True)
        for alike in groups.values()]


def moments_of(walk: Walk, pieces: Sequence[Piece], index: int) -> Moments:
    """The mean and variance before a step, from the cores of all pieces."""
    groups = walk.steps[index].norm.num_groups
    # The weighted sums of values and of squares; both without weights, and how many blocks there were.
    sums, plain = torch.zeros(2, groups, dtype=torch.float64), torch.zeros(3, groups, dtype=torch.float64)
    for piece in pieces:
        for part in [piece.core] if piece.is_sample else cores_of(piece.core, walk.pace.side, *walk.size):
            add_moments(walk, piece, index, part, sums, plain)
    mean, square = sums / float(walk.weights.sum())
    # Weights below 0 could make nonsense of a group that is almost always 0.
    least = (plain[1] / plain[2] - (plain[0] / plain[2]).square()).clamp_min(0) * LEAST_VARIANCE
    return Moments(mean, torch.maximum(square - mean.square(), least))


def add_moments(walk: Walk, piece: Piece, index: int, part: Rect, sums: torch.Tensor, plain: torch.Tensor) -> None:
    """Add those of a part of a piece's core, (2, groups) and (3, groups)."""
    groups, scale = sums.shape[1], walk.scale(index)
    core = cut(piece.x, moved_to(scaled(part, scale), piece.rects[index])).unflatten(1, (groups, -1))  # (B, groups, C, h, w)
    weights = cut(piece.weights, moved_to(shrunk(part, BLOCK), shrunk(piece.core, BLOCK))).to(walk.limits.device, torch.float32)[:, None]
    for first in range(0, groups, chunk := max(CHUNK * groups // core.numel(), 1)):
        values = core[:, first:first + chunk].to(walk.limits.device, torch.float32)
        for power, powers in enumerate((values, values.square())):
            blocks = block_means(powers, BLOCK * scale).mean(2)
            sums[power, first:first + chunk] += (blocks * weights).sum((0, 2, 3)).cpu().double()
            plain[power, first:first + chunk] += blocks.sum((0, 2, 3)).cpu().double()
        plain[2, first:first + chunk] += weights.numel()


def normalised(norm: torch.nn.GroupNorm, x: torch.Tensor, moments: Moments) -> torch.Tensor:
    """What the group norm makes of a part of a picture with these statistics; its weights as the host casts them."""
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    each = x.shape[1] // norm.num_groups
    mean, variance = (values.float().repeat_interleave(each).to(x.device) for values in (moments.mean, moments.variance))
    out = F.batch_norm(x, mean, variance, weight.float(), bias.float(), False, 0.0, norm.eps)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return out


def made(walk: Walk, piece: Piece, index: int, moments: Moments | None, rows: slice, part: Rect) -> tuple[torch.Tensor, bool]:
    """A part of what a step makes of a piece, for some of its samples; and whether what it keeps for a block's end goes on."""
    step, scale = walk.steps[index], walk.scale(index)
    rect = common_part(seen(step, part, *(side * scale for side in walk.size)), piece.rects[index])
    x, skip = (None if whole is None else cut(whole[rows], moved_to(rect, piece.rects[index])).to(walk.limits.device) for whole in (piece.x, piece.skip))
    if step.norm is not None:
        # A block's shortcut takes what came in before its first normalisation.
        skip = x if skip is None else skip
        x = normalised(step.norm, x, moments)
    x, skip = step.run(x, skip)
    return cut(x, moved_to(part, scaled(rect, step.grows))), skip is not None


def attempted(walk: Walk, piece: Piece, index: int, moments: Moments | None, rows: slice, part: Rect) -> tuple[torch.Tensor, bool] | None:
    """What `made` gives, or None where memory does not suffice and less might do."""
    try:
        return made(walk, piece, index, moments, rows, part)
    except Exception as problem:
        comfy.model_management.raise_non_oom(problem)
        if rows.stop - rows.start < 2 and max(part.height, part.width) < 2 * LEAST_PART * walk.scale(index + 1):
            raise
        return None


def halves(walk: Walk, index: int, rows: slice, part: Rect) -> list[tuple[slice, Rect]]:
    """A part of several samples, or a large one, as two; other large ones become as small."""
    scale = walk.scale(index + 1)
    log.warning("Quadtree Decode: out of memory, so a window of %d x %d cells is halved.", -(-part.width // scale), -(-part.height // scale))
    comfy.model_management.soft_empty_cache()
    if rows.stop - rows.start > 1:
        middle = (rows.start + rows.stop) // 2
        return [(slice(rows.start, middle), part), (slice(middle, rows.stop), part)]
    side = -(-max(part.height, part.width) // 2)
    walk.pace.side = max(min(walk.pace.side, side // scale), LEAST_PART)
    return [(rows, half) for half in parts_of(part, side)]


def taken(walk: Walk, piece: Piece, index: int, moments: Moments | None, room: float) -> Piece:
    """The piece after a step, trimmed to what the next one needs; it waits on the device if it takes no more than `room` bytes."""
    rect, after = piece.rects[index + 1], None
    todo = [(slice(0, len(piece.x)), part) for part in ([rect] if piece.is_sample else parts_of(rect, walk.sides()[index + 1]))]
    while todo:
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows, part = todo.pop()
        found = attempted(walk, piece, index, moments, rows, part)
        if found is None:
            todo += halves(walk, index, rows, part)
            continue
        after = waiting(walk, piece, index, *found, room) if after is None else after
        if after.x.shape != found[0].shape:
            cut(after.x[rows], moved_to(part, rect)).copy_(found[0])
        walk.tell(0.0 if piece.is_sample else area(piece.core) * area(part) / area(rect) / len(walk.steps))
    return after


def waiting(walk: Walk, piece: Piece, index: int, x: torch.Tensor, goes_on: bool, room: float) -> Piece:
    """The piece after a step where it is to wait: with x if that is all of it, else with room for all of its parts."""
    rect, origin = piece.rects[index + 1], piece.rects[index]
    shape = (len(piece.x), *x.shape[1:-2], rect.height, rect.width)
    if x.shape != shape and piece.skip is not None and not goes_on and piece.skip.shape[1] == x.shape[1]:
        # What a block adds at its end is needed for each element where it comes out, and nowhere else.
        return replace(piece, x=cut(piece.skip, moved_to(rect, origin)), skip=None)
    home = walk.limits.device if math.prod(shape) * x.element_size() * (1 + goes_on) <= room else walk.limits.away
    skip = cut(piece.x if piece.skip is None else piece.skip, moved_to(rect, origin)).to(home) if goes_on else None
    return replace(piece, x=x.to(home) if x.shape == shape else x.new_empty(shape, device=home), skip=skip)


def stepped(walk: Walk, pieces: list[Piece], index: int, moments: Moments | None) -> list[Piece]:
    """All pieces after a step; the list that came in is emptied."""
    # The other half is for what they are before it.
    todo, done, room = pieces[::-1], [], walk.limits.room / 2
    pieces.clear()
    while todo:
        done.append(taken(walk, todo.pop(), index, moments, room))
        room -= sum(part.nbytes for part in (done[-1].x, done[-1].skip) if part is not None and part.device == walk.limits.device)
    return done


def decode_windows(walk: Walk, write: Callable) -> None:
    """Take the windows through the decoder; write(core, pixels) is called for each, in no order."""
    known: list[Moments | None] = [None] * len(walk.steps)
    pieces = [window_piece(walk, core) for core in walk.together] + sample_pieces(walk)
    for index, step in enumerate(walk.steps if pieces else ()):
        if step.norm is not None:
            known[index] = moments_of(walk, pieces, index)
        if index == len(walk.steps) - 1:
            pieces = [piece for piece in pieces if not piece.is_sample]
        pieces = stepped(walk, pieces, index, known[index])
    for piece in pieces:
        write(piece.core, piece.x)
    for core in walk.later:
        _alone(walk, core, known, write)


def _alone(walk: Walk, core: Rect, known: Sequence[Moments | None], write: Callable) -> None:
    """Take one window through all steps."""
    pieces = [window_piece(walk, core)]
    for index in range(len(walk.steps)):
        pieces = stepped(walk, pieces, index, known[index])
    for piece in pieces:
        write(piece.core, piece.x)


def memory_to_wait_in() -> float:
    """Bytes of the computer's memory that windows may wait in."""
    return comfy.model_management.get_free_memory(torch.device("cpu")) / 2


def _that_fit(decoder: Decoder, plan: Plan, limits: Limits, element_size: int) -> tuple[list[Rect], list[Rect]]:
    """The windows that can wait for each other, evenly chosen if not all can, and the others, which need not."""
    if not decoder.has_norms:
        return [], list(plan.windows)
    scale, most = 1, 0
    for step in decoder.steps:
        scale *= step.grows
        most = max(most, 2 * step.channels * scale * scale)
    room = memory_to_wait_in() + (0 if limits.device.type == "cpu" else limits.room)
    share = room / (sum(area(core) for core in plan.windows) * most * element_size)
    if share >= 1:
        return list(plan.windows), []
    parts = [part for core in plan.windows for part in cores_of(core, plan.largest, plan.height, plan.width)]
    count = max(int(len(parts) * share), 1)
    chosen = {index * len(parts) // count for index in range(count)}
    return tuple([core for index, core in enumerate(parts) if (index in chosen) == wanted] for wanted in (True, False))

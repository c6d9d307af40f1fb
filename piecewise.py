"""How do windows go through a decoder? In cells of what it gets (see decoders.py), unless said otherwise.

Each window starts with as much around its core as the steps before it look at, and is trimmed after every step, so that it
ends as its core and equals that part of a whole decode.

Normalisations need the mean and variance of the whole picture. All windows therefore take a step together, and what no
window holds is represented by small samples of it, which go along. One at a time is on the VAE's device with all its layer
needs; the others wait, as far as they take no more memory than the host reckons for a window, else in the computer's memory.
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

from .decode_plan import SAMPLE_CELLS, Plan, Sample, area, rects_through, samples_of, scaled
from .decoders import Decoder, Step
from .quadtree import Rect

log = logging.getLogger(__name__)

# Windows are not halved below this side.
LEAST_WINDOW = 4

# Samples where not all windows can wait for each other, though they hold everything.
LEAST_COUNT = 64


@dataclass(frozen=True, eq=False)
class Piece:
    """A window, or samples of one shape, on its way through the decoder.

    core: what it is for; of several samples that of the first, as all lie alike. rects: what it covers before each step and
    after the last, in that resolution. x, skip: (B, C, [1,] h, w). weight: how many cells one of its cells stands for.
    """

    core: Rect
    rects: tuple[Rect, ...]
    x: torch.Tensor
    skip: torch.Tensor | None = None
    weight: float = 1.0
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


@dataclass(frozen=True, eq=False)
class Walk:
    """One image's way through the decoder.

    features: of the whole picture, where windows begin. together: windows whose statistics count, with the samples for all
    else. later: those that are taken by themselves. tell(cells) is called with how many cells' worth of windows is done.
    """

    decoder: Decoder
    features: torch.Tensor
    together: Sequence[Rect]
    later: Sequence[Rect]
    samples: Sequence[Sample]
    limits: Limits
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


def begin(decoder: Decoder, plan: Plan, latent: torch.Tensor, limits: Limits, tell: Callable) -> Walk:
    """Do what is done once for the whole picture."""
    cells = decoder.enter(latent)
    together, later = _that_fit(decoder, plan, limits, latent.element_size())
    samples: list[Sample] = []
    if plan.samples or (later and together):
        rest = torch.ones(plan.height, plan.width, dtype=torch.bool)
        for core in together:
            rest[core.top:core.bottom, core.left:core.right] = False
        samples = samples_of(rest, cells[0] if cells.ndim == 4 else cells[0, :, 0], plan.samples or LEAST_COUNT)
    return Walk(decoder, decoder.whole(cells, plan.near(samples)), together, later, samples, limits, tell)


def cut(x: torch.Tensor, rect: Rect, origin: Rect) -> torch.Tensor:
    """The part of a tensor that begins at the corner of `origin`; a copy, so that the rest can be freed."""
    return x[..., rect.top - origin.top:rect.bottom - origin.top, rect.left - origin.left:rect.right - origin.left]


def window_piece(walk: Walk, core: Rect) -> Piece:
    rects = rects_through(walk.steps, core, *walk.size)
    return Piece(core, rects, cut(walk.features, rects[0], Rect(0, 0, *walk.size)))


def sample_pieces(walk: Walk) -> list[Piece]:
    """Samples that lie alike to the picture's border go through the decoder as one batch."""
    groups: dict = {}
    for sample in walk.samples:
        for top, left in sample.places:
            core = Rect(top, left, top + SAMPLE_CELLS, left + SAMPLE_CELLS)
            rects = rects_through(walk.steps, core, *walk.size)
            lies = (rects[0].top - top, rects[0].left - left, rects[0].bottom - top, rects[0].right - left, sample.weight)
            groups.setdefault(lies, []).append((core, rects))
    whole = Rect(0, 0, *walk.size)
    return [
        Piece(*alike[0], torch.cat([cut(walk.features, rects[0], whole) for _, rects in alike]), weight=lies[-1], is_sample=True)
        for lies, alike in groups.items()]


def moments_of(walk: Walk, pieces: Sequence[Piece], index: int) -> Moments:
    """The mean and variance before a step, over the cores of all pieces."""
    groups, scale = walk.steps[index].norm.num_groups, walk.scale(index)
    counts, means, squares = [], [], []
    for piece in pieces:
        core = cut(piece.x, scaled(piece.core, scale), piece.rects[index]).to(walk.limits.device)
        core = core.transpose(0, 1).reshape(groups, -1)
        counts.append(core.shape[1] * piece.weight)
        means.append(core.sum(1, dtype=torch.float32).div(core.shape[1]).cpu().double())
        squares.append(torch.linalg.vector_norm(core, dim=1, dtype=torch.float32).square().div(core.shape[1]).cpu().double())
    weights = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
    mean = (weights * torch.stack(means)).sum(0)
    return Moments(mean, ((weights * torch.stack(squares)).sum(0) - mean.square()).clamp_min(0))


def normalised(norm: torch.nn.GroupNorm, x: torch.Tensor, moments: Moments) -> torch.Tensor:
    """What the group norm makes of a part of a picture with these statistics; its weights as the host casts them."""
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    each = x.shape[1] // norm.num_groups
    mean, variance = (values.float().repeat_interleave(each).to(x.device) for values in (moments.mean, moments.variance))
    out = F.batch_norm(x, mean, variance, weight.float(), bias.float(), False, 0.0, norm.eps)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return out


def taken(walk: Walk, piece: Piece, index: int, moments: Moments | None) -> Piece:
    """The piece after a step, trimmed to what the next one needs."""
    step = walk.steps[index]
    x, skip = piece.x.to(walk.limits.device), None if piece.skip is None else piece.skip.to(walk.limits.device)
    if step.norm is not None:
        # A block's shortcut takes what came in before its first normalisation.
        skip = x if skip is None else skip
        x = normalised(step.norm, x, moments)
    x, skip = step.run(x, skip)
    origin, rect = scaled(piece.rects[index], step.grows), piece.rects[index + 1]
    x, skip = (None if part is None else cut(part, rect, origin) for part in (x, skip))
    return replace(piece, x=x if rect == origin else x.contiguous(), skip=skip if skip is None or rect == origin else skip.contiguous())


def moved(piece: Piece, device: torch.device) -> Piece:
    return replace(piece, x=piece.x.to(device), skip=None if piece.skip is None else piece.skip.to(device))


def halves(walk: Walk, piece: Piece, index: int, problem: Exception) -> list[Piece]:
    """The two halves of a window before a step, cut from what it covers. Raises the problem again for one that is too small."""
    core = piece.core
    if piece.is_sample or max(core.height, core.width) < 2 * LEAST_WINDOW:
        raise problem
    if core.height >= core.width:
        middle = (core.top + core.bottom) // 2
        cores = [Rect(core.top, core.left, middle, core.right), Rect(middle, core.left, core.bottom, core.right)]
    else:
        middle = (core.left + core.right) // 2
        cores = [Rect(core.top, core.left, core.bottom, middle), Rect(core.top, middle, core.bottom, core.right)]
    found = []
    for half in cores:
        rects = rects_through(walk.steps, half, *walk.size)
        x, skip = (None if part is None else cut(part, rects[index], piece.rects[index]).clone() for part in (piece.x, piece.skip))
        found.append(Piece(half, rects, x, skip))
    return found


def stepped(walk: Walk, pieces: list[Piece], index: int, moments: Moments | None) -> list[Piece]:
    """All pieces after a step; the list that came in is emptied. What memory does not suffice for is halved."""
    todo, done, waiting = pieces[::-1], [], 0
    pieces.clear()
    while todo:
        comfy.model_management.throw_exception_if_processing_interrupted()
        piece, parts = todo.pop(), None
        try:
            after = taken(walk, piece, index, moments)
        except Exception as problem:
            comfy.model_management.raise_non_oom(problem)
            parts = halves(walk, piece, index, problem)
        # Not inside the clause above: the exception holds on to what lay in memory.
        if parts is not None:
            log.warning("Out of memory: a window of %d x %d cells is halved.", piece.core.width, piece.core.height)
            comfy.model_management.soft_empty_cache()
            todo += parts[::-1]
            continue
        waiting += sum(part.nbytes for part in (after.x, after.skip) if part is not None)
        done.append(moved(after, walk.limits.away) if waiting > walk.limits.room else after)
        walk.tell(area(piece.core) / len(walk.steps) if not piece.is_sample else 0.0)
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


def _that_fit(decoder: Decoder, plan: Plan, limits: Limits, element_size: int) -> tuple[list[Rect], list[Rect]]:
    """The windows that can wait for each other, evenly chosen if not all can, and the others, which need not."""
    if not decoder.has_norms:
        return [], list(plan.windows)
    scale, most = 1, 0
    for step in decoder.steps:
        scale *= step.grows
        most = max(most, 2 * step.channels * scale * scale)
    room = comfy.model_management.get_free_memory(torch.device("cpu")) / 2 + (0 if limits.device.type == "cpu" else limits.room)
    share = room / (sum(area(core) for core in plan.windows) * most * element_size)
    if share >= 1:
        return list(plan.windows), []
    count = max(int(len(plan.windows) * share), 1)
    chosen = {index * len(plan.windows) // count for index in range(count)}
    return tuple([core for index, core in enumerate(plan.windows) if (index in chosen) == wanted] for wanted in (True, False))

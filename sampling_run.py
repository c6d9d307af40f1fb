"""What is one sampling run about, and how far is it? Its state lives in that run's transformer_options and nowhere else.

A run begins when its sampler does: only then the model is loaded, and its latents' scale is known. A chain of samplers
begins several times within one call of a sampler node, each time with a part of the sigmas.
"""
from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, field

import torch

import comfy.utils

from .blending import Blend, plan_blend, shift_offsets
from .canvas import Canvas
from .clock import Clock, falling_part
from .denoise_schedule import EASE_CELLS, eased, on_steps, share_at, txt2img_share_at
from .devices import Crew
from .finite import Lookout
from .model_facts import is_compiled, patch_cells, window_cost
from .placement import strength_raster
from .quadtree import Quadtree
from .settings import Settings
from .watch import Watch
from .windows import WRAPS, TilePlan, WindowCost, WindowSizes, full_grid, plan_windows

# More windows at once fill no accelerator better, and a cancelled run would wait for all of them.
LARGEST_BATCH = 16

# Encoded pictures have a standard deviation of about 1 in the model's scale; above this a latent is mostly noise.
NOISY = 2.0

# The host's samplers that take steps of their own.
OWN_STEPS = ("dpm_fast", "dpm_adaptive")

# Between two lines on the node, in seconds.
TELL_EVERY = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Facts:
    """What a run is about, in cells and in the model's scale.

    shape: of the latent. schedule: the sigmas that strengths count in. original: the clean latent, None where there is none
    to preserve. leaf_strengths: of the leaves, (height, width), on the CPU; windows are planned for these. levels: those that
    occur. strengths: eased at the leaves' borders, on the latent's device. grid: the plain grid, which cost is told against.
    offsets: how far SpotDiffusion's windows are moved at each step, else None for each.
    """

    shape: tuple[int, ...]
    schedule: tuple[float, ...]
    original: torch.Tensor | None
    leaf_strengths: torch.Tensor
    levels: torch.Tensor
    strengths: torch.Tensor
    sizes: WindowSizes
    cost_of: WindowCost
    grid: TilePlan
    offsets: list[tuple[int, int] | None]

    @property
    def steps(self) -> int:
        return len(self.schedule) - 1


@dataclass
class Ledger:
    """What is kept from one part of a chain of samplers to the next: copies for windows, what was asked and said, and counts.

    crew: the run's devices, (None,) if there is but one, () if nobody has looked. lock: of prepared and copies. lost: see finite.py.
    """

    batch_limit: int
    crew: tuple[Crew | None, ...] = ()
    lock: threading.RLock = field(default_factory=threading.RLock)
    prepared: dict = field(default_factory=dict)
    copies: dict = field(default_factory=dict)
    copied_rows: int = 0
    fitting: dict = field(default_factory=dict)
    warned: set = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    calls: int = 0
    windows: int = 0
    grid_windows: int = 0
    shapes: set = field(default_factory=set)
    cost: float = 0.0
    grid_cost: float = 0.0
    told: float = field(default_factory=time.monotonic)

    def count(self, plan: TilePlan, grid: TilePlan) -> None:
        """Take in one evaluation of the model over a plan, and what the plain grid would have been."""
        self.calls += 1
        self.windows += len(plan.windows)
        self.shapes |= {(window.rect.height, window.rect.width) for window in plan.windows}
        self.grid_windows += len(grid.windows)
        self.cost += plan.cost
        self.grid_cost += grid.cost

    def count_look(self, size: tuple[int, int], cost_of: WindowCost, times: float) -> None:
        """Take in a look at the whole picture, of so many cells. times: how many prompts it has for one of a window."""
        self.windows += 1
        self.shapes.add(tuple(size))
        self.cost += times * cost_of.of(*size)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a sampler node: what it was given, as it came in, and the runs that became of it.

    latent: in the scale of the host's nodes. sigmas: the node's own; some samplers (uni_pc) overwrite their last.
    """

    settings: Settings
    latent: torch.Tensor
    sigmas: tuple[float, ...]
    with_noise: bool
    ledger: Ledger
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, settings: Settings, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor) -> Call:
        """What a sampler node gives the host."""
        return cls(settings, latent, tuple(sigmas.tolist()), bool(torch.count_nonzero(noise)), Ledger(settings.tile_batch_size or LARGEST_BATCH))

    def begin(self, guider, sampler, sigmas: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor) -> Run:
        """The run of one sampler, now that the guider's model is loaded. sigmas, noise, latent: the sampler's own, in the model's scale."""
        own_sigmas = tuple(sigmas.tolist())
        schedule = self._schedule(own_sigmas)
        facts = self._facts(guider, schedule, noise, latent)
        clock = Clock(own_sigmas, schedule, counts=not _has_own_steps(sampler))
        watch = Watch(guider.model_patcher, guider.inner_model, facts.shape[-2:], lambda: not run.sees_one_window(), self.ledger.warned)
        run = Run(self, facts, clock, watch, Lookout(guider.inner_model.latent_format.spacial_downscale_ratio, self.ledger.lost))
        self.runs.append(run)
        return run

    def _schedule(self, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        """The whole schedule is the one that is wired, or else the node's, if the sampler was given a part of it."""
        whole = self.sigmas if self.settings.sigmas is None else tuple(self.settings.sigmas.tolist())
        if self.settings.sigmas is None and not all(any(math.isclose(sigma, other, rel_tol=1e-4) for other in whole) for sigma in sigmas):
            whole = sigmas
        return falling_part(whole)

    def _facts(self, guider, schedule: tuple[float, ...], noise: torch.Tensor, latent: torch.Tensor) -> Facts:
        settings, model, size, steps = self.settings, guider.inner_model, latent.shape[-2:], len(schedule) - 1
        leaf_strengths = strengths_in_cells(settings.tree, *size, settings.skip_diffusion_below, cell_px=model.latent_format.spacial_downscale_ratio)
        original = self._find_original(model, latent)
        if self._is_lost(noise, original):
            leaf_strengths = torch.ones_like(leaf_strengths)
        if original is not None:
            leaf_strengths = on_steps(settings.schedule, leaf_strengths, steps)
        # At most half the smallest leaf, so that every leaf reaches its strength.
        ease = min(EASE_CELLS, settings.tree.min_leaf * size[1] // settings.tree.width // 2)
        sizes, cost_of = self._sizes(guider.model_patcher, model), window_cost(model, guider.conds.values(), latent.shape)
        offsets = [None] * steps
        if settings.method == "SpotDiffusion":
            offsets = shift_offsets(settings.shift_method, steps, sizes.sides[-1], patch_cells(model), settings.seed)
            # Steps of one sigma refine one another, so they see the same windows.
            offsets = [offsets[schedule.index(sigma)] for sigma in schedule[:-1]]
        return Facts(
            tuple(latent.shape), schedule, original, leaf_strengths, leaf_strengths.unique(), eased(leaf_strengths, ease, WRAPS[settings.wrap]).to(latent.device),
            sizes, cost_of, full_grid(*size, sizes, cost_of), offsets)

    def _sizes(self, patcher, model) -> WindowSizes:
        are_square = self.settings.window_shapes == "tight" and is_compiled(patcher)
        if are_square and "compiled" not in self.ledger.warned:
            self.ledger.warned.add("compiled")
            log.info("the model is compiled, anew for each shape: windows are squares of a few sizes")
        return self.settings.sizes(model, are_square)

    def _find_original(self, model, latent: torch.Tensor) -> torch.Tensor | None:
        """The clean latent in the model's scale, or None where there is none to preserve."""
        wired = self.settings.original
        if wired is not None:
            wired = fit_original(wired, latent)
            return model.process_latent_in(wired) if bool(torch.count_nonzero(wired)) else None
        if not bool(torch.count_nonzero(self.latent)):
            log.info("the latent is empty, so there is nothing to preserve: every part is sampled, flat ones more gently")
            return None
        return model.process_latent_in(self.latent.to(latent))

    def _is_lost(self, noise: torch.Tensor, original: torch.Tensor | None) -> bool:
        """Whether the latent that came in is no clean one, so that nothing can be preserved; one that may be none is told."""
        if self.settings.original is not None or original is None:
            return False
        if not self.with_noise and not bool(torch.count_nonzero(noise)):
            log.warning("this stage starts without noise, so it cannot know the original: nothing is preserved. Connect the encoded picture to `original`.")
            return True
        if float(original.std()) > NOISY:
            log.warning(
                "the latent that came in looks half-sampled, not like an encoded picture (its standard deviation is %.1f, where 1 is usual): "
                "what is kept is kept with its noise. Connect the encoded picture to `original`.", float(original.std()))
        return False


@dataclass(eq=False)
class Run:
    """One sampler's run. plans: the windows of each set of active leaves. whole_x: what the sampler is asking the model about."""

    call: Call
    facts: Facts
    clock: Clock
    watch: Watch
    lookout: Lookout
    plans: dict = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    whole_x: torch.Tensor | None = None

    @property
    def settings(self) -> Settings:
        return self.call.settings

    @property
    def ledger(self) -> Ledger:
        return self.call.ledger

    @property
    def progress(self) -> float:
        """That of the sampler's last call of the model."""
        return self.clock.progress

    def share(self, progress: float, strengths: torch.Tensor) -> torch.Tensor:
        """The model's share of the result, where these are the strengths."""
        if self.facts.original is None:
            return txt2img_share_at(strengths, progress, self.facts.steps)
        return share_at(self.settings.schedule, strengths, progress)

    def least_share(self, progress: float) -> float:
        """The least share of any cell; asks the CPU, and no device."""
        return float(self.share(progress, self.facts.levels).min())

    def unsampled(self, strengths: torch.Tensor) -> torch.Tensor:
        """Where nothing but the original was used up to now."""
        return self.share(self.progress, strengths) == 0

    def plan(self, progress: float) -> tuple[TilePlan, Blend, torch.Tensor]:
        """The windows, their weights and the active cells at a progress: made once for each set of active leaves and each shift."""
        facts = self.facts
        active = int((self.share(progress, facts.levels) > 0).sum())
        offset = facts.offsets[min(int(progress * len(facts.offsets) + 1e-5), len(facts.offsets) - 1)]
        if (active, offset) not in self.plans:
            cells = self.share(progress, facts.leaf_strengths) > 0
            plan = plan_windows(cells, facts.sizes, facts.cost_of, offset)
            self.plans[active, offset] = plan, plan_blend(self.settings.method, plan, facts.sizes.overlap, facts.strengths.device), cells
        return self.plans[active, offset]

    def plans_of_steps(self) -> list[TilePlan]:
        """The plan of each step of the schedule."""
        return [self.plan(step / self.facts.steps)[0] for step in range(self.facts.steps)]

    @property
    def is_one_window(self) -> bool:
        """True if no step of the schedule has more than the canvas for a window."""
        return all(plan.is_whole or not plan.windows for plan in self.plans_of_steps())

    def sees_one_window(self) -> bool:
        """Whether the model is given the same window at every step, and no other."""
        views = {tuple(window.rect for window in plan.windows) for plan in self.plans_of_steps()}
        return len(views) == 1 and len(views.pop()) == 1

    def canvas(self, model, x: torch.Tensor, plan: TilePlan) -> Canvas:
        """What windows are cut from. Copies made for other rows, or for windows that are no longer in the plan, are dropped."""
        ledger = self.ledger
        wanted = {window.rect for window in plan.windows} if x.shape[0] == ledger.copied_rows else set()
        ledger.copies = {key: value for key, value in ledger.copies.items() if wanted.issuperset(key[1])}
        ledger.copied_rows = x.shape[0]
        return Canvas(model, tuple(x.shape), x.device, patch_cells(model), ledger.prepared, ledger.copies, self.facts.sizes.wraps, ledger.lock)

    def original_of(self, x: torch.Tensor, model_options) -> torch.Tensor | None:
        """The original's rows and frames for an x that a node asks about; None if x is not, or not known to be, of this canvas."""
        shape, original = self.facts.shape, self.facts.original
        if x.ndim != len(shape) or tuple(x.shape[-2:]) != shape[-2:]:
            return None
        in_context_window = model_options["transformer_options"].get("context_window") is not None
        if not in_context_window and tuple(x.shape[1:]) != shape[1:]:
            return None
        if original is None:
            return x
        if in_context_window or x.shape[0] % shape[0] == 0:
            return like(_frames(original, x, model_options), x)
        whole = () if self.whole_x is None else self.whole_x
        rows = [next((kept for kept, row in zip(original, whole) if torch.equal(part, row)), None) for part in x]
        return None if any(row is None for row in rows) else torch.stack(rows).to(x)

    @property
    def follows_layout(self) -> bool:
        """Whether there is a cell that follows a look at the whole picture, see layout.py."""
        if not self.settings.hold_layout:
            return False
        return bool(((self.share(self.progress, self.facts.levels) > 0) & (self.facts.levels > self.progress)).any())

    def tell_once(self, what: str, line: str) -> None:
        if what not in self.ledger.warned:
            self.ledger.warned.add(what)
            log.warning("%s", line)

    def look_at(self, denoised: torch.Tensor) -> None:
        """Learn which cells of a call's result are numbers."""
        self.lookout.look(denoised, self.step, self.facts.steps, [window.rect for window in self.plan(self.progress)[0].windows])

    @property
    def step(self) -> int:
        """The number of the step that the sampler is in, from 1."""
        return min(int(self.progress * self.facts.steps + 1e-5) + 1, self.facts.steps)

    def tell_windows(self, done: int, amount: int) -> None:
        """Tell how far a step is, now and then; a step that takes no time is not worth a line."""
        ledger, steps = self.ledger, self.facts.steps
        if self.settings.tell is None or time.monotonic() < ledger.told + TELL_EVERY:
            return
        ledger.told = time.monotonic()
        self.settings.tell(f"step {self.step} of {steps}: {done} of {amount} windows", step=self.step, steps=steps, done=done, amount=amount)


def strengths_in_cells(tree: Quadtree, height: int, width: int, skip_below: float = 0.0, cell_px: int = 1) -> torch.Tensor:
    """The strengths of the leaves over a latent of height x width cells; windows are planned for these."""
    strengths = strength_raster(tree, height, width, cell_px)
    # A mask of 8 bits comes no nearer than half a level to what was typed.
    strengths[strengths < skip_below - 0.5 / 255] = 0
    return strengths


def like(original: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The original with the rows, the type and the device of x."""
    return comfy.utils.repeat_to_batch_size(original.to(x), x.shape[0])


def fit_original(original: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """The wired original with the latent's rows, dimensions and device. Raises ValueError if it is of another shape."""
    if original.ndim == latent.ndim - 1:
        original = original.unsqueeze(2)
    if original.shape[1:] != latent.shape[1:]:
        raise ValueError(
            f"original: expected a latent like the one that is sampled, {tuple(latent.shape[1:])} (channels, [frames,] height, width), got {tuple(original.shape[1:])}. "
            "Encode the same picture with the same VAE.")
    return like(original, latent)


def _frames(original: torch.Tensor, x: torch.Tensor, model_options) -> torch.Tensor:
    """The original's frames in the host's context window, which evaluates a video piece by piece."""
    context = model_options["transformer_options"].get("context_window")
    if context is None:
        return original
    frames = context.get_tensor(original)
    # Guides follow the window's frames; the host drops what becomes of them.
    guides = x.shape[context.dim] - frames.shape[context.dim] if context.dim else 0
    return torch.cat([frames, x.narrow(context.dim, -guides, guides)], context.dim) if guides else frames


def _has_own_steps(sampler) -> bool:
    """Whether the sampler, or one that is wrapped in its options, takes other steps than those of the schedule."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    inside = getattr(sampler, "extra_options", None) or {}
    return any(own in name for own in OWN_STEPS) or any(_has_own_steps(option) for option in inside.values() if hasattr(option, "sampler_function"))

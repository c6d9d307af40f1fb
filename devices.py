"""Which device evaluates which batch of windows, and when?

The host's MultiGPU CFG Split puts a copy of the model on every device, and a thread for each into a run's options. The
host shares out conditionings, of which there may be one; here whole batches go out, the longest first, each to the device
that is expected to end it first. Which windows are one batch never depends on how fast a device is, and results are taken
in the order of the windows: what comes out is what one device makes of the same batches.
"""
from __future__ import annotations

import logging
import math
import queue
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import comfy.model_management

from .memory import if_memory, is_out_of_memory

# A device counts what it did in its last batches; of earlier ones this share at each.
KEPT = 0.8

# Batches are cut for the devices if without it the last one ends so much later than if all ended at once.
UNEVEN = 1.1

# Pieces of a batch, for each device, at most.
FINEST = 4

# As often a device that has nothing to do is given another chance, in seconds: one that was to be faster may be late.
LATE = 0.05

# Why a device is left out that others may do better than.
ONE_TOO_MANY = "it ran out of memory with one window"

ELSEWHERE = re.compile(r"same device|two devices|different devices", re.IGNORECASE)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one shape and one kind. first: their place among all windows of a step. cost: as planned, of all of them."""

    first: int
    windows: tuple
    cost: float

    def cut(self, size: int) -> list[Batch]:
        """Batches of so many windows at most."""
        starts = range(0, len(self.windows), size)
        return [self._piece(start, min(start + size, len(self.windows))) for start in starts]

    def split(self, size: int) -> tuple[Batch, Batch]:
        """So many windows, and the rest."""
        return self._piece(0, size), self._piece(size, len(self.windows))

    def pieces(self, count: int) -> list[Batch]:
        """So many batches, as even as windows are."""
        edges = [len(self.windows) * index // count for index in range(count + 1)]
        return [self._piece(start, end) for start, end in zip(edges, edges[1:])]

    def _piece(self, start: int, end: int) -> Batch:
        return Batch(self.first + start, self.windows[start:end], self.cost * (end - start) / len(self.windows))


@dataclass(frozen=True, eq=False)
class Work:
    """What is done with the batches of one step; all but the jobs is called from the sampler's own thread.

    ask(batch, device): a function that evaluates it there; None is the only device. It returns None if the windows have to
    be run one at a time. take(batch, results): is given each batch once, in the order of the windows. halve(size): so many
    windows at once were too many; returns how many may be. home(batch): the one device that can evaluate it, None for any.
    """

    ask: Callable[[Batch, torch.device | None], Callable]
    take: Callable[[Batch, object], None]
    halve: Callable[[int], int]
    home: Callable[[Batch], torch.device | None] = lambda batch: None

    def again(self, batch: Batch, error: BaseException | None) -> list[Batch]:
        """The batches that take the place of one that was not evaluated. Raises its error if there is no help."""
        if error is None:
            return batch.cut(1)
        if not is_out_of_memory(error) or len(batch.windows) == 1:
            raise error
        return batch.cut(self.halve(len(batch.windows)))


def one_by_one(pending: deque[Batch], next_batch: Callable[[deque[Batch]], Batch], work: Work) -> None:
    """Evaluate batches on the only device, each as many windows as next_batch then takes off."""
    while pending:
        comfy.model_management.throw_exception_if_processing_interrupted()
        batch = next_batch(pending)
        try:
            results, error = work.ask(batch, None)(), None
        except Exception as problem:
            results, error = None, problem
        if results is None:
            pending.extendleft(reversed(work.again(batch, error)))
        else:
            work.take(batch, results)
        del results, error  # or they would live beside the next batch's


@dataclass(eq=False)
class Device:
    """One device of a run. key: the host's name for it. pace: what it is said to do in the time in which others do 1.

    cost, seconds: of its last batches. batches: of all, their number.
    """

    key: torch.device
    pace: float = 1.0
    cost: float = 0.0
    seconds: float = 0.0
    batches: int = 0

    @property
    def shown(self) -> float | None:
        """Cost in a second, as far as it was seen."""
        return self.cost / self.seconds if self.seconds else None

    def count(self, cost: float, seconds: float) -> None:
        self.cost, self.seconds, self.batches = KEPT * self.cost + cost, KEPT * self.seconds + seconds, self.batches + 1


@dataclass(frozen=True, eq=False)
class _Answer:
    device: Device
    batch: Batch
    results: object
    error: BaseException | None
    seconds: float


@dataclass(eq=False)
class Crew:
    """The devices of one run, and the host's threads for them. The first device is, as long as it is used, the one that the latent is on.

    host_shares_out: whether the host may share out conditionings by itself.
    """

    pool: object
    devices: list[Device]
    host_shares_out: bool = True
    _own: Device = field(init=False)
    _busy: dict[Device, tuple[Batch, float]] = field(default_factory=dict)
    _answers: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __post_init__(self):
        self._own = self.devices[0]

    def run(self, batches: Sequence[Batch], work: Work) -> None:
        """Evaluate all batches. An error or an interrupt ends all; it is raised when every device has come to rest."""
        pending, here = list(batches), {}
        at = min((batch.first for batch in pending), default=0)
        try:
            while pending or self._busy or here:
                comfy.model_management.throw_exception_if_processing_interrupted()
                # First, so that devices are at work while results are added.
                self._hand_out(pending, work)
                while at in here:
                    known = here.pop(at)
                    work.take(known.batch, known.results)
                    at += len(known.batch.windows)
                    del known
                answer = self._next_answer(LATE if pending and len(self._busy) < len(self.devices) else None) if self._busy else None
                if answer is not None and answer.results is None:
                    pending = self._again(answer, pending, work)
                elif answer is not None:
                    here[answer.batch.first] = answer
                del answer
        finally:
            while self._busy:
                self._next_answer()

    def _hand_out(self, pending: list[Batch], work: Work) -> None:
        """Give every device that has nothing to do the longest batch that it is to end first, if there is one."""
        pending.sort(key=lambda batch: (-batch.cost, batch.first))
        while pending and len(self._busy) < len(self.devices):
            homes = [work.home(batch) for batch in pending]
            found = shares([batch.cost for batch in pending], self._waits(), self.paces(), [self._place_of(home) for home in homes])
            index = next((index for index, place in enumerate(found) if self.devices[place] not in self._busy), None)
            if index is None:
                return
            batch, device = pending.pop(index), self.devices[found[index]]
            self._start(device, batch, work.ask(batch, device.key))

    def _place_of(self, key: torch.device | None) -> int | None:
        return next((place for place, device in enumerate(self.devices) if device.key == key), None)

    def _waits(self) -> list[float]:
        """How long each device will go on with what it does; one that is late as long again as it is late."""
        now, found = time.perf_counter(), []
        for device, pace in zip(self.devices, self.paces()):
            batch, began = self._busy.get(device, (None, now))
            # Paces that were only said are in no unit of time.
            gone = now - began if any(one.shown for one in self.devices) else 0.0
            found.append(abs(batch.cost / pace - gone) if batch else 0.0)
        return found

    def paces(self) -> list[float]:
        """Of each device in comparison: as it has shown, or else as those that have would make of what is said of it."""
        known = [device.shown / device.pace for device in self.devices if device.shown]
        usual = sum(known) / len(known) if known else 1.0
        return [device.shown or device.pace * usual for device in self.devices]

    def _start(self, device: Device, batch: Batch, job: Callable) -> None:
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._busy[device] = batch, time.perf_counter()
        self.pool.submit(device.key, self._work, device, batch, job, modes)

    def _work(self, device: Device, batch: Batch, job: Callable, modes: tuple[bool, bool]) -> None:
        """In the device's thread, which knows nothing of the modes that the sampler runs in."""
        began, results, problem = time.perf_counter(), None, None
        try:
            with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
                results = job()
            _wait_for(device.key)
        except BaseException as error:
            results, problem = None, error
        self._answers.put(_Answer(device, batch, results, problem, time.perf_counter() - began))

    def _next_answer(self, seconds: float | None = None) -> _Answer | None:
        """The next that any device gives; None if it takes longer."""
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        self._busy.pop(answer.device)
        self.pool.get_result(answer.device.key)  # the host's own next answer is not to be this one
        if answer.results is not None:
            answer.device.count(answer.batch.cost, answer.seconds)
        return answer

    def _again(self, answer: _Answer, pending: list[Batch], work: Work) -> list[Batch]:
        """What is left to do with a batch that a device could not evaluate. A device that cannot evaluate any is left out."""
        why = _why_unusable(answer)
        if why is None or len(self.devices) == 1 or (answer.device is self._own and not is_out_of_memory(answer.error)):
            pieces = work.again(answer.batch, answer.error)
            most = max(len(piece.windows) for piece in pieces)  # what was too many here is too many anywhere
            return [piece for batch in pending for piece in batch.cut(most)] + pieces
        self._leave_out(answer.device, why)
        return [*pending, answer.batch]

    def _leave_out(self, device: Device, why: str) -> None:
        self.devices.remove(device)
        tell_left_out(device.key, why)

    def of_one_window(self, ask: Callable[[torch.device | None], list], is_shared_out: bool) -> list:
        """What ask(device) gives for a window that is all of a step, on the first device that has the memory.

        is_shared_out: first leave it to the host, by ask(None), which shares out its conditionings. Raises the last error.
        """
        if is_shared_out and self.host_shares_out:
            results = if_memory(lambda: ask(None))
            if results is not None:
                return results
            # It leaves answers of the other devices with its threads, and would take them for those of the next call.
            self.host_shares_out = False
        while len(self.devices) > 1:
            results = if_memory(lambda: ask(self.devices[0].key))
            if results is not None:
                return results
            self._leave_out(self.devices[0], ONE_TOO_MANY)
        return ask(self.devices[0].key)


def shares(costs: Sequence[float], waits: Sequence[float], paces: Sequence[float], homes: Sequence[int | None]) -> list[int]:
    """For each batch, in the order in which they are handed out, the device that ends it first.

    waits: how long each device is busy. homes: the only device for a batch, or None.
    """
    ends, found = list(waits), []
    for cost, home in zip(costs, homes):
        place = min(range(len(ends)), key=lambda one: ends[one] + cost / paces[one]) if home is None else home
        ends[place] += cost / paces[place]
        found.append(place)
    return found


def evened(batches: Sequence[Batch], count: int, least: Callable[[Batch], int]) -> list[Batch]:
    """Batches cut so that as many devices have about the same to do, where those that there are leave some without.

    least(batch): of how many windows a piece of it has to be, since a device takes as long for fewer.
    """
    best, best_end = list(batches), _end(batches, count)
    goal = sum(batch.cost for batch in batches) / count
    for finer in range(1, FINEST + 1):
        if best_end <= UNEVEN * goal:
            break
        found = []
        for batch in batches:
            most = max(len(batch.windows) // max(least(batch), 1), 1)
            found += batch.pieces(min(most, math.ceil(batch.cost * finer / goal - 1e-6) if goal else 1) or 1)
        end = _end(found, count)
        best, best_end = (found, end) if end < best_end * (1 - 1e-9) else (best, best_end)
    return best


def _end(batches: Sequence[Batch], count: int) -> float:
    """When the last of some equal devices ends."""
    costs, ends = sorted((batch.cost for batch in batches), reverse=True), [0.0] * count
    for cost, place in zip(costs, shares(costs, ends, [1.0] * count, [None] * len(costs))):
        ends[place] += cost
    return max(ends)


def find_crew(model_options: dict) -> Crew | None:
    """The devices that a run can use, if there are several. Those that it cannot are told, a line for each."""
    clones, pool = model_options.get("multigpu_clones") or {}, model_options.get("multigpu_thread_pool")
    if not clones or pool is None:
        return None
    for key in pool.devices:
        if key not in clones:
            tell_left_out(key, "there is no model on it")
    if len(clones) < 2:
        return None
    (first, own), *others = clones.items()
    said = model_options.get("multigpu_options") or {}
    devices = [Device(first, _pace(said, first))]
    for key, patcher in others:
        why = _why_not(patcher, own) or _why_no_thread(pool, key)
        if why is None:
            devices.append(Device(key, _pace(said, key)))
        else:
            tell_left_out(key, why)
    return Crew(pool, devices) if _why_no_thread(pool, first) is None else None


def options_of(model_options: dict, keys: Sequence[torch.device]) -> dict:
    """The options with which the host evaluates on these devices; on one of them, in the thread that calls it."""
    clones = {key: patcher for key, patcher in model_options.get("multigpu_clones", {}).items() if key in keys}
    left = {name: value for name, value in model_options.items() if name not in ("multigpu_clones", "multigpu_thread_pool")}
    if len(clones) > 1:
        return model_options | {"multigpu_clones": clones}
    return left | ({"multigpu_clones": clones} if clones else {})


def options_on(model_options: dict, key: torch.device | None) -> dict:
    """The options for one device; None leaves it to the host."""
    return model_options if key is None else options_of(model_options, [key])


def line_of(error: BaseException) -> str:
    """What an error says first: of CUDA's, lines of advice follow."""
    return str(error).partition("\n")[0] or type(error).__name__


def tell_left_out(key: torch.device, why: str) -> None:
    log.warning("device %s is left out of this run: %s", key, why)


def _pace(said: dict, key: torch.device) -> float:
    """The host's MultiGPU Options may say how fast a device is."""
    pace = (said.get(key) or {}).get("relative_speed", 1.0)
    return float(pace) if pace and pace > 0 else 1.0


def _why_not(patcher, own) -> str | None:
    """Why what is on another device is not this model."""
    model = getattr(patcher, "model", None)
    if model is None:
        return "there is no model on it"
    if type(model) is not type(own.model) or _weights_of(model) != _weights_of(own.model):
        return f"it holds another model ({type(model).__name__})"
    return None


def _weights_of(model: torch.nn.Module) -> dict[str, tuple]:
    return {name: (tuple(value.shape), value.dtype) for name, value in model.named_parameters()}


def _why_no_thread(pool, key: torch.device) -> str | None:
    if key not in pool.devices:
        return "the host has no thread for it"
    pool.submit(key, int)
    error = pool.get_result(key)[1]
    return None if error is None else f"its thread failed ({line_of(error)})"


def _why_unusable(answer: _Answer) -> str | None:
    if answer.error is None:
        return None
    if is_out_of_memory(answer.error) and len(answer.batch.windows) == 1:
        return ONE_TOO_MANY
    return f"something of the model stays on another ({line_of(answer.error)})" if isinstance(answer.error, RuntimeError) and ELSEWHERE.search(str(answer.error)) else None


def _wait_for(key: torch.device) -> None:
    """Until a device has done what it was given: before, neither is its time known nor its result there for others."""
    backend = getattr(torch, key.type, None)
    if key.type != "cpu" and hasattr(backend, "synchronize"):
        backend.synchronize(key)

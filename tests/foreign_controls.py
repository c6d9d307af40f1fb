"""Controls as other packs make them: methods replaced in the instance, controls inside controls, masks of their own.

Each gives back its hint, times its masks; see tiny_controls.py.
"""
from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field

import comfy.controlnet
import torch
from tiny_controls import CPU, EchoNetwork, echo_control


class OwnMethods(comfy.controlnet.ControlNet):
    """Puts its own methods in the place of its class's, and keeps the class's as a super object."""

    def __init__(self):
        super().__init__(EchoNetwork(), load_device=CPU)
        self.base = super()
        self.steps = [0.25, 0.5, 1.0]
        self.cond_mask = self.keyframes = self.weights = None
        self.small_mask_original = self.small_mask = None
        self.cache: dict = {}
        self.replace_methods()

    def replace_methods(self):
        self.get_control, self.control_merge, self.pre_run = self.get_control_mine, self.control_merge_mine, self.pre_run_mine
        self.cleanup, self.set_cond_hint = self.cleanup_mine, self.set_cond_hint_mine

    def pre_run_mine(self, *arguments):
        return self.base.pre_run(*arguments)

    def cleanup_mine(self):
        return self.base.cleanup()

    def set_cond_hint_mine(self, *arguments, **options):
        self.base.set_cond_hint(*arguments, **options)
        return self

    def get_control_mine(self, x_noisy, *arguments):
        return comfy.controlnet.ControlNet.get_control(self, x_noisy, *arguments)

    def masks(self) -> list:
        """Those of the picture, of each keyframe and of the weights."""
        keyframes = [keyframe.mask_hint_orig for keyframe in self.keyframes or []]
        return [mask for mask in (self.cond_mask, *keyframes, self.weights and self.weights.weight_mask) if mask is not None]

    def control_merge_mine(self, control, *arguments, **options):
        for mask in self.masks():
            output = control["output"][0]
            control["output"] = [output * resized(mask, output)]
        return comfy.controlnet.ControlNet.control_merge(self, control, *arguments, **options)

    def copy(self):
        part = type(self)()
        self.copy_to(part)
        part.cond_mask, part.keyframes, part.weights, part.steps = self.cond_mask, self.keyframes, self.weights, self.steps
        return part


def resized(mask: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A mask in the size of an output of a control, its rows repeated."""
    if mask.ndim == 4 and mask.shape[-1] <= 4:
        mask = mask.movedim(-1, 1)[:, :1]
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    mask = torch.nn.functional.interpolate(mask, output.shape[-2:], mode="nearest-exact")
    return mask if mask.shape[0] == 1 else mask.repeat(output.shape[0] // mask.shape[0], 1, 1, 1)


class PartialMethod(OwnMethods):
    def replace_methods(self):
        self.get_control = functools.partial(self.get_control_named, name="get_control_mine")

    def get_control_named(self, *arguments, name):
        return getattr(self, name)(*arguments)


class MethodsInContainers(OwnMethods):
    def replace_methods(self):
        self.methods = {"get": [(self.get_control_mine,)]}
        self.get_control = self.dispatch

    def dispatch(self, *arguments):
        return self.methods["get"][0][0](*arguments)


class Helper:
    """What a control leaves its work to, and what knows the control."""

    __slots__ = ("control", "__weakref__")

    def __init__(self, control):
        self.control = control

    def get_control(self, *arguments):
        return comfy.controlnet.ControlNet.get_control(self.control, *arguments)


class HelpedControl(OwnMethods):
    def replace_methods(self):
        self.helper = Helper(self)
        self.get_control = self.helper.get_control


class WeaklyHelped(OwnMethods):
    def replace_methods(self):
        self.itself = weakref.ref(self)
        self.get_control = self.through_reference

    def through_reference(self, *arguments):
        return self.itself().get_control_mine(*arguments)


class Outer(comfy.controlnet.ControlBase):
    """A control around another, which has the hint; `kept` says where it keeps that one."""

    kept = "base"

    def __init__(self):
        super().__init__()
        inner = echo_control()
        self.keep(inner)
        self.pre_run = self.pre_run_mine
        self.get_control = self.get_control_mine

    def keep(self, inner):
        self.base = inner

    @property
    def inner(self):
        return self.base

    def set_cond_hint(self, *arguments, **options):
        self.inner.set_cond_hint(*arguments, **options)
        return self

    def pre_run_mine(self, *arguments):
        self.inner.pre_run(*arguments)

    def get_models(self):
        return self.inner.get_models()

    def get_control_mine(self, *arguments):
        return self.inner.get_control(*arguments)

    def cleanup(self):
        self.inner.cleanup()

    def copy(self):
        part = type(self)()
        part.keep(self.inner.copy())
        return part


class OuterOfList(Outer):
    def keep(self, inner):
        self.several = [{"control": inner}]

    @property
    def inner(self):
        return self.several[0]["control"]


class OuterWithWayBack(Outer):
    """The inner one asks the outer one for what it does."""

    def keep(self, inner):
        self.base = inner
        inner.outer = self
        inner.get_control = self.get_control_of_inner

    def get_control_of_inner(self, *arguments):
        assert self.base.outer is self
        return comfy.controlnet.ControlNet.get_control(self.base, *arguments)


@dataclass
class Keyframe:
    start_percent: float
    mask_hint_orig: torch.Tensor | None
    embeds: torch.Tensor = field(default_factory=lambda: torch.ones(1, 51, 67))


@dataclass(frozen=True)
class Weights:
    weight_mask: torch.Tensor | None
    values: tuple = (1.0, 0.5)


FOLLOWING = {
    "methods in the instance": OwnMethods,
    "functools.partial": PartialMethod,
    "methods in containers": MethodsInContainers,
    "a helper with slots": HelpedControl,
    "a weak reference": WeaklyHelped,
    "a control inside": Outer,
    "a control in a list": OuterOfList,
    "a control that knows its outer one": OuterWithWayBack,
}

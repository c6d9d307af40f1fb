"""Controls of other packs in windows: right to the bit that a window covers, or refused by name before anything is sampled."""
from __future__ import annotations

import functools

import comfy.controlnet
import comfy.utils
import pytest
import torch
from foreign_controls import FOLLOWING, Keyframe, Outer, OwnMethods, Weights
from nodes import ConditioningSetArea
from seen import HEIGHT_PX, WIDTH_PX, assert_windows_see_their_part, denoised, every_batching, tiled
from test_control import controlled, prompts
from tiny_controls import CPU, EchoNetwork, EchoVAE, echo_adapter, echo_control, echoed, picture, sd15_controlnet
from tiny_models import drawer, load, with_prediction

every_following = pytest.mark.parametrize("kind", FOLLOWING)


def mask_of(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """A mask (b, height, width), no two parts alike."""
    return picture(height, width, batch, seed=11)[..., 0]


@every_batching
@every_following
def test_a_window_sees_its_part_whatever_is_bound_to_the_original(kind, tiling):
    assert_windows_see_their_part(load("sd15"), echoed, *controlled("sd15", FOLLOWING[kind]()), tiling=tiling)


@pytest.mark.parametrize("images", [1, 2])
@every_following
def test_with_cond_and_uncond_batches_and_windows_of_two_sizes(kind, images):
    model = load("sd15")
    conds = controlled("sd15", FOLLOWING[kind](), picture(HEIGHT_PX, WIDTH_PX, batch=images))
    latent = model.latent(HEIGHT_PX, WIDTH_PX, batch=images)
    assert_windows_see_their_part(model, echoed, *conds, latent=latent, tiling=dict(min_window=64, max_window=256), cfg=4.0)


# A mask in each shape that nodes leave, from one of (b, height, width).
SHAPES = {
    "b h w": lambda mask: mask,
    "h w": lambda mask: mask[0],
    "b 1 h w": lambda mask: mask[:, None],
    "b h w c": lambda mask: mask[..., None].repeat(1, 1, 1, 3),
    "bool": lambda mask: mask > 0.5,
}
# Cells are 51 x 67: the size of the picture, of the latent, and larger ones.
SIZES = [(HEIGHT_PX, WIDTH_PX), (51, 67), (2 * HEIGHT_PX, 2 * WIDTH_PX), (204, 268)]
PLACES = {
    "its own": lambda control, mask: setattr(control, "cond_mask", mask),
    "a keyframe's": lambda control, mask: setattr(control, "keyframes", [Keyframe(0.0, None), Keyframe(0.5, mask)]),
    "its weights'": lambda control, mask: setattr(control, "weights", Weights(mask)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_masks_that_a_control_keeps_are_cut_with_its_hint(place, size):
    control = OwnMethods()
    PLACES[place](control, mask_of(*size))
    assert_windows_see_their_part(load("sd15"), echoed, *controlled("sd15", control), tiling=dict(tile_batch_size=3), cfg=4.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_may_have_any_shape(shape):
    control = OwnMethods()
    control.cond_mask = SHAPES[shape](mask_of(HEIGHT_PX, WIDTH_PX))
    assert_windows_see_their_part(load("sd15"), echoed, *controlled("sd15", control), tiling={})


def test_images_of_a_batch_have_masks_of_their_own():
    control, model = OwnMethods(), load("sd15")
    control.cond_mask = mask_of(HEIGHT_PX, WIDTH_PX, batch=2)
    conds = controlled("sd15", control, picture(HEIGHT_PX, WIDTH_PX, batch=2))
    assert_windows_see_their_part(model, echoed, *conds, latent=model.latent(HEIGHT_PX, WIDTH_PX, 2), tiling=dict(tile_batch_size=3), cfg=4.0)


def test_a_mask_of_an_odd_size_is_that_of_the_picture():
    """Enlarged to the picture first: within a bilinear pixel of what the whole is given."""
    control = OwnMethods()
    control.cond_mask = torch.linspace(0, 1, 90)[None, None].repeat(1, 68, 1)
    model, conds = load("sd15"), controlled("sd15", control)
    whole, parts = (
        denoised(with_prediction(patcher, echoed), model.latent(HEIGHT_PX, WIDTH_PX), *conds) for patcher in (model.patcher, tiled(model.patcher)))
    assert (whole - parts).abs().max() < 0.02


class OwnHint(OwnMethods):
    """Keeps its hint as the picture it was given, under a name of its own."""

    def set_cond_hint_mine(self, hint, *arguments, **options):
        self.hint_image = hint.movedim(1, -1)
        return self

    def get_control_mine(self, x_noisy, *arguments):
        height, width = (8 * length for length in x_noisy.shape[-2:])
        hint = comfy.utils.common_upscale(self.hint_image.movedim(-1, 1), width, height, "nearest-exact", "center")
        return self.control_merge({"output": [hint]}, None, None)


@pytest.mark.parametrize("size", [(HEIGHT_PX, WIDTH_PX), (2 * HEIGHT_PX, 2 * WIDTH_PX), (300, 394)])
def test_a_hint_under_another_name_is_cut_too(size):
    assert_windows_see_their_part(load("sd15"), echoed, *controlled("sd15", OwnHint(), picture(*size)), tiling={}, cfg=4.0)


def in_an_area(mask) -> tuple[list, list]:
    """Conditionings under a control with a mask, in an area of 30 x 40 cells."""
    control = OwnMethods()
    control.cond_mask = mask
    positive, negative = controlled("sd15", control)
    return ConditioningSetArea().append(positive, 320, 240, 120, 88, 1.0)[0], negative


@pytest.mark.parametrize("size", [(240, 320), (30, 40), (480, 640)])
def test_the_mask_of_a_control_in_an_area_is_laid_over_the_area_as_the_hint_is(size):
    assert_windows_see_their_part(load("sd15"), echoed, *in_an_area(mask_of(*size)), tiling={})


def test_so_is_a_mask_of_the_pictures_proportion_within_a_pixel():
    conds, model = in_an_area(torch.linspace(0, 1, WIDTH_PX).repeat(1, HEIGHT_PX, 1)), load("sd15")
    whole, parts = (
        denoised(with_prediction(patcher, echoed), model.latent(HEIGHT_PX, WIDTH_PX), *conds) for patcher in (model.patcher, tiled(model.patcher)))
    assert (whole - parts).abs().max() < 0.01


def test_a_mask_of_another_proportion_is_named(caplog):
    caplog.set_level("INFO")
    control = OwnMethods()
    control.cond_mask = mask_of(100, 50)
    denoised(with_prediction(tiled(load("sd15").patcher), echoed), load("sd15").latent(HEIGHT_PX, WIDTH_PX), *controlled("sd15", control))
    assert [record.getMessage() for record in caplog.records if "sees the whole of it" in record.getMessage()] == [
        "mask OwnMethods.cond_mask, (1, 100, 50), is not known to belong to a part of the picture: every window sees the whole of it"]


def seen_by_a_window(control):
    """The copy of a control for the window of cells 8..24 x 16..40."""
    from qtd_pack.canvas import Canvas
    from qtd_pack.control import cut_control
    from qtd_pack.utils import Rect
    canvas = Canvas(load("sd15").patcher.model, (1, 4, 51, 67), CPU, 8, {}, {})
    return cut_control(control, [Rect(8, 16, 24, 40)], Rect(0, 0, 51, 67), canvas)


def test_what_is_no_mask_passes_as_it_is_and_what_was_made_of_masks_is_made_anew():
    control, mask = OwnMethods(), mask_of(HEIGHT_PX, WIDTH_PX)
    control.set_cond_hint(picture(HEIGHT_PX, WIDTH_PX).movedim(-1, 1))
    control.keyframes, control.weights = [Keyframe(0.5, mask)], Weights(mask)
    control.small_mask_original, control.small_mask = mask, mask[:, ::8, ::8]
    control.sigmas, control.embeds, control.cache = torch.rand(51, 67), torch.rand(1, 51, 67), {(51, 67): mask}
    part = seen_by_a_window(control)
    window = mask[:, 64:192, 128:320]
    assert torch.equal(part.keyframes[0].mask_hint_orig, window) and torch.equal(part.weights.weight_mask, window)
    assert torch.equal(part.small_mask_original, window) and part.small_mask is None and part.cache == {}
    assert part.sigmas is control.sigmas and part.embeds is control.embeds and part.steps is control.steps
    assert part.keyframes[0].embeds is control.keyframes[0].embeds and part.keyframes[0].start_percent == 0.5
    assert control.cache == {(51, 67): mask} and control.small_mask is not None


def test_a_control_and_its_base_belong_together_in_every_copy():
    from foreign_controls import OuterWithWayBack
    control = OuterWithWayBack()
    control.set_cond_hint(picture(HEIGHT_PX, WIDTH_PX).movedim(-1, 1))
    part = seen_by_a_window(control)
    assert part is not control and part.base is not control.base and part.base.outer is part
    assert part.base.get_control.__self__ is part and part.get_control.__self__ is part
    assert part.base.control_model is control.base.control_model


@pytest.mark.parametrize("kind", [*FOLLOWING, "masks"])
def test_the_users_objects_are_not_changed(kind):
    control = FOLLOWING.get(kind, OwnMethods)()
    if kind == "masks":
        control.cond_mask, control.keyframes = mask_of(51, 67), [Keyframe(0.5, mask_of(HEIGHT_PX, WIDTH_PX))]
    positive, negative = controlled("sd15", control)
    control = positive[0][1]["control"]
    before = dict(vars(control))
    denoised(with_prediction(tiled(load("sd15").patcher), echoed), load("sd15").latent(HEIGHT_PX, WIDTH_PX), positive, negative, cfg=4.0)
    assert vars(control).keys() == before.keys() and all(vars(control)[name] is value for name, value in before.items() if name != "timestep_range")


def test_foreign_controls_in_a_chain_with_the_hosts_add_up():
    conds = controlled("sd15", echo_control(), strength=0.5)
    conds = controlled("sd15", OwnMethods(), picture(HEIGHT_PX, WIDTH_PX, seed=8), conds=conds, strength=2.0)
    conds = controlled("sd15", echo_adapter(), picture(HEIGHT_PX, WIDTH_PX, seed=9), conds=conds)
    conds = controlled("sd15", Outer(), picture(HEIGHT_PX, WIDTH_PX, seed=10), conds=conds)
    assert_windows_see_their_part(load("sd15"), echoed, *conds, tiling={}, cfg=4.0)


class Adapter(comfy.controlnet.T2IAdapter):
    """An adapter with a method of its own in the instance, and a mask."""

    def __init__(self):
        plain = echo_adapter()
        super().__init__(plain.t2i_model, 3, 8, "nearest-exact", CPU)
        self.get_control = self.get_control_mine

    def get_control_mine(self, *arguments):
        return super().get_control(*arguments)

    def copy(self):
        part = Adapter()
        self.copy_to(part)
        return part


class Latents(comfy.controlnet.ControlNet):
    """A control whose hint goes through a VAE that it asks for more than the host does."""

    def __init__(self):
        import comfy.latent_formats
        super().__init__(EchoNetwork(), load_device=CPU, compression_ratio=1, latent_format=comfy.latent_formats.Flux())
        self.get_control = self.get_control_mine

    def get_control_mine(self, *arguments):
        assert self.vae.spacial_compression_encode() == 8 and isinstance(self.vae.sizes, list)
        return super().get_control(*arguments)

    def copy(self):
        part = Latents()
        self.copy_to(part)
        return part


@pytest.mark.parametrize("name, make, make_vae", [("sd15", Adapter, None), ("flux_dev", Latents, EchoVAE)])
def test_adapters_and_hints_behind_a_vae_follow_too(name, make, make_vae):
    conds = controlled(name, make(), vae=make_vae and make_vae())
    assert_windows_see_their_part(load(name), echoed, *conds, tiling=dict(tile_batch_size=3), cfg=4.0)


class FirstImageOnly(OwnMethods):
    """Has a strength for each image of a batch: rows are images to it."""

    def control_merge_mine(self, control, *arguments, **options):
        control["output"][0][1:] *= 0.25
        return comfy.controlnet.ControlNet.control_merge(self, control, *arguments, **options)


def test_windows_of_a_control_that_counts_images_do_not_share_a_batch(caplog):
    caplog.set_level("INFO")
    model, conds = load("sd15"), controlled("sd15", FirstImageOnly())
    assert_windows_see_their_part(model, echoed, *conds, latent=model.latent(HEIGHT_PX, WIDTH_PX, 2), tiling=dict(tile_batch_size=4))
    line = "control FirstImageOnly may take the windows of a batch for images: they are run one at a time"
    assert [record.getMessage() for record in caplog.records].count(line) == 1


class MaskedNetwork(OwnMethods):
    """A real network under its own methods and a mask."""

    def __init__(self):
        super().__init__()
        plain = sd15_controlnet()
        self.control_model, self.control_model_wrapped = plain.control_model, plain.control_model_wrapped

    def control_merge_mine(self, control, *arguments, **options):
        for place, outputs in control.items():
            control[place] = [output * area_mean(self.cond_mask, output) for output in outputs]
        return comfy.controlnet.ControlNet.control_merge(self, control, *arguments, **options)


def area_mean(mask: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), output.shape[-2:], mode="area")


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("mask_px", [256, 32, 16])
def test_a_window_is_what_the_host_makes_of_that_part_alone(mask_px, windows):
    model, hint, mask = load("sd15"), picture(256, 256), mask_of(mask_px, mask_px)
    latent = model.latent(256, 256)
    noise = drawer(5)(*latent.shape)

    def under_control(hint, mask):
        control = MaskedNetwork()
        control.cond_mask = mask
        return controlled("sd15", control, hint)

    settings = dict(min_window=128, max_window=128, tile_overlap=0, tile_batch_size=windows, method="MultiDiffusion")
    out = denoised(tiled(model.patcher, 256, 256, **settings), latent, *under_control(hint, mask), cfg=3.0, noise=noise, percents=(0.3,))
    for top in (0, 1):
        for left in (0, 1):
            cells, px, own = (
                (..., slice(top * half, (top + 1) * half), slice(left * half, (left + 1) * half)) for half in (16, 128, mask_px // 2))
            conds = under_control(hint[(slice(None), *px[1:])], mask[own])
            alone = denoised(model.patcher, latent[cells], *conds, cfg=3.0, noise=noise[cells], percents=(0.3,))
            assert (out[cells] - alone).abs().max() < 5e-6


def closed_over() -> comfy.controlnet.ControlBase:
    control = echo_control()
    plain = control.get_control
    control.get_control = lambda *arguments: plain(*arguments)
    return control


def closed_over_in_partial() -> comfy.controlnet.ControlBase:
    control = echo_control()

    def get_control(which, *arguments):
        return comfy.controlnet.ControlNet.get_control(control, *arguments)
    control.get_control = functools.partial(get_control, 0)
    return control


def cached_method() -> comfy.controlnet.ControlBase:
    control = OwnMethods()
    control.cleanup = functools.lru_cache(control.cleanup_mine)
    return control


def closed_over_at_the_end() -> comfy.controlnet.ControlBase:
    control = echo_control()
    control.cleanup = lambda: comfy.controlnet.ControlNet.cleanup(control)
    return control


class NoControl:
    """Answers as a control does, and is none of the host's."""

    previous_controlnet = extra_hooks = None
    multigpu_clones: dict = {}

    def pre_run(self, *arguments):
        pass

    def get_models(self):
        return []

    def get_extra_hooks(self):
        return []

    def inference_memory_requirements(self, dtype):
        return 0

    def cleanup(self):
        pass

    def get_control(self, x_noisy, *arguments):
        return {"output": [torch.ones(1, 1, *x_noisy.shape[2:])]}


REFUSED = {
    "a closure": (closed_over, "control ControlNet: .* whose get_control is a function made for that one object"),
    "a closure in a partial": (closed_over_in_partial, "control ControlNet: .* whose get_control is a function made for that one object"),
    "a function in C": (cached_method, "control OwnMethods: .* something in which cannot be copied .*_lru_cache_wrapper"),
    "no control": (NoControl, "control NoControl: .* which is none of ComfyUI's"),
}


def under(control) -> list:
    if isinstance(control, comfy.controlnet.ControlBase):
        control.set_cond_hint(picture(HEIGHT_PX, WIDTH_PX).movedim(-1, 1), 1.0)
    return [[tokens, extras | {"control": control}] for tokens, extras in prompts("sd15")[0]]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name_before_anything_is_sampled(kind, chained):
    make, message = REFUSED[kind]
    control, calls, model = make(), [], load("sd15")
    positive = under(control)
    if chained:
        positive = under(echo_control().set_previous_controlnet(control))
    patcher = with_prediction(tiled(model.patcher), lambda call: calls.append(call) or call.x)
    with pytest.raises(ValueError, match=f"{message}.*Remove it.*or make min_window as large as the picture"):
        denoised(patcher, model.latent(HEIGHT_PX, WIDTH_PX), positive)
    assert not calls
    # The model is as it was.
    assert_windows_see_their_part(model, echoed, *controlled("sd15", echo_control()), tiling={})


def test_a_closure_that_no_window_calls_is_not_refused():
    assert_windows_see_their_part(load("sd15"), echoed, under(closed_over_at_the_end()), tiling={})


@pytest.mark.parametrize("kind", REFUSED)
def test_with_one_window_nothing_is_refused(kind):
    positive, model = under(REFUSED[kind][0]()), load("sd15")
    one = dict(min_window=1024, max_window=1024)
    out = denoised(with_prediction(tiled(model.patcher, **one), echoed), model.latent(HEIGHT_PX, WIDTH_PX), positive)
    assert torch.equal(out, denoised(with_prediction(model.patcher, echoed), model.latent(HEIGHT_PX, WIDTH_PX), positive))

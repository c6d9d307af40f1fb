"""Windows over several devices: the same picture as on one, bit for bit, and work for all of them."""
from __future__ import annotations

import collections
import itertools
import threading
import time

from hosts import module_needs, of_host

module_needs("work on several devices", of_host("comfy.multigpu", "MultiGPUThreadPool"))  # what is imported below comes from there

import comfy.hooks
import comfy.model_management
import comfy.multigpu
import comfy.sample
import comfy.sampler_helpers
import foreign_patches
import pytest
import tiny_controls
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from device_keys import KEYS, counted, forget_the_dead, on_devices, raised_on, seen_calls, with_fault
from nodes import ControlNetApplyAdvanced
from sampling import SIDE_PX, calls_of, even_tree, load, patched, sample, striped_tree, with_prediction
from tiny_models import drawer

from qtd_pack.devices import Batch, Crew, Device, Work, evened, find_crew, shares
from qtd_pack.prompts import region_conditioning
from qtd_pack.tiled_diffusion import TiledDiffusion

FAMILIES = ("flux_schnell", "sd15", "qwen_image", "wan21_t2v", "lumina2")
METHODS = ("Mixture of Diffusers", "MultiDiffusion", "SpotDiffusion")
SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "lms", "uni_pc", "ddim", "res_multistep", "euler_cfg_pp", "er_sde")
# A UNet's windows are multiples of eight cells, and so is their overlap.
SMALL = collections.defaultdict(lambda: dict(min_window=64, max_window=128, tile_overlap=16))
SMALL["sd15"] = SMALL["sd15_inpaint"] = dict(min_window=64, max_window=128, tile_overlap=0)
COMBINED = [(family, method, SAMPLERS[(3 * row + column) % 12]) for row, family in enumerate(FAMILIES) for column, method in enumerate(METHODS)]


@pytest.fixture(scope="module")
def over():
    """Models on several devices, made once each: over(family, count)."""
    made = {}
    return lambda name, count=2: made.get((name, count)) or made.setdefault((name, count), on_devices(load(name), count))


def on_one_and_several(model, many, tree, *, prepare=lambda patcher: patcher, **options):
    """What comes out on one device and on several, and the calls of the latter. prepare: what other nodes do to the model."""
    settings = options.pop("settings", {"tile_batch_size": 1})
    one = sampled(model, prepare(patched(model, tree, **settings)), **options)
    patcher = prepare(patched(many, tree, **settings))
    with seen_calls(patcher) as calls:
        several = sampled(many, patcher, **options)
    return one, several, calls


def sampled(model, patcher, conds=None, steps=2, cfg=4.0, sampler="euler", size=(SIDE_PX, SIDE_PX), latent=None, **options):
    forget_the_dead()
    latent = model.latent(*size) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, 5)
    positive, negative = conds or (model.positive(*size), model.negative(*size))
    return comfy.sample.sample(patcher, noise, steps, cfg, sampler, "simple", positive, negative, latent, seed=5, disable_pbar=True, **options)


@pytest.mark.parametrize("family, method, sampler", COMBINED)
def test_two_devices_give_what_one_gives_bit_for_bit(over, family, method, sampler):
    model = load(family)
    one, two, calls = on_one_and_several(
        model, over(family), striped_tree(0.5, 1.0), settings=dict(method=method, tile_batch_size=1, **SMALL[family]), sampler=sampler,
        cfg=1.0 if family == "wan21_t2v" else 4.0)
    assert torch.equal(one, two)
    assert min(counted(calls).values()) > 0 and counted(calls).keys() == {"cpu", "cpu:0"}


@pytest.mark.parametrize("count, cfg, tile_batch_size", [(2, 1.0, 1), (2, 4.0, 2), (2, 4.0, 0), (3, 1.0, 0), (4, 4.0, 1), (4, 1.0, 2)])
def test_several_devices_give_what_one_gives_at_every_batch_size(over, count, cfg, tile_batch_size):
    # Windows of several shapes, so that there are several batches whatever their size.
    model, tree = load("flux_schnell"), striped_tree(0.5, 1.0, 0.0, 1.0, 0.25, leaf=64)
    settings = dict(tile_batch_size=tile_batch_size, min_window=32, max_window=128)
    one, several, calls = on_one_and_several(model, over("flux_schnell", count), tree, settings=settings, cfg=cfg, size=(256, 320), steps=4)
    assert torch.equal(one, several)
    assert len(counted(calls)) == count


def test_every_window_is_evaluated_once_in_a_step_and_every_device_has_its_own_thread(over):
    many, tree = over("flux_schnell", 3), striped_tree(1.0, 1.0)
    alone = patched(load("flux_schnell"), tree, tile_batch_size=1, min_window=64, max_window=64)
    with calls_of(alone) as shapes:
        sample(load("flux_schnell"), alone)
    patcher = patched(many, tree, tile_batch_size=1, min_window=64, max_window=64)
    with seen_calls(patcher) as calls:
        sample(many, patcher)
    assert len(calls) == len(shapes) == 4 * 16
    threads = {(call.device, call.thread) for call in calls}
    assert len(threads) == 3 and threading.get_ident() not in {thread for _, thread in threads}
    assert {call.device for call in calls} == set(KEYS[:3])


def test_windows_are_evaluated_at_the_same_time(over):
    """No call of the model ends before another one is there."""
    meeting = threading.Barrier(2, timeout=30)

    def together(x, sigma):
        meeting.wait()
        return 0.5 * x
    settings = dict(tile_batch_size=1, min_window=64, max_window=64)
    out = sample(over("flux_schnell"), with_prediction(patched(over("flux_schnell"), even_tree(1.0), **settings), together))
    model = load("flux_schnell")
    assert torch.equal(out, sample(model, with_prediction(patched(model, even_tree(1.0), **settings), lambda x, sigma: 0.5 * x)))


@pytest.mark.parametrize("filling_px, tile_batch_size, windows", [(128, 0, [2, 2, 2]), (256, 0, [6]), (64, 6, [6]), (64, 2, [2, 2, 2])])
def test_a_batch_that_fills_several_devices_is_cut_for_them_and_no_other_is(over, monkeypatch, filling_px, tile_batch_size, windows):
    monkeypatch.setattr("qtd_pack.model_facts.FILLING_PX", filling_px ** 2)
    many, size = over("flux_schnell", 3), (256, 384)
    patcher = TiledDiffusion(even_tree(1.0, *size), min_window=128, max_window=128, tile_overlap=0, tile_batch_size=tile_batch_size).patched(many.patcher)
    with seen_calls(patcher) as calls:
        sample(many, patcher, size=size, steps=1)
    assert [call.cells // (16 * 16 * 16) for call in calls] == windows


def conds_with_control(model, make, vae=None):
    hint = tiny_controls.picture(SIDE_PX, SIDE_PX)
    conds = ControlNetApplyAdvanced().apply_controlnet(model.positive(SIDE_PX, SIDE_PX), model.negative(SIDE_PX, SIDE_PX), make(), hint, 1.0, 0.0, 1.0, vae=vae)
    return conds


@pytest.mark.parametrize("family, make, vae", [
    ("sd15", tiny_controls.sd15_controlnet, None), ("sd15", tiny_controls.t2i_adapter, None), ("flux_dev", tiny_controls.flux_controlnet, tiny_controls.vae)],
    ids=["ControlNet", "T2I adapter", "with a VAE"])
def test_controls_have_a_copy_on_each_device_and_show_each_window_its_part(over, family, make, vae):
    model = load(family)
    conds = conds_with_control(model, make, vae and vae())
    tree = striped_tree(0.5, 1.0)
    settings = SMALL[family] | dict(tile_batch_size=1)
    one, two, calls = on_one_and_several(model, over(family), tree, conds=conds, settings=settings)
    assert torch.equal(one, two) and len(counted(calls)) == 2
    assert not torch.equal(one, sampled(model, patched(model, tree, **settings)))
    assert torch.equal(sampled(model, patched(model, tree, **settings), conds=conds), one)


def weights_hook(model, strengths):
    """Hooks that change a weight of the model, by another strength from step to step."""
    name = next(name for name, value in model.patcher.model.state_dict().items() if name.endswith("img_in.weight"))
    change = {name: ("diff", (drawer(4)(*model.patcher.model.state_dict()[name].shape),))}
    hooks, hook = comfy.hooks.HookGroup(), comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights, hook.need_weight_init = change, False
    hooks.add(hook)
    if len(strengths) > 1:
        frames = comfy.hooks.HookKeyframeGroup()
        for index, strength in enumerate(strengths):
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=index / len(strengths), guarantee_steps=1))
        hooks.set_keyframes_on_hooks(frames)
    return hooks


@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 0.2, 0.6, -0.5)])
def test_hooks_change_the_weights_of_every_device_when_their_keyframe_comes(over, strengths):
    model, tree = load("flux_schnell"), striped_tree(1.0, 1.0)
    hooked = lambda: (comfy.hooks.set_hooks_for_conditioning(model.positive(SIDE_PX, SIDE_PX), weights_hook(model, strengths)), model.negative(SIDE_PX, SIDE_PX))
    settings = dict(tile_batch_size=1, min_window=64, max_window=64)
    one = sampled(model, patched(model, tree, **settings), conds=hooked(), steps=4)
    patcher = patched(over("flux_schnell", 3), tree, **settings)
    with seen_calls(patcher) as calls:
        several = sampled(over("flux_schnell", 3), patcher, conds=hooked(), steps=4)
    assert torch.equal(one, several) and len(counted(calls)) == 3
    assert not torch.equal(one, sampled(model, patched(model, tree, **settings), steps=4))


@pytest.mark.parametrize("family", ["flux_kontext", "sd15_inpaint", "wan21_i2v"])
def test_references_and_pictures_beside_the_latent_are_cut_for_every_device(over, family):
    one, two, calls = on_one_and_several(load(family), over(family), striped_tree(0.5, 1.0), cfg=1.0, settings=SMALL[family] | dict(tile_batch_size=1))
    assert torch.equal(one, two) and len(counted(calls)) == 2


def test_noise_masks_and_images_of_a_batch(over):
    model, mask = load("flux_schnell"), torch.zeros(1, SIDE_PX, SIDE_PX)
    mask[:, 32:200, 50:] = 1
    latent = torch.cat([model.latent(SIDE_PX, SIDE_PX, seed=1), model.latent(SIDE_PX, SIDE_PX, seed=2)])
    one, two, calls = on_one_and_several(model, over("flux_schnell"), striped_tree(0.5, 1.0), noise_mask=mask, latent=latent, steps=3)
    assert torch.equal(one, two) and len(counted(calls)) == 2


@pytest.mark.parametrize("family", ["flux_schnell", "sd15"])
def test_a_look_at_the_whole_leads_windows_of_every_device_alike(over, family):
    settings = SMALL[family] | {"hold_layout": 1.0, "tile_batch_size": 1}
    one, several, calls = on_one_and_several(load(family), over(family), even_tree(1.0), settings=settings)
    assert torch.equal(one, several) and len(counted(calls)) == 2


def test_regions_whose_windows_cost_different_numbers_of_rows(over):
    model = load("flux_schnell")
    masks = [torch.zeros(1, SIDE_PX, SIDE_PX), torch.zeros(1, SIDE_PX, SIDE_PX)]
    masks[0][:, :, :128], masks[1][:, 128:] = 1, 0.5
    for per_window in (True, False):
        positive = region_conditioning(model.positive(SIDE_PX, SIDE_PX), [model.conds(SIDE_PX, SIDE_PX, seed=seed) for seed in (8, 9)], masks, per_window=per_window, share=0.0)
        conds = positive, model.negative(SIDE_PX, SIDE_PX)
        one, several, calls = on_one_and_several(model, over("flux_schnell", 3), striped_tree(0.5, 1.0), conds=conds)
        assert torch.equal(one, several) and len(counted(calls)) == 3


@pytest.mark.parametrize("kind", foreign_patches.KINDS)
def test_patches_of_other_packs_that_hold_a_mask_see_their_part_on_every_device(over, kind):
    family, put = foreign_patches.KINDS[kind]
    mask = (tiny_controls.picture(SIDE_PX, SIDE_PX)[..., 0] > 0.5).float()
    tree = striped_tree(0.5, 1.0)
    one, two, calls = on_one_and_several(load(family), over(family), tree, prepare=lambda patcher: put(patcher, mask), steps=3, settings=SMALL[family])
    assert torch.equal(one, two) and len(counted(calls)) == 2


def test_what_is_learnt_of_foreign_code_is_learnt_first_so_that_batches_are_those_of_one_device(over):
    """A patch that passes everything on: one window alone, by which that is seen, then several at once, on one device and on two."""
    put = lambda patcher: patcher.set_model_attn1_patch(lambda q, k, v, options: (q, k, v)) or patcher
    settings, counts = SMALL["sd15"] | {"max_window": 64, "tile_batch_size": 4}, []
    for model in (load("sd15"), over("sd15")):
        patcher = put(patched(model, even_tree(1.0), **settings))
        with seen_calls(patcher) as calls:
            sampled(model, patcher)
        counts.append(sorted(call.cells for call in calls))
    assert counts[0] == counts[1] and len(set(counts[0])) > 1


class Counting:
    """A patch that holds a mask and does something else at each of its calls."""

    def __init__(self, mask):
        self.mask, self.calls = mask, 0

    def __call__(self, q, k, v, extra_options):
        self.calls += 1
        return q * (1 + 0.3 * self.calls * float(self.mask.mean())), k, v


def with_counting(patcher):
    patcher = patcher.clone()
    patcher.set_model_attn1_patch(Counting((tiny_controls.picture(SIDE_PX, SIDE_PX)[..., 0] > 0.5).float()))
    return patcher


def test_what_counts_its_calls_goes_on_counting_on_the_device_where_its_window_is(over):
    model, many, settings = load("sd15"), over("sd15"), SMALL["sd15"]
    one, several, calls = on_one_and_several(model, many, striped_tree(0.5, 1.0, leaf=128), prepare=with_counting, steps=4, settings=settings)
    assert torch.equal(one, several) and len(counted(calls)) == 2


@pytest.mark.parametrize("first", [1, 2, 3, 3, 4])
def test_what_counts_its_calls_goes_on_counting_where_the_device_of_its_window_is_left_out(over, first):
    """Which device a window goes to depends on time: so from a few of their calls on, one of them more than once."""
    model, many, settings, tree = load("sd15"), over("sd15", 3), SMALL["sd15"] | {"tile_batch_size": 1}, striped_tree(0.5, 1.0, leaf=128)
    one = sampled(model, with_counting(patched(model, tree, **settings)), steps=4)
    patcher = failing_on(with_counting(patched(many, tree, **settings)), KEYS[0], no_memory(), first=first)
    assert torch.equal(sampled(many, failing_on(patcher, KEYS[2], no_memory(), first=4), steps=4), one)


@pytest.mark.parametrize("window", [dict(min_window=1024, max_window=1024), dict(min_window=256, max_window=256)], ids=["the whole", "a half"])
@pytest.mark.parametrize("filling, used", [(1024 ** 2, {"cpu": 4}), (128 ** 2, {"cpu": 4, "cpu:0": 4})])
def test_the_host_shares_out_the_conditionings_of_a_lone_window_only_if_that_is_large(over, monkeypatch, window, filling, used):
    monkeypatch.setattr("qtd_pack.model_facts.FILLING_PX", filling)
    model, many, size = load("flux_schnell"), over("flux_schnell"), (256, 512)
    tree = even_tree(1.0, *size) if window["min_window"] > 512 else striped_tree(0.0, 1.0, leaf=256, height=256)
    patcher = patched(many, tree, tile_overlap=0, **window)
    with seen_calls(patcher) as calls:
        out = sample(many, patcher, cfg=4.0, size=size)
    assert counted(calls) == used
    alone = sample(model, patched(model, tree, tile_overlap=0, **window), cfg=4.0, size=size)
    assert torch.equal(out, alone) == (len(used) == 1)
    assert torch.allclose(out, alone, atol=1e-3)


def test_what_compares_one_call_with_the_next_stays_on_one_device(over, caplog):
    put = lambda patcher: EasyCacheNode.execute(patcher, 3.0, 0.1, 0.9, False)[0]
    one, two, calls = on_one_and_several(load("flux_schnell"), over("flux_schnell"), striped_tree(1.0, 1.0), prepare=put, steps=6)
    assert torch.equal(one, two) and counted(calls).keys() == {"None"}
    assert caplog.text.count("EasyCache compares one call of the model with the one before: windows stay on one device") == 1


def left_out(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "is left out of this run" in record.getMessage()]


def with_clones(monkeypatch, change):
    """Let change(clones) do to a run's devices what the host could have done."""
    prepare = comfy.sampler_helpers.prepare_model_patcher_multigpu_clones

    def changed(patcher, loaded, model_options):
        found = prepare(patcher, loaded, model_options)
        if found:
            change(model_options["multigpu_clones"])
        return found
    monkeypatch.setattr(comfy.sampler_helpers, "prepare_model_patcher_multigpu_clones", changed)


def no_model(clones):
    clones[KEYS[1]] = None


def another_family(clones):
    clones[KEYS[1]] = load("sd15").patcher


def another_depth(clones):
    other = load.__wrapped__("flux_schnell").patcher
    other.model.diffusion_model.double_blocks.append(load.__wrapped__("flux_schnell").patcher.model.diffusion_model.double_blocks[0])
    clones[KEYS[1]] = other


@pytest.mark.parametrize("change, why", [
    (no_model, "there is no model on it"), (another_family, "it holds another model (BaseModel)"), (another_depth, "it holds another model (Flux)")])
def test_a_device_that_has_not_the_same_model_is_left_out_with_one_line(over, monkeypatch, caplog, change, why):
    count, used = (2, {"cpu"}) if change is no_model else (3, {"cpu", "cpu:1"})
    with_clones(monkeypatch, change)
    one, several, calls = on_one_and_several(load("flux_schnell"), over("flux_schnell", count), striped_tree(0.5, 1.0))
    assert torch.equal(one, several) and counted(calls).keys() == used
    assert left_out(caplog) == [f"device cpu:0 is left out of this run: {why}"]


def test_a_device_whose_thread_cannot_use_it_is_left_out_with_one_line(over, monkeypatch, caplog):
    use = comfy.model_management.set_torch_device

    def failing(device):
        if device == KEYS[1]:
            raise RuntimeError("no such device")
        use(device)
    monkeypatch.setattr(comfy.model_management, "set_torch_device", failing)
    one, several, calls = on_one_and_several(load("flux_schnell"), over("flux_schnell", 3), striped_tree(0.5, 1.0))
    assert torch.equal(one, several) and counted(calls).keys() == {"cpu", "cpu:1"}
    assert left_out(caplog) == ["device cpu:0 is left out of this run: its thread failed (no such device)"]


def with_loads(monkeypatch, error_of) -> None:
    """Let each load of the host raise error_of(its devices, its number from 1), if that is an error."""
    load_models, numbers = comfy.model_management.load_models_gpu, itertools.count(1)

    def loaded(models, *args, **kwargs):
        error = error_of({model.load_device for model in models}, next(numbers))
        if error is not None:
            raise error
        return load_models(models, *args, **kwargs)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", loaded)


def no_memory() -> Exception:
    return comfy.model_management.OOM_EXCEPTION("no memory for this model")


@pytest.mark.parametrize("full, used", [
    (lambda on, number: KEYS[1] in on, ["cpu", "cpu:1", "cpu:2"]), (lambda on, number: KEYS[3] in on, ["cpu", "cpu:0", "cpu:1"]),
    (lambda on, number: KEYS[1] in on or KEYS[3] in on, ["cpu", "cpu:1"]), (lambda on, number: on & set(KEYS[1:]), ["cpu"]),
    (lambda on, number: number == 2, ["cpu", "cpu:0", "cpu:1", "cpu:2"]), (lambda on, number: KEYS[2] in on and len(on) > 1, ["cpu", "cpu:0", "cpu:2"])],
    ids=["the second", "the last", "two", "all but the sampler's own", "any, the first time", "one beside others"])
def test_devices_without_memory_for_the_model_and_no_others_are_left_out_with_one_line(over, monkeypatch, caplog, full, used):
    many = over("flux_schnell", 4)
    with_loads(monkeypatch, lambda on, number: no_memory() if full(on, number) else None)  # the first load is that of the run on one device
    one, several, calls = on_one_and_several(load("flux_schnell"), many, striped_tree(0.5, 1.0))
    assert torch.equal(one, several) and (sorted(counted(calls)) == used or len(used) == 1 and counted(calls).keys() == {"None"})
    assert left_out(caplog) == [f"device {key} is left out of this run: there is no memory for the model" for key in KEYS[:4] if str(key) not in used]
    assert [clone.load_device for clone in many.patcher.get_additional_models_with_key("multigpu")] == list(KEYS[1:4])


@pytest.mark.parametrize("full", [lambda on, number: True, lambda on, number: number == 1 or number > 2], ids=["always", "once another device came"])
def test_without_memory_on_the_samplers_own_device_the_hosts_error_ends_the_run_and_no_other_device_is_blamed(over, monkeypatch, caplog, full):
    many = over("flux_schnell", 3)
    patcher = patched(many, striped_tree(0.5, 1.0), tile_batch_size=1)
    clean = sampled(many, patcher)
    with monkeypatch.context() as patch, pytest.raises(comfy.model_management.OOM_EXCEPTION, match="no memory for this model"):
        with_loads(patch, lambda on, number: no_memory() if KEYS[0] in on and full(on, number) else None)
        sampled(many, patcher)
    assert left_out(caplog) == []
    assert torch.equal(sampled(many, patcher), clean)


class Stop(BaseException):
    """What no code that catches exceptions catches."""


ORDINAL = "CUDA error: invalid device ordinal\nCUDA kernel errors might be asynchronously reported at some other API call."


@pytest.mark.parametrize("error, why", [
    (RuntimeError(ORDINAL), "CUDA error: invalid device ordinal"), (AssertionError("Invalid device id"), "Invalid device id"), (AssertionError(), "AssertionError")])
@pytest.mark.parametrize("broken", [KEYS[1:2], KEYS[2:3], KEYS[1:3]], ids=lambda keys: " and ".join(map(str, keys)))
def test_devices_that_the_model_cannot_be_loaded_onto_are_left_out_with_one_line(over, monkeypatch, caplog, broken, error, why):
    with_loads(monkeypatch, lambda on, number: error if on & set(broken) else None)
    one, several, calls = on_one_and_several(load("flux_schnell"), over("flux_schnell", 4), striped_tree(0.5, 1.0))
    assert torch.equal(one, several) and counted(calls).keys() == {str(key) for key in KEYS[:4] if key not in broken}
    assert left_out(caplog) == [f"device {key} is left out of this run: the model cannot be loaded onto it ({why})" for key in broken]


@pytest.mark.parametrize("make, vae", [(tiny_controls.sd15_controlnet, None), (tiny_controls.t2i_adapter, None)], ids=["ControlNet", "T2I adapter"])
def test_controls_do_not_go_onto_a_device_that_the_model_cannot_be_loaded_onto(over, monkeypatch, caplog, make, vae):
    model, settings = load("sd15"), SMALL["sd15"] | dict(tile_batch_size=1)
    conds = conds_with_control(model, make)
    conds = ControlNetApplyAdvanced().apply_controlnet(*conds, make(), tiny_controls.picture(SIDE_PX, SIDE_PX), 0.5, 0.0, 1.0)
    with_loads(monkeypatch, lambda on, number: RuntimeError(ORDINAL) if KEYS[1] in on else None)
    one, several, calls = on_one_and_several(model, over("sd15", 3), striped_tree(0.5, 1.0), conds=conds, settings=settings)
    assert torch.equal(one, several) and counted(calls).keys() == {"cpu", "cpu:1"}
    assert left_out(caplog) == ["device cpu:0 is left out of this run: the model cannot be loaded onto it (CUDA error: invalid device ordinal)"]


def test_one_device_without_memory_and_a_broken_one_are_each_told_their_own_reason(over, monkeypatch, caplog):
    with_loads(monkeypatch, lambda on, number: no_memory() if KEYS[2] in on else RuntimeError(ORDINAL) if KEYS[1] in on else None)
    one, several, calls = on_one_and_several(load("flux_schnell"), over("flux_schnell", 4), striped_tree(0.5, 1.0))
    assert torch.equal(one, several) and counted(calls).keys() == {"cpu", "cpu:2"}
    assert left_out(caplog) == [
        "device cpu:0 is left out of this run: the model cannot be loaded onto it (CUDA error: invalid device ordinal)",
        "device cpu:1 is left out of this run: there is no memory for the model"]


@pytest.mark.parametrize("error, device", [
    (RuntimeError("CUDA error: unspecified launch failure"), KEYS[0]), (KeyError("size"), KEYS[1]), (ValueError("no such weights"), KEYS[2]),
    (comfy.model_management.InterruptProcessingException(), KEYS[1]), (Stop(), KEYS[2])], ids=["at home", "a key", "a value", "an interrupt", "a stop"])
def test_what_fails_in_loading_and_is_not_another_devices_fault_ends_the_run(over, monkeypatch, caplog, error, device):
    many = over("flux_schnell", 3)
    patcher = patched(many, striped_tree(0.5, 1.0), tile_batch_size=1)
    clean = sampled(many, patcher)
    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        with_loads(patch, lambda on, number: error if device in on else None)
        sampled(many, patcher)
    assert raised.value is error and left_out(caplog) == []
    assert torch.equal(sampled(many, patcher), clean)


def on_device(options) -> torch.device | None:
    return next(value for value in options if isinstance(value, dict) and "cond_or_uncond" in value).get("multigpu_thread_device")


def failing_on(patcher, device, error, first=1):
    """A clone whose model fails on a device, from its first-th call there on."""
    clone, calls = patcher.clone(), collections.Counter()

    def fail(executor, x, *args, **kwargs):
        here = on_device((*args, *kwargs.values()))
        calls[here] += 1
        if here == device and calls[here] >= first:
            raise error
        return executor(x, *args, **kwargs)
    clone.add_wrapper_with_key("apply_model", "failing", fail)
    return clone


def test_a_device_that_a_part_of_the_model_never_came_to_is_left_out_with_one_line(over, caplog):
    model, many, tree = load("flux_schnell"), over("flux_schnell", 3), striped_tree(0.5, 1.0)
    error = RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cuda:1!")
    out = sampled(many, failing_on(patched(many, tree, tile_batch_size=1), KEYS[2], error))
    assert torch.equal(out, sampled(model, patched(model, tree, tile_batch_size=1)))
    assert left_out(caplog) == [f"device cpu:1 is left out of this run: something of the model stays on another ({error})"]


@pytest.mark.parametrize("error, device", [
    (RuntimeError("their licence has expired"), KEYS[0]), (KeyError("size"), KEYS[2]), (comfy.model_management.InterruptProcessingException(), KEYS[1]),
    (comfy.model_management.InterruptProcessingException(), KEYS[0]), (Stop(), KEYS[1])], ids=["an error", "another", "an interrupt", "one at home", "a stop"])
def test_an_error_or_an_interrupt_on_one_device_ends_all_and_leaves_the_next_run_clean(over, error, device):
    many, tree = over("flux_schnell", 3), striped_tree(0.5, 1.0)
    patcher = patched(many, tree, tile_batch_size=1, min_window=64, max_window=64)
    clean, threads = sampled(many, patcher), threading.active_count()
    failing = failing_on(patcher, device, error, first=2)
    with seen_calls(failing) as calls, pytest.raises(type(error)):
        sampled(many, failing)
    assert 0 < len(calls) < 2 * 16
    assert threading.active_count() == threads and not comfy.model_management.processing_interrupted()
    assert torch.equal(sampled(many, patcher), clean)


def test_an_interrupt_is_honoured_between_batches_of_all_devices(over):
    many, seen = over("flux_schnell"), []

    def cancel(x, sigma):
        if not seen:
            comfy.model_management.interrupt_current_processing()
        seen.append(x.shape)
        return x
    patcher = patched(many, even_tree(1.0), tile_batch_size=1, min_window=64, max_window=64)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(many, with_prediction(patcher, cancel))
    assert 1 <= len(seen) <= 2


def crowd(count: int) -> Crew:
    return Crew(comfy.multigpu.MultiGPUThreadPool(list(KEYS[:count])), [Device(key) for key in KEYS[:count]])


def batches_of(*costs: float) -> list[Batch]:
    return [Batch(index, (index,), cost) for index, cost in enumerate(costs)]


def test_batches_go_out_longest_first_and_are_taken_in_their_order():
    crew, asked, taken = crowd(1), [], []
    work = Work(lambda batch, device: asked.append(batch.cost) or (lambda: batch.cost), lambda batch, results: taken.append((batch.first, results)), lambda size: 1)
    costs = (3.0, 9.0, 1.0, 7.0, 5.0, 2.0)
    crew.run(batches_of(*costs), work)
    assert asked == sorted(costs, reverse=True)
    assert taken == list(enumerate(costs))
    crew.pool.shutdown()


def test_a_slow_device_is_given_less_once_it_has_shown_it():
    crew, where = crowd(2), collections.Counter()
    slow = {KEYS[0]: 0.002, KEYS[1]: 0.02}

    def ask(batch, device):
        where[device] += 1
        return lambda: time.sleep(slow[device]) or True
    for _ in range(2):
        where.clear()
        crew.run(batches_of(*[1.0] * 22), Work(ask, lambda batch, results: None, lambda size: 1))
    crew.pool.shutdown()
    assert where[KEYS[1]] < where[KEYS[0]] / 3
    assert crew.devices[0].shown > 3 * crew.devices[1].shown


def test_a_batch_waits_for_the_fast_device_where_the_slow_one_would_end_it_later():
    assert shares([4, 1, 1, 1], [0, 0], [4, 1], [None] * 4) == [0, 1, 0, 0]
    assert shares([5, 4, 3, 3, 3], [0, 0], [1, 1], [None] * 5) == [0, 1, 1, 0, 1]
    assert shares([4, 4], [3, 0], [1, 1], [None] * 2) == [1, 0]
    assert shares([4, 4, 4], [0, 0], [1, 1], [None, 1, 1]) == [0, 1, 1]


@pytest.mark.parametrize("windows, count, least, sizes", [
    ([16], 2, 1, [8, 8]), ([16], 4, 1, [4, 4, 4, 4]), ([16], 3, 1, [5, 5, 6]), ([16], 2, 16, [16]), ([16], 4, 8, [8, 8]), ([5, 5], 2, 1, [5, 5]),
    ([10, 3, 3], 2, 1, [5, 5, 3, 3]), ([1], 4, 1, [1]), ([], 2, 1, [])])
def test_batches_are_cut_as_far_as_devices_would_be_without(windows, count, least, sizes):
    first, batches = 0, []
    for size in windows:
        batches.append(Batch(first, tuple(range(first, first + size)), float(size)))
        first += size
    found = evened(batches, count, lambda batch: least)
    assert [len(batch.windows) for batch in found] == sizes
    assert [window for batch in found for window in batch.windows] == list(range(first))
    assert [batch.first for batch in found] == [batch.windows[0] for batch in found]
    assert [batch.cost for batch in found] == pytest.approx(sizes)


def test_a_device_for_which_there_is_no_model_is_told_too(caplog):
    pool = comfy.multigpu.MultiGPUThreadPool(list(KEYS[:3]))
    patcher = load("flux_schnell").patcher
    assert find_crew({"multigpu_clones": {KEYS[0]: patcher}, "multigpu_thread_pool": pool}) is None
    assert left_out(caplog) == [f"device {key} is left out of this run: there is no model on it" for key in KEYS[1:3]]
    pool.shutdown()


def test_what_the_user_says_of_devices_counts_until_they_have_shown_more():
    clones = {key: load("flux_schnell").patcher for key in KEYS[:2]}
    pool = comfy.multigpu.MultiGPUThreadPool(list(clones))
    crew = find_crew({"multigpu_clones": clones, "multigpu_thread_pool": pool, "multigpu_options": {KEYS[0]: {"relative_speed": 1.0}, KEYS[1]: {"relative_speed": 3.0}}})
    assert crew.paces() == [1.0, 3.0]
    crew.devices[0].count(10.0, 2.0)
    assert crew.paces() == [5.0, 15.0]
    crew.devices[1].count(10.0, 10.0)
    assert crew.paces() == [5.0, 1.0]
    pool.shutdown()
    assert find_crew({}) is None and find_crew({"multigpu_clones": clones}) is None


@pytest.mark.parametrize("filling_px", [64, 1024], ids=["shared out by the host", "on one device"])
@pytest.mark.parametrize("tree", [even_tree(1.0), striped_tree(0.0, 1.0)], ids=["all of the picture", "a part of it"])
@pytest.mark.parametrize("full", [KEYS[:1], KEYS[1:2], KEYS[:2]])
def test_one_window_goes_to_a_device_that_has_the_memory(over, monkeypatch, caplog, tree, full, filling_px):
    """Where the host shares out its conditionings, those of a device without memory, too."""
    monkeypatch.setattr("qtd_pack.model_facts.FILLING_PX", filling_px ** 2)
    many, settings = over("flux_dev", 3), dict(min_window=256, max_window=256, tile_overlap=0)
    one = sample(load("flux_dev"), TiledDiffusion(tree, **settings).patched(load("flux_dev").patcher), cfg=4.0)
    patcher = with_fault(TiledDiffusion(tree, **settings).patched(many.patcher), raised_on({key: no_memory() for key in full}))
    assert torch.allclose(sample(many, patcher, cfg=4.0), one, atol=1e-4)
    told = [line for line in left_out(caplog) if "ran out of memory with one window" in line]
    assert len(told) == len(set(told)) <= len(full)


def test_one_window_that_no_device_has_the_memory_for_ends_with_the_hosts_error(over):
    many = over("flux_dev", 3)
    patcher = with_fault(TiledDiffusion(even_tree(1.0), min_window=256, max_window=256, tile_overlap=0).patched(many.patcher), raised_on({key: no_memory() for key in (None, *KEYS)}))
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        sample(many, patcher)

"""What may go wrong in a run, and that the next one does not know of it: bit for bit what a clean run gives."""
from __future__ import annotations

import logging
import threading

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import pytest
import torch
from device_keys import KEYS, on_devices, raised_on, seen_calls, with_fault
from sampling import SIDE_PX, even_tree, load, patched, sample, striped_tree

from qtd_pack import tiled_diffusion
from qtd_pack.finite import Glance
from qtd_pack.tiled_diffusion import KEY
from qtd_pack.utils import Rect

FLUX = "flux_schnell"
OOM = comfy.model_management.OOM_EXCEPTION
SMALL = dict(min_window=64, max_window=64, tile_overlap=0)


@pytest.fixture(scope="module", params=[1, 3], ids=["one device", "three"])
def some(request):
    """A model on so many devices, and how many."""
    return (load(FLUX) if request.param == 1 else on_devices(load(FLUX), request.param)), request.param


@pytest.fixture(autouse=True)
def nothing_is_interrupted():
    yield
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture(scope="module")
def clean():
    """What a run gives in which nothing goes wrong."""
    return sample(load(FLUX), patched(load(FLUX), striped_tree(0.5, 1.0), tile_batch_size=4, **SMALL))


def of(model):
    return patched(model, striped_tree(0.5, 1.0), tile_batch_size=4, **SMALL)


def assert_clean(model, patcher, clean):
    assert torch.equal(sample(model, patcher), clean)
    assert KEY not in patcher.model_options["transformer_options"]
    assert not {"multigpu_clones", "multigpu_thread_pool"} & patcher.model_options.keys()


def raised_at(numbers, error):
    def fault(number, device, x):
        if number in numbers:
            raise error
    return fault


@pytest.mark.parametrize("first", [1, 2, 9])
def test_without_memory_for_a_batch_a_run_goes_on_with_smaller_ones_and_the_next_is_clean(some, clean, caplog, first):
    caplog.set_level(logging.INFO)
    model, _ = some
    patcher = of(model)
    out = sample(model, with_fault(patcher, raised_at({first}, comfy.model_management.OOM_EXCEPTION("no memory"))))
    assert (out - clean).abs().max() < 1e-3
    assert [line for line in caplog.messages if "out of memory" in line] == ["out of memory with 4 windows at once: going on with 2"]
    assert_clean(model, patcher, clean)


def test_what_was_too_much_for_one_device_is_tried_on_none_again(caplog):
    caplog.set_level(logging.INFO)
    model, tried = on_devices(load(FLUX), 2), []

    def hungry(number, device, x):
        tried.append(x.shape[0])
        if x.shape[0] > 2:
            raise comfy.model_management.OOM_EXCEPTION("too many windows")
    sample(model, with_fault(of(model), hungry))
    assert 1 <= tried.count(4) <= 2 and set(tried) == {4, 2}
    assert [line for line in caplog.messages if "out of memory" in line] == ["out of memory with 4 windows at once: going on with 2"]


def test_without_memory_for_one_window_on_any_device_the_hosts_error_ends_the_run_and_the_next_is_clean(some, clean):
    model, count = some
    patcher = of(model)
    with seen_calls(patcher) as calls, pytest.raises(comfy.model_management.OOM_EXCEPTION, match="no memory"):
        sample(model, with_fault(patcher, raised_at(range(3, 999), comfy.model_management.OOM_EXCEPTION("no memory"))))
    assert len(calls) < 16
    assert_clean(model, patcher, clean)


@pytest.mark.parametrize("device", KEYS[:3], ids=str)
def test_a_device_without_memory_for_one_window_is_left_out_and_the_others_end_the_run(clean, caplog, device):
    model = on_devices(load(FLUX), 3)

    def full(number, where, x):
        if where == device:
            raise comfy.model_management.OOM_EXCEPTION("no memory")
    patcher = of(model)
    out = sample(model, with_fault(patcher, full))
    assert (out - clean).abs().max() < 1e-3
    assert [line for line in caplog.messages if "left out" in line] == [f"device {device} is left out of this run: it ran out of memory with one window"]
    assert_clean(model, patcher, clean)


ONE_WINDOW = "device {} is left out of this run: it ran out of memory with one window"


def learning(model):
    """A patcher with code of another pack on it, of which it is learnt in its first window what it does."""
    patcher = patched(model, even_tree(1.0), tile_batch_size=1, **SMALL).clone()
    patcher.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
    return patcher


@pytest.fixture(scope="module")
def learnt():
    """A model on three devices, and what a run on one gives in which foreign code is learnt."""
    return on_devices(load("sd15"), 3), sample(load("sd15"), learning(load("sd15")))


@pytest.mark.parametrize("full", [KEYS[:1], KEYS[:2], KEYS[1:2], KEYS[1:3], (KEYS[0], KEYS[2])], ids=lambda keys: " and ".join(map(str, keys)))
def test_a_device_without_memory_is_left_out_where_foreign_code_is_learnt_and_the_next_one_learns_it(learnt, caplog, full):
    many, alone = learnt
    patcher = learning(many)
    assert torch.equal(sample(many, with_fault(patcher, raised_on({key: OOM("no memory") for key in full}))), alone)
    assert sorted(line for line in caplog.messages if "left out" in line) == sorted(ONE_WINDOW.format(key) for key in full)
    assert_clean(many, patcher, alone)


def test_where_no_device_has_memory_for_the_window_that_is_learnt_by_the_hosts_error_ends_the_run(learnt, caplog):
    many, alone = learnt
    patcher = learning(many)
    with seen_calls(patcher) as calls, pytest.raises(OOM, match="^no memory on cpu:1$"):
        sample(many, with_fault(patcher, raised_on({key: OOM(f"no memory on {key}") for key in KEYS[:3]})))
    assert [call.device for call in calls] == list(KEYS[:3])
    assert [line for line in caplog.messages if "left out" in line] == [ONE_WINDOW.format(key) for key in KEYS[:2]]
    assert_clean(many, patcher, alone)


@pytest.mark.parametrize("error", [KeyError("size"), RuntimeError("their licence has expired"), comfy.model_management.InterruptProcessingException()], ids=repr)
def test_what_is_no_lack_of_memory_ends_the_run_where_foreign_code_is_learnt(learnt, caplog, error):
    many, _ = learnt
    with pytest.raises(type(error)):
        sample(many, with_fault(learning(many), raised_on({KEYS[0]: OOM("no memory"), KEYS[1]: error})))
    assert [line for line in caplog.messages if "left out" in line] == [ONE_WINDOW.format("cpu")]


def test_a_device_that_stands_first_since_the_samplers_own_is_left_out_may_be_left_out_too(learnt, caplog):
    many, alone = learnt
    elsewhere = RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cuda:1!")
    out = sample(many, with_fault(learning(many), raised_on({KEYS[0]: OOM("no memory"), KEYS[1]: elsewhere})))
    assert torch.equal(out, alone)
    assert [line for line in caplog.messages if "left out" in line] == [
        ONE_WINDOW.format("cpu"), f"device cpu:0 is left out of this run: something of the model stays on another ({elsewhere})"]


STAGES = ("before the first batch", "in a batch", "between batches", "between steps", "in restoring")


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_at_any_stage_ends_the_run_and_the_next_is_clean(some, clean, monkeypatch, stage):
    model, _ = some
    patcher, stop = of(model), comfy.model_management.interrupt_current_processing
    run, options = patcher, {}
    if stage == "before the first batch":
        began = lambda executor, *args: stop() or executor(*args)
        run = patcher.clone()
        run.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "stop", began)
    elif stage == "in a batch":
        run = with_fault(patcher, raised_at({3}, comfy.model_management.InterruptProcessingException()))
    elif stage == "between batches":
        run = with_fault(patcher, lambda number, device, x: stop() if number == 2 else None)
    elif stage == "between steps":
        options = {"callback": lambda step, *args: stop() if step == 1 else None}
    else:
        concluded = tiled_diffusion.concluded

        def stopped(*args):
            stop()
            comfy.model_management.throw_exception_if_processing_interrupted()
            return concluded(*args)
        monkeypatch.setattr(tiled_diffusion, "concluded", stopped)
    threads = threading.active_count()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, run, **options)
    monkeypatch.undo()
    assert threading.active_count() == threads
    assert_clean(model, patcher, clean)


def losing(patcher, value: float, when=lambda sigma: True, channel: int | None = None):
    """A clone whose model returns no number for the window at 128, 64 px."""
    clone = patcher.clone()

    def around(executor, x, t, *args, **kwargs):
        out = executor(x, t, *args, **kwargs)
        rects, _ = next(v for v in (*args, *kwargs.values()) if isinstance(v, dict) and "cond_or_uncond" in v)["quadtree_tiled_diffusion_windows"]
        if when(float(t.flatten()[0])) and Rect(8, 16, 16, 24) in rects:
            rows = out.chunk(len(rects))[rects.index(Rect(8, 16, 16, 24))] if out.shape[0] % len(rects) == 0 else out
            (rows if channel is None else rows[:, channel, 3:4, 5:6]).fill_(value)
        return out
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "losing", around)
    return clone


def lost(caplog) -> list[str]:
    return [line for line in caplog.messages if "no number" in line]


@pytest.mark.parametrize("value, devices", [(float("nan"), 1), (float("nan"), 2), (float("inf"), 1), (-float("inf"), 3)])
def test_what_is_no_number_is_told_with_its_step_and_its_window_in_pixels(clean, caplog, value, devices):
    model, told = load(FLUX) if devices == 1 else on_devices(load(FLUX), devices), []
    settings = dict(tile_batch_size=1, tell=lambda line, **values: told.append((line, values)), **SMALL)
    sample(model, losing(patched(model, even_tree(1.0), **settings), value), steps=4)
    (line,) = lost(caplog)
    assert line.startswith(
        "step 1 of 4: the model returned what is no number (NaN or infinity) for 6 % of the picture, within 64 x 64 px at 128, 64, all of window 64 x 64 px at 128, 64. "
        "It will be black or noise there.")
    assert told[-1] == (line, {"failed": True})
    assert_clean(model, of(model), clean)


def test_one_cell_that_is_no_number_is_told_where_it_is_and_in_the_step_where_it_began(caplog):
    model = load(FLUX)
    sample(model, losing(patched(model, even_tree(1.0), tile_batch_size=1, **SMALL), float("nan"), lambda sigma: sigma < 0.6, channel=2))
    (line,) = lost(caplog)
    assert line.startswith("step 3 of 4: ") and "within 8 x 8 px at 168, 88. It will" in line


def test_what_is_lost_in_the_last_step_is_told_too_and_what_was_to_be_kept_is_kept(caplog):
    model = load(FLUX)
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, losing(patched(model, striped_tree(0.0, 1.0), tile_batch_size=1, **SMALL), float("nan"), lambda sigma: sigma < 0.3), latent)
    (line,) = lost(caplog)
    assert line.startswith("step 4 of 4: ") and "64 x 64 px at 128, 64" in line
    assert torch.equal(out[..., :16], latent[..., :16])
    assert not out[..., 8:16, 16:24].isfinite().any()
    assert out[..., 16:, 16:].isfinite().all()


def test_a_run_of_numbers_tells_nothing_and_is_not_waited_for(caplog):
    """The device is asked once for each call of the sampler, when the next one comes, and at the end."""
    model, asked = load(FLUX), []
    real = Glance.warning
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Glance, "warning", lambda self, px: asked.append(self.step) or real(self, px))
        sample(model, patched(model, even_tree(1.0), **SMALL))
    assert asked == [1, 2, 3, 4] and lost(caplog) == []


@pytest.mark.parametrize("shape", [(1, 4, 6, 8), (2, 4, 3, 6, 8)])
def test_cells_that_are_no_numbers_in_any_image_channel_or_frame_are_found(shape):
    denoised = torch.randn(shape)
    assert Glance.at(denoised, 1, 4, ()).warning(8) is None
    denoised[..., -1, 4, 5] = float("inf")
    denoised[..., 0, 2, 3] = float("nan")
    rects = [Rect(0, 0, 6, 8), Rect(2, 3, 3, 4), Rect(-1, 0, 2, 2), Rect(4, 5, 5, 6), Rect(4, 5, 5, 6), Rect(4, 5, 5, 6)]
    assert Glance.at(denoised, 2, 4, rects).warning(8).startswith(
        "step 2 of 4: the model returned what is no number (NaN or infinity) for 4 % of the picture, within 24 x 24 px at 24, 16, all of windows 8 x 8 px at 24, 16, "
        "8 x 8 px at 40, 32, 8 x 8 px at 40, 32 and 1 more. It will")


def test_models_unloaded_between_steps_change_nothing(some, clean):
    model, _ = some
    patcher = of(model)
    out = sample(model, patcher, callback=lambda step, *args: comfy.model_management.unload_all_models() if step in (0, 2) else None)
    assert torch.equal(out, clean)
    assert_clean(model, patcher, clean)


def together(*runs):
    """Run functions at once, each in a thread; what each gives."""
    found, start = [None] * len(runs), threading.Barrier(len(runs), timeout=60)

    def work(place, run):
        start.wait()
        try:
            found[place] = run()
        except BaseException as error:
            found[place] = error
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("kind", ["one patcher", "two patchers", "two models"])
@pytest.mark.parametrize("devices", [1, 2])
def test_two_runs_at_once_do_not_see_each_other(models_load_in_turn, kind, devices):
    """Step by step together, since the host takes a model's patcher away from whoever still samples when a run on it ends.

    The noise is drawn before, since the host draws it from the one generator that all threads share.
    """
    model = load(FLUX) if devices == 1 else on_devices(load(FLUX), devices)
    other = model if kind != "two models" else load.__wrapped__(FLUX)
    first = patched(model, striped_tree(0.5, 1.0), tile_batch_size=1, **SMALL)
    second = first if kind == "one patcher" else patched(other, striped_tree(1.0, 0.25), tile_batch_size=1, **SMALL)
    latents = [model.latent(SIDE_PX, SIDE_PX, seed=seed) for seed in (1, 2)]
    noises = [comfy.sample.prepare_noise(latent, 7) for latent in latents]
    alone = [sample(who, patcher, latent, noise=noise) for who, patcher, latent, noise in zip((model, other), (first, second), latents, noises)]
    step = threading.Barrier(2, timeout=60)
    one, two = together(
        lambda: sample(model, first, latents[0], noise=noises[0], callback=lambda *args: step.wait()),
        lambda: sample(other, second, latents[1], noise=noises[1], callback=lambda *args: step.wait()))
    assert torch.equal(one, alone[0]) and torch.equal(two, alone[1])

"""Other packs' code around and inside the model, as objects that behave like theirs."""
from __future__ import annotations

import functools
import types

import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_freelunch
from comfy_extras.nodes_easycache import EasyCacheNode, easycache_forward_wrapper
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from conftest import HOST, load_module
from sampling import SIDE_PX, even_tree, load, sample, striped_tree
from seen import assert_windows_are_their_parts_alone
from tiny_models import recorded

from qtd_pack import foreign
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.tiled_diffusion import TiledDiffusion

ROWS = torch.tensor([1.3, 0.4])

# Windows of one size, of two, and none that overlaps.
TILINGS = {
    "one size": dict(min_window=128, max_window=128, tile_overlap=16),
    "two sizes": dict(min_window=64, max_window=128, tile_overlap=0),
    "MultiDiffusion": dict(min_window=128, max_window=128, tile_overlap=16, method="MultiDiffusion"),
    "SpotDiffusion": dict(min_window=128, max_window=128, method="SpotDiffusion"),
}
every_tiling = pytest.mark.parametrize("settings", TILINGS.values(), ids=TILINGS.keys())

# Of four windows; the least overlap of a UNet's would make them one.
NO_OVERLAP = dict(min_window=128, max_window=128, tile_overlap=0)

ONE_WINDOW = dict(min_window=512, max_window=512)


def corner_and_spots():
    """A corner and a spot of 64 px to redraw: windows of two sizes."""
    mask = torch.zeros(1, SIDE_PX, SIDE_PX)
    mask[:, :128, 128:] = 1
    mask[:, -64:, -64:] = 1
    mask[:, -64:, :64] = 1
    return quadtree_from_mask(mask, min_leaf=64, max_leaf=64)


def tiled(patcher, settings, **others):
    tree = corner_and_spots() if settings.get("min_window") == 64 else even_tree(1.0)
    return TiledDiffusion(tree, **settings | others).patched(patcher)


def run(patcher, name="flux_schnell", batch=1, **options):
    model = load(name)
    return sample(model, patcher, model.latent(SIDE_PX, SIDE_PX, batch), **dict(steps=2) | options)


def by_row(value: torch.Tensor) -> torch.Tensor:
    """Each row times the value of its image, the last for all further rows."""
    amounts = ROWS[torch.arange(value.shape[0]).clamp(max=len(ROWS) - 1)]
    return value * amounts.view(-1, *[1] * (value.ndim - 1))


def first_half(value: torch.Tensor) -> torch.Tensor:
    """The first half of the rows, where the positive prompt is with one image and guidance, changed."""
    half = value.shape[0] - value.shape[0] // 2
    return torch.cat([value[:half] * 0.6, value[half:]])


# How such code gets onto a model: (patcher, what is done to rows) -> patched clone.

def as_patch(patcher, change):
    patcher = patcher.clone()
    patcher.set_model_attn1_output_patch(lambda attention, extra_options: change(attention))
    return patcher


def as_replacement(patcher, change):
    def block(args, extra):
        out = extra["original_block"](args)
        return out | {"img": change(out["img"])}

    patcher = patcher.clone()
    patcher.set_model_patch_replace(block, "dit", "double_block", 0)
    return patcher


def as_attention(patcher, change):
    patcher = patcher.clone()
    patcher.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, *args, **kwargs: change(attention(*args, **kwargs))
    return patcher


def as_function_wrapper(patcher, change):
    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(lambda apply_model, args: change(apply_model(args["input"], args["timestep"], **args["c"])))
    return patcher


def around(kind):
    def put(patcher, change):
        patcher = patcher.clone()
        patcher.add_wrapper_with_key(kind, "theirs", lambda executor, *args, **kwargs: change(executor(*args, **kwargs)))
        return patcher
    return put


def method_of(patcher):
    """The network's own, as another clone's may be in its place just now."""
    network = patcher.model.diffusion_model
    return functools.partial(type(network).forward, network)


def as_replaced_method(patcher, change):
    patcher = patcher.clone()
    method = method_of(patcher)
    patcher.add_object_patch("diffusion_model.forward", lambda *args, **kwargs: change(method(*args, **kwargs)))
    return patcher


def as_method_swapped_in_a_wrapper(patcher, change):
    """The wrapper lets everything through; what it calls is another method meanwhile."""
    def wrapper(executor, *args, **kwargs):
        network = executor.class_obj.diffusion_model
        method = network.forward_orig
        network.forward_orig = lambda *inner, **options: change(method(*inner, **options))
        try:
            return executor(*args, **kwargs)
        finally:
            del network.forward_orig

    patcher = patcher.clone()
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", wrapper)
    return patcher


WAYS = {
    "patch": as_patch, "patches_replace": as_replacement, "optimized_attention_override": as_attention, "model_function_wrapper": as_function_wrapper,
    "APPLY_MODEL": around(WrappersMP.APPLY_MODEL), "DIFFUSION_MODEL": around(WrappersMP.DIFFUSION_MODEL), "replaced Flux.forward": as_replaced_method,
    "swapped": as_method_swapped_in_a_wrapper,
}


@pytest.mark.parametrize("change, batch", [(by_row, 2), (first_half, 1)], ids=["a value for each image", "the first half of the rows"])
@pytest.mark.parametrize("way, settings", [(way, TILINGS["two sizes"]) for way in WAYS] + [("patch", settings) for settings in TILINGS.values()])
def test_code_that_counts_rows_is_given_one_window_at_a_time(way, settings, change, batch, caplog):
    caplog.set_level("WARNING")
    patcher = WAYS[way](load("flux_schnell").patcher, change)
    together = run(tiled(patcher, settings), batch=batch)
    said = [record.getMessage() for record in caplog.records if "one at a time" in record.getMessage()]
    assert len(said) == 1 and "test_foreign_wrappers" in said[0]
    assert (together - run(tiled(patcher, settings, tile_batch_size=1), batch=batch)).abs().max() < 1e-6
    assert (together - run(tiled(load("flux_schnell").patcher, settings), batch=batch)).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["patch", "patches_replace", "model_function_wrapper", "APPLY_MODEL"])
def test_windows_beside_code_that_counts_rows_are_their_crops_alone(way):
    model = load("flux_schnell")
    patcher = WAYS[way](model.patcher, by_row)

    def part_of(cells, px):
        return patcher, model.positive(SIDE_PX, SIDE_PX), model.negative(SIDE_PX, SIDE_PX)

    assert_windows_are_their_parts_alone(model, part_of, model.latent(SIDE_PX, SIDE_PX, 2), windows=4)


def test_a_hook_of_a_conditioning_counts_rows():
    model = load("flux_schnell")
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"patches": {"attn1_output_patch": [lambda attention, extra_options: by_row(attention)]}}, hook_scope=comfy.hooks.EnumHookScope.HookedOnly))
    ((prompt, extras),) = model.positive(SIDE_PX, SIDE_PX)
    latent, outs = model.latent(SIDE_PX, SIDE_PX, 2), []
    for conds in ([[prompt, extras | {"hooks": hooks}]], [[prompt, extras]]):
        for size in (0, 1):
            patcher = tiled(model.patcher, TILINGS["one size"], tile_batch_size=size)
            noise = comfy.sample.prepare_noise(latent, 5)
            outs.append(comfy.sample.sample(patcher, noise, 2, 1.0, "euler", "simple", conds, conds, latent, disable_pbar=True))
    assert (outs[0] - outs[1]).abs().max() < 1e-6
    assert (outs[0] - outs[2]).abs().max() > 1e-3


def test_a_batch_size_set_by_hand_gives_way_and_that_is_said(caplog):
    caplog.set_level("WARNING")
    patcher, calls = recorded(as_replacement(load("flux_schnell").patcher, by_row))
    run(tiled(patcher, TILINGS["one size"], tile_batch_size=3), batch=2, cfg=3.0)
    assert {call.x.shape[0] for call in calls} == {4}
    assert "one at a time and not 3 at once (tile_batch_size)" in caplog.text


def test_code_that_only_looks_on_leaves_windows_together():
    seen = []

    def look(q, k, v, extra_options):
        seen.append(q.shape[0])
        return q, k, v

    patcher, calls = recorded(load("sd15").patcher)
    patcher.set_model_attn1_patch(look)
    run(tiled(patcher, NO_OVERLAP), "sd15", cfg=3.0)
    assert max(seen) == max(call.x.shape[0] for call in calls) > 4


@pytest.mark.parametrize("way", ["patch", "APPLY_MODEL"])
def test_rows_are_not_counted_in_inference_mode_either(way):
    """The server's: its tensors do not tell whether they were changed in place."""
    def in_place(value):
        return value.mul_(ROWS[torch.arange(value.shape[0]).clamp(max=1)].view(-1, *[1] * (value.ndim - 1)))

    patcher = WAYS[way](load("flux_schnell").patcher, in_place)
    with torch.inference_mode():
        together, apart = (run(tiled(patcher, TILINGS["one size"], tile_batch_size=size), batch=2) for size in (0, 1))
    assert torch.equal(together, apart)
    assert torch.equal(together, run(tiled(patcher, TILINGS["one size"]), batch=2))


def test_the_hosts_own_patches_leave_windows_together_without_a_word(caplog):
    caplog.set_level("WARNING")
    patcher = PerturbedAttentionGuidance.execute(FreeU.execute(load("sd15").patcher, 1.1, 1.2, 0.9, 0.2)[0], 3.0)[0]
    run(tiled(patcher, NO_OVERLAP), "sd15", cfg=3.0)
    assert not [record for record in caplog.records if record.name == "qtd_pack.foreign"]


# Whose code it is.

class Theirs:
    def __call__(self, *args):
        return args

    def method(self, *args):
        return args


def function(*args):
    return args


def closing_over(inner):
    return lambda *args: inner(*args)


def from_file(file) -> types.FunctionType:
    """A function as if it lay in a file."""
    name = str(file).replace(".", "_x_") + ".nodes"
    return types.FunctionType(function.__code__.replace(co_filename=str(file)), {"__name__": name})


@pytest.mark.parametrize("thing", [
    function, lambda *args: args, Theirs(), Theirs().method, functools.partial(function, 1), functools.partial(easycache_forward_wrapper, function), closing_over(function),
    from_file(HOST / "custom_nodes" / "pack" / "nodes.py"), from_file(HOST / "custom_nodes" / "node.py"), len, torch.nn.Identity(), from_file("<string>"),
    type("Child", (Theirs,), {"__module__": "comfy.samplers"})(),
])
def test_code_outside_of_the_host_is_foreign(thing):
    assert foreign.is_foreign(thing)


def loaded_as_the_host_does():
    """The host loads its extra nodes under a name that is a path."""
    file = HOST / "comfy_extras" / "nodes_freelunch.py"
    return load_module(str(file)[:-3].replace(".", "_x_"), file)


def test_code_of_the_host_and_ours_is_not_foreign():
    patched = loaded_as_the_host_does().FreeU.execute(load("sd15").patcher, 1.1, 1.2, 0.9, 0.2)[0]
    (free_u,) = patched.model_options["transformer_options"]["patches"]["output_block_patch"]
    for thing in (free_u, nodes_freelunch.Fourier_filter, functools.partial(easycache_forward_wrapper), TiledDiffusion.patched, load("sd15").patcher.clone):
        assert not foreign.is_foreign(thing)


def test_objects_that_hold_no_code_or_no_picture_are_of_no_concern():
    patcher = load("flux_schnell").patcher.clone()
    patcher.set_model_compute_dtype(torch.float32)
    patcher.add_object_patch("model_sampling", Theirs())
    assert foreign.on_model(patcher, patcher.model) == []
    patcher.add_object_patch("diffusion_model.double_blocks.0", Theirs())
    patcher.set_injections("theirs", [types.SimpleNamespace(inject=function)])
    assert [one.place for one in foreign.on_model(patcher, patcher.model)] == ["object patch 'diffusion_model.double_blocks.0'", "injection 'theirs'"]


def test_names_leave_out_the_folders_of_a_custom_node():
    assert foreign.name_of(from_file("/some/where/ComfyUI/custom_nodes/ComfyUI-Pack")) == "ComfyUI-Pack.nodes.function"


# Caches.

class Residual:
    """Answers every second time with what it was given and the change of the last call, as the packs do."""

    def __init__(self):
        self.calls, self.change = 0, None

    def __call__(self, ask, x):
        self.calls += 1
        if self.calls % 2 == 0:
            return x + self.change
        out = ask()
        self.change = out - x
        return out


def cache_in_function(patcher):
    cache = Residual()

    def answer_every_second(apply_model, args):
        return cache(lambda: apply_model(args["input"], args["timestep"], **args["c"]), args["input"])

    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(answer_every_second)
    return patcher


def cache_around(kind):
    def put(patcher):
        cache = Residual()

        def answer_every_second(executor, x, *args, **kwargs):
            return cache(lambda: executor(x, *args, **kwargs), x)

        patcher = patcher.clone()
        patcher.add_wrapper_with_key(kind, "theirs", answer_every_second)
        return patcher
    return put


def cache_in_method(patcher):
    cache, method = Residual(), method_of(patcher)

    def answer_every_second(x, *args, **kwargs):
        return cache(lambda: method(x, *args, **kwargs), x)

    patcher = patcher.clone()
    patcher.add_object_patch("diffusion_model.forward", answer_every_second)
    return patcher


RESIDUAL_CACHES = {
    "model_function_wrapper": cache_in_function, "APPLY_MODEL wrapper 'theirs'": cache_around(WrappersMP.APPLY_MODEL),
    "DIFFUSION_MODEL wrapper 'theirs'": cache_around(WrappersMP.DIFFUSION_MODEL), "object patch 'diffusion_model.forward'": cache_in_method,
}


@pytest.mark.parametrize("tile_batch_size, cfg", [(0, 3.0), (1, 1.0)])
@pytest.mark.parametrize("place, settings", [(place, TILINGS["one size"]) for place in RESIDUAL_CACHES] + [("model_function_wrapper", settings) for settings in TILINGS.values()])
def test_an_answer_from_memory_is_refused_by_name_and_the_next_run_is_clean(place, settings, cfg, tile_batch_size):
    model = load("flux_schnell")
    reference = run(tiled(model.patcher, settings), cfg=cfg)
    with pytest.raises(ValueError, match=f"{place}.*answer_every_second.*use ComfyUI's EasyCache.*min_window"):
        run(tiled(RESIDUAL_CACHES[place](model.patcher), settings, tile_batch_size=tile_batch_size), cfg=cfg)
    assert torch.equal(run(tiled(model.patcher, settings), cfg=cfg), reference)


@pytest.mark.parametrize("place", RESIDUAL_CACHES)
def test_a_cache_with_one_window_is_the_cache_bit_for_bit(place, caplog):
    caplog.set_level("WARNING")
    put, model = RESIDUAL_CACHES[place], load("flux_schnell")
    assert torch.equal(run(tiled(put(model.patcher), ONE_WINDOW)), run(put(model.patcher)))
    assert not [record for record in caplog.records if record.name == "qtd_pack.foreign"]


def without_uncond(apply_model, args):
    """Guidance only in the first half of the steps: later nobody is asked what the negative prompt is for."""
    if args["timestep"][0] > 0.6 or 0 in args["cond_or_uncond"]:
        return apply_model(args["input"], args["timestep"], **args["c"])
    return args["input"] * 0.9


def test_skipping_the_negative_prompt_is_no_cache():
    model = load("flux_schnell")
    patcher = model.patcher.clone()
    patcher.set_model_unet_function_wrapper(without_uncond)
    longer = [[torch.cat([model.negative(SIDE_PX, SIDE_PX)[0][0]] * 3, 1)[:, :100], model.negative(SIDE_PX, SIDE_PX)[0][1]]]
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = comfy.sample.sample(
        tiled(patcher, TILINGS["one size"]), comfy.sample.prepare_noise(latent, 5), 4, 3.0, "euler", "simple", model.positive(SIDE_PX, SIDE_PX), longer, latent, disable_pbar=True)
    assert out.isfinite().all()


def test_the_hosts_cache_beside_a_wrapper_is_no_cache_of_others(caplog):
    caplog.set_level("INFO")
    patcher = EasyCacheNode.execute(load("flux_schnell").patcher, 3.0, 0.1, 0.9, False)[0]
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", lambda executor, *args, **kwargs: 0.9 * executor(*args, **kwargs))
    patcher = around(WrappersMP.APPLY_MODEL)(patcher, lambda out: 0.9 * out)
    run(tiled(patcher, TILINGS["one size"]), steps=8)
    assert "EasyCache - skipped 4/8 steps" in caplog.text


def named(function, module: str, qualname: str):
    function.__module__, function.__qualname__ = module, qualname
    return function


def with_options(**options):
    def put(patcher):
        patcher = patcher.clone()
        patcher.model_options["transformer_options"].update(options)
        return patcher
    return put


def with_function(module: str, qualname: str):
    def put(patcher):
        patcher = patcher.clone()
        patcher.set_model_unet_function_wrapper(named(lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"]), module, qualname))
        return patcher
    return put


def with_wrapper(kind, key):
    def put(patcher):
        patcher = patcher.clone()
        patcher.add_wrapper_with_key(kind, key, lambda executor, *args, **kwargs: executor(*args, **kwargs))
        return patcher
    return put


KNOWN = [
    ("TeaCache", with_options(rel_l1_thresh=0.4, cache_device="cpu")),
    ("TeaCache", with_options(enable_teacache=True)),
    ("TeaCache", with_function("/ComfyUI/custom_nodes/ComfyUI-TeaCache.nodes", "TeaCache.apply_teacache.<locals>.unet_wrapper_function")),
    ("MagCache", with_options(magcache_thresh=0.2, magcache_K=2)),
    ("MagCache", with_function("nodes", "MagCache.apply_magcache.<locals>.unet_wrapper_function")),
    ("First Block Cache", with_function("/ComfyUI/custom_nodes/some.fbcache_nodes", "ApplyFBCacheOnModel.patch.<locals>.model_unet_function_wrapper")),
    ("WaveSpeed", with_function("/ComfyUI/custom_nodes/Comfy-WaveSpeed.nodes", "Apply.patch.<locals>.wrapper")),
    ("Cache-DiT", with_wrapper(WrappersMP.DIFFUSION_MODEL, "cache_dit_turbo")),
    ("DiCache", with_wrapper(WrappersMP.APPLY_MODEL, "dicache")),
    ("another pack's EasyCache", with_options(easycache=Theirs())),
]


@pytest.mark.parametrize("key", ["DBCache", "DeepCache", "MeanCache", "TaylorSeer", "Sortblock", "first_block_cache", "cache-dit", "WaveSpeed"])
def test_a_cache_is_known_by_the_key_of_its_wrapper(key):
    wrapper = foreign.Foreign(f"DIFFUSION_MODEL wrapper {key!r}", function, wraps=True)
    assert foreign.known_cache([wrapper], {})[1] == f"DIFFUSION_MODEL wrapper {key!r} (test_foreign_wrappers.function)"
    assert foreign.known_cache([foreign.Foreign("patch 'attn1_patch'", function)], {"sigmas": 1, "cond_or_uncond": [0], "uuids": []}) is None


@pytest.mark.parametrize("title, put", KNOWN)
def test_a_known_cache_is_refused_before_sampling_where_windows_change(title, put):
    patcher, calls = recorded(put(load("flux_schnell").patcher))
    for settings in (TILINGS["one size"], TILINGS["SpotDiffusion"]):
        with pytest.raises(ValueError, match=f"^Quadtree Tiled Diffusion, {title}: .*EasyCache"):
            run(tiled(patcher, settings))
    with pytest.raises(ValueError, match=f"^Quadtree Tiled Diffusion, {title}: "):
        run(TiledDiffusion(even_tree(0.5), **ONE_WINDOW).patched(patcher))
    assert calls == []
    if title != "another pack's EasyCache":
        assert torch.equal(run(tiled(patcher, ONE_WINDOW)), run(patcher))


@every_tiling
def test_an_unknown_wrapper_is_named_once_in_a_run(settings, caplog):
    caplog.set_level("WARNING")
    patcher = as_function_wrapper(around(WrappersMP.APPLY_MODEL)(load("flux_schnell").patcher, lambda out: 0.9 * out), lambda out: 0.9 * out)
    run(tiled(patcher, settings))
    (line,) = (record.getMessage() for record in caplog.records if "not known to" in record.getMessage())
    assert "model_function_wrapper (test_foreign_wrappers.as_function_wrapper.<locals>.<lambda>)" in line
    assert "APPLY_MODEL wrapper 'theirs' (test_foreign_wrappers.around.<locals>.put.<locals>.<lambda>)" in line
    assert "must not keep anything from one call to the next, take rows of a batch for images, or hold anything of the whole picture" in line


# Parts of the latent.

def evaluating(part):
    """A node that has a part of the latent evaluated by itself, too, and guides with it."""
    def sampler_calc_cond_batch(args):
        asked.append(tuple(part(args["input"]).shape))
        answers.append(comfy.samplers.calc_cond_batch(args["model"], args["conds"], part(args["input"]), args["sigma"][:len(part(args["input"]))], args["model_options"])[0])
        return comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])

    asked, answers = [], []
    return sampler_calc_cond_batch, asked, answers


PARTS = {
    "a crop": lambda x: x[..., 4:20, 8:24], "a crop of odd size": lambda x: x[..., :15, :22], "half its size": lambda x: x[..., ::2, ::2],
    "twice its size": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2),
}


@pytest.mark.parametrize("settings", [TILINGS["one size"], TILINGS["SpotDiffusion"], ONE_WINDOW], ids=["windows", "SpotDiffusion", "one window"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_a_part_of_the_latent_goes_to_the_host_untouched(part, settings):
    model = load("flux_schnell")
    calculate, asked, answers = evaluating(part)
    guided, calls = recorded(model.patcher)
    guided.set_model_sampler_calc_cond_batch_function(calculate)
    out = run(tiled(guided, settings), steps=1, cfg=3.0)
    assert torch.equal(out, run(tiled(model.patcher, settings), steps=1, cfg=3.0))
    assert tuple(calls[0].x.shape) == (2, *asked[0][1:])
    windowed = answers[:]
    answers.clear()
    run(guided, steps=1, cfg=3.0)
    assert torch.equal(windowed[0], answers[0])


def test_frames_evaluated_by_themselves_go_to_the_host_untouched():
    model = load("wan21_t2v")
    calculate, asked, answers = evaluating(lambda x: x[:, :, 1:])
    patcher, calls = recorded(model.patcher)
    patcher.set_model_sampler_calc_cond_batch_function(calculate)
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, TiledDiffusion(striped_tree(0.0, 1.0), min_window=64, max_window=128).patched(patcher), latent, steps=1)
    assert tuple(calls[0].x.shape[2:]) == (2, 32, 32)
    assert torch.equal(out[..., :16], latent[..., :16])


@pytest.mark.parametrize("rows", [slice(1, 2), slice(0, 1), slice(1, 3)])
def test_images_evaluated_by_themselves_keep_what_is_theirs(rows):
    model = load("flux_schnell")
    latent = model.latent(SIDE_PX, SIDE_PX, 3)
    calculate, asked, answers = evaluating(lambda x: x[rows])
    patcher, calls = recorded(model.patcher)
    patcher.set_model_sampler_calc_cond_batch_function(calculate)
    sample(model, TiledDiffusion(striped_tree(0.0, 1.0), **TILINGS["one size"]).patched(patcher), latent, steps=2)
    kept = model.patcher.model.process_latent_in(latent)[rows][..., :16]
    assert max((answer[..., :14] - kept[..., :14]).abs().max() for answer in answers) == 0
    assert max(call.x.shape[-1] for call in calls) < 32


# What is held of the whole picture.

def holding(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 + 0.5 * WHOLE


WHOLE = torch.zeros(1, 16, SIDE_PX // 8, SIDE_PX // 8)


def before(kind):
    def put(patcher):
        patcher = patcher.clone()
        patcher.add_wrapper_with_key(kind, "theirs", lambda executor, x, *args, **kwargs: executor(x * 0.5 + 0.5 * WHOLE, *args, **kwargs))
        return patcher
    return put


def before_function(patcher):
    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(lambda apply_model, args: apply_model(args["input"] * 0.5 + 0.5 * WHOLE, args["timestep"], **args["c"]))
    return patcher


def in_method(patcher):
    patcher, method = patcher.clone(), method_of(patcher)
    patcher.add_object_patch("diffusion_model.forward", lambda x, *args, **kwargs: method(holding(x), *args, **kwargs))
    return patcher


def tokens_held(patcher):
    held = torch.zeros(1, 64 + 256, 1)
    return as_patch(patcher, lambda attention: attention + held)


def instead(kind):
    """Hands on the whole in place of the window, which fails only in the host's hands."""
    def put(patcher):
        patcher = patcher.clone()
        patcher.add_wrapper_with_key(kind, "theirs", lambda executor, x, *args, **kwargs: executor(WHOLE.repeat(x.shape[0], 1, 1, 1), *args, **kwargs))
        return patcher
    return put


HOLDERS = {
    "APPLY_MODEL wrapper 'theirs'": before(WrappersMP.APPLY_MODEL), "DIFFUSION_MODEL wrapper 'theirs'": before(WrappersMP.DIFFUSION_MODEL),
    "model_function_wrapper": before_function, "object patch 'diffusion_model.forward'": in_method, "patch 'attn1_output_patch'": tokens_held,
    "APPLY_MODEL wrapper 'theirs' (test_foreign_wrappers.instead": instead(WrappersMP.APPLY_MODEL),
}


@pytest.mark.parametrize("tile_batch_size", [0, 1])
@pytest.mark.parametrize("place, settings", [(place, TILINGS["two sizes"]) for place in HOLDERS] + [("patch 'attn1_output_patch'", settings) for settings in TILINGS.values()])
def test_a_latent_of_the_whole_picture_is_told_by_its_holders_name(place, settings, tile_batch_size):
    patcher = HOLDERS[place](load("flux_schnell").patcher)
    with pytest.raises(ValueError, match="expected code that takes any part of the picture.*whole picture, 32 x 32 cells.*min_window") as caught:
        run(tiled(patcher, settings, tile_batch_size=tile_batch_size))
    assert str(caught.value).startswith(f"Quadtree Tiled Diffusion, {place}")


@pytest.mark.parametrize("place", HOLDERS)
def test_a_latent_of_the_whole_picture_works_with_one_window(place):
    patcher = HOLDERS[place](load("flux_schnell").patcher)
    assert torch.equal(run(tiled(patcher, ONE_WINDOW)), run(patcher))


@pytest.mark.parametrize("error", [
    RuntimeError("their licence has expired"), comfy.model_management.OOM_EXCEPTION("no memory of this size"),
    comfy.model_management.InterruptProcessingException(), KeyError("size"),
], ids=["another", "memory", "interrupt", "key"])
def test_other_errors_of_foreign_code_stay_themselves(error):
    def fail(executor, *args, **kwargs):
        raise error

    patcher = load("flux_schnell").patcher.clone()
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", fail)
    with pytest.raises(type(error)) as caught:
        run(tiled(patcher, TILINGS["one size"]))
    assert caught.value is error


def test_an_error_of_the_model_below_foreign_code_stays_itself():
    model = load("flux_schnell")
    patcher, calls = recorded(model.patcher)
    prompt = [[torch.zeros(1, 8, 3), model.positive(SIDE_PX, SIDE_PX)[0][1]]]
    latent = model.latent(SIDE_PX, SIDE_PX)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        comfy.sample.sample(tiled(patcher, TILINGS["one size"]), comfy.sample.prepare_noise(latent, 5), 2, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True)


def test_another_packs_self_attention_guidance_is_refused_where_there_are_windows():
    patcher = load("sd15").patcher.clone()
    patcher.set_model_sampler_post_cfg_function(named(lambda args: args["denoised"], "pack", "BetterSelfAttentionGuidance.patch.<locals>.post_cfg"))
    with pytest.raises(ValueError, match="Self-Attention Guidance: expected the whole picture in one window"):
        run(tiled(patcher, NO_OVERLAP), "sd15")


@pytest.mark.parametrize("count, named", [(1, "hook 0"), (5, "hook 0, hook 1, hook 2, hook 3, hook 4"), (7, "hook 0, hook 1, hook 2, hook 3, hook 4 and 2 more")])
def test_of_many_foreign_things_the_first_five_are_named_and_the_others_counted(count, named, monkeypatch):
    monkeypatch.setattr(foreign.Foreign, "name", property(lambda one: one.place))
    monkeypatch.setattr(foreign, "name_of", lambda thing: thing)
    assert foreign.names_of([foreign.Foreign(f"hook {number}", number) for number in range(count)]) == named

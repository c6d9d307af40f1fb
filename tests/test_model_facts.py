"""The price of a window is what it takes: operations that torch counts on the host's networks at full size, without weights."""
from __future__ import annotations

import comfy.conds
import pytest
import torch
from conftest import ROOT, load_module
from tiny_models import FAMILIES, load

from qtd_pack.model_facts import _memory_required, window_cost, windows_that_fill
from qtd_pack.network_work import Work, network_work
from qtd_pack.utils import Rect
from qtd_pack.windows import WindowCost, window_sizes

full_size = load_module("qtd_full_size", ROOT / "benchmarks" / "full_size.py")
plans = load_module("qtd_plans", ROOT / "benchmarks" / "plans.py")


def priced(name: str, canvas: tuple[int, int] = (256, 256), text: int | None = None, references=()) -> WindowCost:
    """What the patch makes of the model, its text and its references, on a canvas of so many cells."""
    full = full_size.MODELS[name]
    given = {"c_crossattn": comfy.conds.CONDCrossAttn(torch.zeros(1, full.text[0] if text is None else text, 1))}
    if references:
        given["ref_latents"] = comfy.conds.CONDList([torch.zeros(full.latent_shape(*size)) for size in references])
    return window_cost(full_size.built(name), [[{"model_conds": given}]], full.latent_shape(*canvas))


def assert_priced(cost: WindowCost, operations: dict[tuple[int, int], int]) -> None:
    """The price of any of these windows, over that of any other, is as counted to 2 %."""
    per_token = [counted / cost.of(*size) for size, counted in operations.items()]
    assert max(per_token) / min(per_token) < 1.02


@pytest.mark.parametrize("name", full_size.MODELS)
def test_windows_of_every_family_cost_what_they_take(name):
    assert_priced(priced(name), {size: full_size.operations(name, *size) for size in ((32, 32), (256, 256))})


@pytest.mark.parametrize("name, text", [("SD 3.5 medium", 333), ("Wan 2.1 1.3B", 64), ("Z-Image", 32), ("SDXL", 231)])
def test_a_longer_or_shorter_prompt_is_paid_by_every_window(name, text):
    assert_priced(priced(name, text=text), {size: full_size.operations(name, *size, text=text) for size in ((32, 32), (96, 64))})


@pytest.mark.parametrize("name", ["FLUX.2-dev", "Z-Image"])
def test_a_reference_that_is_not_cut_is_paid_whole_by_every_window(name):
    references = ((64, 48),)
    assert_priced(priced(name, references=references), {size: full_size.operations(name, *size, references=references) for size in ((32, 32), (96, 64))})


def test_a_reference_of_the_canvas_size_is_cut_to_the_window():
    sizes = (32, 32), (96, 64)
    assert_priced(priced("FLUX.1-dev", (128, 128), references=((128, 128),)), {size: full_size.operations("FLUX.1-dev", *size, references=(size,)) for size in sizes})


@pytest.mark.parametrize("name, shape, windows", [
    ("flux_schnell", (1, 16, 256, 256), 4), ("flux_schnell", (3, 16, 256, 256), 2), ("wan21_t2v", (1, 16, 3, 256, 256), 2), ("flux2", (1, 128, 128, 128), 1)])
def test_so_many_windows_fill_a_device_as_have_the_pixels_of_one_of_1024_px(name, shape, windows):
    """Of 64 x 64 cells: of all images of a batch, and of all frames of a video, whose latents have a frame each."""
    assert windows_that_fill(Rect(0, 0, 64, 64), load(name).patcher.model, torch.zeros(shape)) == windows


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_every_family_are_found(name):
    network = load(name).patcher.model.diffusion_model
    work = network_work(network, 1)
    assert work.patch > 0 and work.attention > 0 and work.text > 0
    # In UNets, Wan and LTX-Video the text is looked at and does not go on.
    assert (work.looking > 0) == name.startswith(("sd15", "sdxl", "wan", "ltxv"))


def test_a_network_without_known_blocks_costs_as_a_middling_transformer():
    assert Work().cost(2, 3, 77, 2048) == WindowCost(2, 3, 77, 2048)
    assert network_work(torch.nn.Sequential(torch.nn.Linear(8, 8)), 8).cost(1, 1, 0, 8) == WindowCost(1, 1, 0, 8)


def test_prices_of_many_windows_at_once_are_those_of_each():
    cost, sides = priced("SDXL"), torch.tensor([8, 12, 64, 200])
    assert cost.of(sides, sides.flip(0)).tolist() == [pytest.approx(cost.of(height, width)) for height, width in zip(sides.tolist(), sides.flip(0).tolist())]


def test_a_run_over_a_photo_takes_what_was_planned():
    full, tree = full_size.MODELS["Lumina 2"], plans.photo_tree("coffee", 1024, 0.4, 32, 256)
    height, width = tree.height // full.px, tree.width // full.px
    run = plans.planned_run(tree, cost=priced("Lumina 2", (height, width)), sizes=window_sizes(32, 64, 8, 2))
    taken = lambda plan: sum(full_size.operations("Lumina 2", *sorted((window.rect.height, window.rect.width))) for window in plan.windows)
    assert sum(map(taken, run.plans)) / (len(run.plans) * taken(run.grid)) == pytest.approx(run.cost, rel=0.01)


class OfNewerHosts:
    """As ComfyUI after 0.30 asks: attention is chosen for each patcher, and with it what it needs."""

    def __init__(self, profile: bool | None = None):
        self.current_patcher = self
        self.model_options = {} if profile is None else {"optimized_attention_memory_efficient": profile}


class AsksTheModel(OfNewerHosts):
    def memory_required(self, input_shape, cond_shapes={}, memory_efficient_attention=None):
        return input_shape, cond_shapes, memory_efficient_attention


class AsksThePatcher(OfNewerHosts):
    class Patcher:
        model_options: dict = {}

        def memory_required(self, input_shape, cond_shapes):
            return "patcher", input_shape, cond_shapes

    def __init__(self):
        self.current_patcher = self.Patcher()


@pytest.mark.parametrize("profile", [None, True, False])
def test_the_estimate_is_for_the_attention_that_the_patcher_has(profile):
    assert _memory_required(AsksTheModel(profile), [1, 2], {"a": 3}) == ([1, 2], {"a": 3}, profile)


def test_the_estimate_is_asked_of_the_patcher_where_that_knows_conditionings():
    assert _memory_required(AsksThePatcher(), [1, 2], {"a": 3}) == ("patcher", [1, 2], {"a": 3})


def test_this_hosts_estimate_is_what_its_sampler_asks_for():
    model = load("flux_dev").patcher.model
    shapes = {"c_crossattn": [[1, 64, 64]]}
    assert _memory_required(model, [2, 16, 32, 32], shapes) == model.memory_required([2, 16, 32, 32], cond_shapes=shapes) > 0

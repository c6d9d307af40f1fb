"""What does a run cost? Counts only: planned tokens, cells at the model, plans, operations, bytes. No clock."""
from __future__ import annotations

import time

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from conftest import ROOT, load_module
from counting import Operations, step_bytes
from sampling import calls_of, even_tree, load, patched, sample, striped_tree, with_prediction

from qtd_pack import sampling_run
from qtd_pack.quadtree import Leaf, Quadtree
from qtd_pack.utils import Rect
from qtd_pack.model_facts import window_cost
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion
from qtd_pack.blending import plan_blend
from qtd_pack.windows import WindowCost, full_grid, plan_windows, window_sizes

plans = load_module("qtd_plans", ROOT / "benchmarks" / "plans.py")

FLUX = "flux_schnell"
STEPS = 20


@pytest.fixture
def model():
    return load(FLUX)


def checkered_tree(side: int, leaf: int = 64) -> Quadtree:
    """side x side leaves of strengths 0, 0.25, 0.5, 0.75 and 1 in turn."""
    rects = [Rect(row * leaf, col * leaf, (row + 1) * leaf, (col + 1) * leaf) for row in range(side) for col in range(side)]
    leaves = tuple(Leaf(rect, leaf, 0.0, (rect.top // leaf * 2 + rect.left // leaf) % 5 / 4) for rect in rects)
    return Quadtree(side * leaf, side * leaf, leaf, leaf, leaves)


def shapes_seen(model, patcher, **options) -> list[tuple[int, ...]]:
    """The shapes of x at each call of the model."""
    shapes = []
    sample(model, with_prediction(patcher, lambda x, sigma: shapes.append(tuple(x.shape)) or 0.5 * x), **options)
    return shapes


def watched_run(model, patcher, **options):
    """The state of the patch after a run."""
    calls = []
    clone = patcher.clone()

    def keep(executor, guider, sigmas, extra_args, *args, **kwargs):
        calls.append(extra_args["model_options"]["transformer_options"][KEY])
        return executor(guider, sigmas, extra_args, *args, **kwargs)

    clone.add_wrapper_with_key("sampler_sample", "watched_run", keep)
    sample(model, clone, **options)
    return calls[0].runs[-1]


@pytest.mark.parametrize("least, budget, most", [(256, 0.25, 0.24), (256, 0.4, 0.40), (256, 0.6, 0.62), (512, 0.25, 0.27), (512, 0.4, 0.43), (512, 0.6, 0.68)])
def test_eight_photos_by_one_threshold_cost_on_average_at_most_and_none_more_than_in_squares(least, budget, most):
    trees = [plans.threshold_tree(name, 2048, budget) for name in plans.PHOTOS]
    tight, squares = ([plans.planned_run(tree, sizes=plans.sizes_px(least, 1024, shapes=shapes)).cost for tree in trees] for shapes in ("tight", "square"))
    assert sum(tight) / len(trees) <= most
    assert all(one <= other for one, other in zip(tight, squares))


def test_a_picture_of_4096_px_with_4096_leaves_is_planned_within_50_ms():
    active = (torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < 0.5).repeat_interleave(8, 0).repeat_interleave(8, 1)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        plan_windows(active, plans.sizes_px(256, 1024), plans.FLUX_DEV)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


def compiled_by_the_host(patcher, monkeypatch):
    set_torch_compile_wrapper(patcher, backend="eager")


def compiled_block(patcher, monkeypatch):
    """As Module.compile leaves it; the network is shared with other tests."""
    block = patcher.model.diffusion_model.double_blocks[0]
    monkeypatch.setattr(block, "_compiled_call_impl", torch.compile(block._call_impl, backend="eager"))


@pytest.mark.parametrize("compiled", [compiled_by_the_host, compiled_block])
@pytest.mark.parametrize("shapes", ["tight", "square"])
def test_a_compiled_model_has_square_windows_by_itself(monkeypatch, compiled, shapes):
    tiny = load(FLUX)
    settings = TiledDiffusion(striped_tree(0.0, 1.0, leaf=128), min_window=64, max_window=128, tile_overlap=16, window_shapes=shapes)
    step = lambda patcher: watched_run(tiny, with_prediction(settings.patched(patcher), lambda x, sigma: x), steps=1).facts.sizes.step
    assert step(tiny.patcher) == (8 if shapes == "tight" else 0)
    patcher = tiny.patcher.clone()
    compiled(patcher, monkeypatch)
    assert step(patcher) == 0


@pytest.mark.parametrize("budget", plans.BUDGETS)
def test_a_run_has_at_most_24_shapes_of_windows(budget):
    for name in plans.PHOTOS:
        run = plans.planned_run(plans.photo_tree(name, 2048, budget), sizes=plans.sizes_px(512, 1024))
        assert len({(window.rect.height, window.rect.width) for plan in run.plans for window in plan.windows}) <= 24


def test_at_equal_cost_the_best_trees_redraw_more_than_one_threshold_in_square_windows():
    old, new = plans.pairs(budgets=(0.1, 0.2, 0.3, 0.5, 0.7, 0.9)).values()
    assert all(plans.at_cost(new, cost) > 1.02 * content for cost, content in old[:-1])
    assert plans.at_cost(new, old[-1][0]) >= old[-1][1]


@pytest.mark.parametrize("name", plans.PHOTOS)
def test_no_photo_costs_more_than_the_full_grid_at_any_budget(name):
    costs = [plans.planned_run(plans.photo_tree(name, 2048, budget)).cost for budget in (0.05, *plans.BUDGETS, 0.8, 1.0)]
    assert costs == sorted(costs)
    assert costs[0] < 0.15 and costs[-1] <= 1 + 1e-9


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
@pytest.mark.parametrize("cfg, rows", [(1.0, 1), (4.0, 2)])
def test_the_model_sees_as_many_cells_as_were_planned_for_a_photo(model, name, cfg, rows):
    tree = plans.photo_tree(name, 512, 0.4, min_leaf=32, max_leaf=256)
    settings = dict(min_window=64, max_window=256, tile_overlap=16)
    shapes = shapes_seen(model, TiledDiffusion(tree, **settings).patched(model.patcher), size=(tree.height, tree.width), steps=STEPS, cfg=cfg)
    conds = [[{"model_conds": {"c_crossattn": torch.nn.Module()}}]]
    conds[0][0]["model_conds"]["c_crossattn"].cond = torch.zeros(1, 64, 64)
    cost = window_cost(model.patcher.model, conds, model.latent_shape(tree.height, tree.width))
    planned = plans.planned_run(tree, steps=STEPS, sizes=window_sizes(8, 32, 2, 2, step=8), cost=cost)
    assert sum(shape[0] * shape[-2] * shape[-1] for shape in shapes) == rows * planned.cells
    assert planned.cost < 0.7


@pytest.mark.parametrize("height, width", [(2048, 2048), (2048, 1360), (1000, 776)])
def test_full_strength_costs_no_more_than_a_plain_grid_of_the_largest_windows(height, width):
    run = plans.planned_run(even_tree(1.0, height, width))
    assert run.cost <= 1 + 1e-9
    assert len({plan.windows for plan in run.plans}) == 1


def test_one_window_costs_what_plain_sampling_costs(model):
    patcher = patched(model, even_tree(1.0), min_window=1024, max_window=1024)
    counts = []
    for candidate in (model.patcher.clone(), patcher):
        with calls_of(candidate) as shapes:
            sample(model, candidate, cfg=4.0)
        counts.append(shapes)
    assert counts[0] == counts[1] == [(2, 16, 32, 32)] * 4


def test_cost_grows_in_proportion_to_the_area_up_to_16384_px():
    cost, sizes = plans.FLUX_DEV, window_sizes(64, 128, 8, 2)
    costs = {}
    for cells in (512, 2048):
        active = (torch.arange(cells)[:, None] // 64 + torch.arange(cells) // 64) % 2 == 0
        plan = plan_windows(active, sizes, cost)
        blend = plan_blend("Mixture of Diffusers", plan, sizes.overlap, torch.device("cpu"))
        assert bool((blend.total[active] > 0).all())
        costs[cells] = plan.cost
        assert plan.cost <= full_grid(cells, cells, sizes, cost).cost
    assert 15 < costs[2048] / costs[512] < 17


@pytest.mark.parametrize("schedule, most", [("img2img", 4), ("blend", 1), ("ramp", 1)])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_sde"])
def test_plans_are_made_once_for_each_set_of_active_leaves(model, monkeypatch, schedule, most, sampler):
    made = []
    real = sampling_run.plan_windows
    monkeypatch.setattr(sampling_run, "plan_windows", lambda *args: made.append(args[-1]) or real(*args))
    patcher = with_prediction(patched(model, striped_tree(0.25, 0.5, 0.75, 1.0, leaf=64), schedule=schedule), lambda x, sigma: 0.5 * x)
    sample(model, patcher, steps=STEPS, sampler=sampler)
    assert 1 <= len(made) <= most


def test_spotdiffusion_plans_once_for_each_set_and_each_shift(model, monkeypatch):
    made = []
    real = sampling_run.plan_windows
    monkeypatch.setattr(sampling_run, "plan_windows", lambda *args: made.append(args[-1]) or real(*args))
    patcher = with_prediction(patched(model, even_tree(1.0), method="SpotDiffusion", shift_method="sorted"), lambda x, sigma: 0.5 * x)
    sample(model, patcher, steps=STEPS, sampler="heun")
    assert len(made) == len(set(made)) <= STEPS


def test_the_run_keeps_account_of_what_it_planned(model):
    tree = plans.photo_tree("coffee", 512, 0.4, min_leaf=32, max_leaf=256)
    patcher = with_prediction(TiledDiffusion(tree, min_window=64, max_window=256, tile_overlap=16).patched(model.patcher), lambda x, sigma: 0.5 * x)
    run = watched_run(model, patcher, size=(tree.height, tree.width), steps=STEPS)
    planned = plans.planned_run(tree, steps=STEPS, sizes=run.facts.sizes, cost=run.facts.cost_of)
    assert run.ledger.cost / run.ledger.grid_cost == pytest.approx(planned.cost)


@pytest.mark.parametrize("family, expected", [
    ("flux_schnell", WindowCost(2, 1, 64, 128)),
    # One reference of the picture's size is cut, so a window counts double; the other, 12 x 8 cells, passes whole.
    ("flux_kontext", WindowCost(2, 2, 64 + 24, 128)),
    # The host pads its text to 512 tokens. Gated, three times as wide inside: 4 c^2 weights for attention and 9 c^2 behind it.
    ("flux2", WindowCost(1, 1, 512, 128, 13 / 2)),
    # 6 c^2 weights for attention to patches and text and 2 c^2 behind it, as this small one is c wide inside; looking at
    # 64 tokens is as c^2 more, since c is 128. A token of text passes 2 c^2.
    ("wan21_t2v", WindowCost(2, 3, 64, 128, 9 / 2, 2 / 9, False)),
])
def test_a_window_costs_what_its_family_needs(family, expected):
    tiny = load(family)
    run = watched_run(tiny, with_prediction(patched(tiny, even_tree(1.0)), lambda x, sigma: x), steps=1)
    assert run.facts.cost_of == expected


def free_bytes(monkeypatch, model, windows: float):
    """Let the host find as much free memory as it wants for so many windows of 20 x 20 cells with cond and uncond."""
    needed = model.patcher.model.memory_required([2, 16, 20, 20]) * 1.5
    asked = []
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: asked.append(args) or windows * needed + 1)
    return asked


@pytest.mark.parametrize("windows, batches", [(1, [2, 2, 2, 2]), (2, [4, 4]), (3.5, [6, 2]), (100, [8])])
def test_as_many_windows_run_at_once_as_the_host_would_with_cond_and_uncond_together(model, monkeypatch, windows, batches):
    free_bytes(monkeypatch, model, windows)
    shapes = shapes_seen(model, patched(model, even_tree(1.0), min_window=128, max_window=128), steps=1, cfg=4.0)
    assert [shape[0] for shape in shapes] == batches


def test_memory_is_asked_for_once_per_shape_and_run_beside_the_hosts_own_questions(model, monkeypatch):
    patcher = with_prediction(patched(model, even_tree(1.0), min_window=128, max_window=128), lambda x, sigma: x)
    asked = free_bytes(monkeypatch, model, 100)
    before_and_after = []
    for steps in (2, 12):
        asked.clear()
        sample(model, patcher, steps=steps, cfg=4.0)
        before_and_after.append(len(asked))
    # The host asks once for each of its batches.
    assert before_and_after[1] - before_and_after[0] == 10


def step_operations(model, tree, **settings):
    """Counts of the operations of one step, the model's left out: of two runs, the longer less the shorter."""
    counts = []
    for steps in (4, 5):
        patcher = with_prediction(patched(model, tree, schedule="blend", **settings), lambda x, sigma: x)
        with Operations() as operations:
            sample(model, patcher, size=(tree.height, tree.width), steps=steps)
        counts.append(operations.calls)
    counts[1].subtract(counts[0])
    return {name: count for name, count in counts[1].items() if count}


def test_a_step_takes_as_many_operations_for_256_leaves_as_for_16(model):
    few = step_operations(model, checkered_tree(4, leaf=128), min_window=512, max_window=512)
    many = step_operations(model, checkered_tree(16, leaf=32), min_window=512, max_window=512)
    assert few == many


def test_windows_read_no_value_back_from_the_device(model):
    few = step_operations(model, even_tree(1.0, 512, 512), min_window=256, max_window=256, tile_batch_size=1)
    many = step_operations(model, even_tree(1.0, 512, 512), min_window=64, max_window=64, tile_batch_size=1)
    assert many["aten.addcmul_.default"] == 64 and few["aten.addcmul_.default"] == 4
    for name in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.equal.default"):
        assert many.get(name, 0) == few.get(name, 0), name


def test_memory_follows_the_window():
    """A step at 4096 px, beyond what the sampler holds: one window batch and three latents, to 10 %."""
    model = load(FLUX)
    latent_bytes = 4 * 16 * 512 * 512
    tree = striped_tree(1.0, *[0.0] * 7, leaf=512, height=4096)
    batch = step_bytes(model, model.patcher, 576)
    whole = step_bytes(model, patched(model, tree, min_window=512, max_window=512, tile_overlap=32, tile_batch_size=1), 4096)
    assert whole <= 1.1 * (batch + 3 * latent_bytes)
    # Without the patch the canvas is the batch: the bound means something.
    assert batch * 40 > 5 * (batch + 3 * latent_bytes)

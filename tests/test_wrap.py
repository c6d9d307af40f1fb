"""Pictures that go on over their border: windows lie over it, and everything that they are given goes on there."""
from __future__ import annotations

from dataclasses import replace

import comfy.sample
import echo_patches
import pytest
import test_conditioning as conditioning
import test_control as control
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_hooks import ConditioningSetDefaultAndCombine
from conftest import ROOT, load_module
from nodes import ConditioningSetMask
from sampling import SIDE_PX, calls_of, even_tree, load, patched, sample, striped_tree, with_prediction
from seen import HEIGHT_PX, WIDTH_PX, assert_windows_see_their_part, denoised, tiled
from tiny_controls import echo_gligen, echoed, picture
from tiny_models import drawer, recorded
from tiny_models import with_prediction as with_call

from qtd_pack.canvas import Canvas
from qtd_pack.utils import Rect, cut, parts_in_window, pieces
from qtd_pack.conditioning import RULES_OF_CONDS
from qtd_pack.cover import Axis, _quiet_place
from qtd_pack.denoise_schedule import eased
from qtd_pack.nodes import QuadtreeTiledDiffusion
from qtd_pack.tiled_diffusion import KEY, TiledDiffusion
from qtd_pack.blending import METHODS, plan_blend
from qtd_pack.windows import WRAPS, WindowCost, WindowSizes, full_grid, plan_windows

FLUX = "flux_schnell"
BOTH, ACROSS = WRAPS["both"], WRAPS["horizontal"]
every_method = pytest.mark.parametrize("method", METHODS)
every_wrap = pytest.mark.parametrize("wrap", ["horizontal", "both"])
every_batching = pytest.mark.parametrize("tiling", [
    dict(tile_batch_size=1), dict(tile_batch_size=3), dict(), dict(min_window=64), dict(method="SpotDiffusion", tile_batch_size=2),
], ids=["1 window", "3 windows", "all windows", "two sizes", "without overlap"])


@pytest.fixture
def model():
    return load(FLUX)


# Windows.


def speckled(seed: int, height: int, width: int, share: float) -> torch.Tensor:
    blocks = torch.rand(-(-height // 2), -(-width // 2), generator=torch.Generator().manual_seed(seed)) < share
    return blocks.repeat_interleave(2, 0).repeat_interleave(2, 1)[:height, :width]


PLANS = [
    (height, width, WindowSizes(sides, overlap, wraps, step), share, offset)
    for height, width in ((16, 16), (23, 37), (64, 48), (8, 8), (9, 5), (2, 50), (12, 30))
    for sides, overlap, step in (((4, 8), 2, 0), ((4, 8, 16), 2, 0), ((8,), 4, 0), ((6, 12), 0, 0), ((4, 8, 16), 2, 4), ((6, 12), 0, 6), ((8,), 4, 2))
    for wraps in (BOTH, ACROSS)
    for share, offset in ((0.1, None), (0.5, None), (1.0, None), (1.0, (2, 6)))
]
every_plan = pytest.mark.parametrize("height, width, sizes, share, offset", PLANS)


@every_plan
def test_every_active_cell_of_a_ring_lies_in_one_core_with_its_overlap_around_it(height, width, sizes, share, offset):
    active = speckled(3, height, width, share)
    plan = plan_windows(active, sizes, WindowCost(2, 1, 0, 64), offset)
    seen = torch.zeros(height, width)
    for window in plan.windows:
        core, rect = window.core, window.rect
        for here, _ in pieces(core, height, width):
            seen[here.top:here.bottom, here.left:here.right] += 1
        for wraps, length, (start, end), (first, last) in zip(
                sizes.wraps, (height, width), ((rect.top, rect.bottom), (rect.left, rect.right)), ((core.top, core.bottom), (core.left, core.right))):
            assert end <= length and end - start <= length and start <= first < last <= end
            assert start >= 0 or (wraps and start > -length)
            # A window as long as the ring has what is left of it around its core, on both sides alike, but for the patch.
            around = min(sizes.overlap, (length - (last - first)) // 2 - 1) if wraps else 0
            assert min(first - start, end - last) >= around
    assert seen.max() <= 1
    assert bool((seen[active] == 1).all())


@every_plan
@every_method
def test_weights_on_a_ring_sum_to_1_on_every_active_cell(height, width, sizes, share, offset, method):
    active = speckled(9, height, width, share)
    plan = plan_windows(active, sizes, WindowCost(2, 1, 0, 64), offset)
    blend = plan_blend(method, plan, sizes.overlap, torch.device("cpu"))
    total = torch.zeros(height, width)
    for window in plan.windows:
        weight = blend.weight_of(window, total)
        for here, there in pieces(window.rect, height, width):
            total[here.top:here.bottom, here.left:here.right] += weight[there.top:there.bottom, there.left:there.right]
    assert torch.allclose(total[active], torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("length, side, overlap, expected", [
    # Length of the ring, side and overlap of a window, and where the windows along it begin and end.
    (32, 16, 2, [(-18, 2), (-2, 18)]),
    (24, 8, 2, [(-10, 2), (-2, 10), (6, 18)]),
    (16, 16, 2, [(-12, 4), (-4, 12)]),
    (8, 16, 2, [(-6, 2), (-2, 6)]),
    (16, 16, 0, [(0, 16)]),
])
def test_windows_along_a_ring_are(length, side, overlap, expected):
    plan = full_grid(4, length, WindowSizes((side,), overlap, ACROSS), WindowCost())
    assert sorted((window.rect.left, window.rect.right) for window in plan.windows) == expected


def test_no_cell_of_a_ring_is_only_seen_at_a_windows_edge():
    """Each cell of a wholly active ring has a window that sees at least the overlap, or a quarter of the ring, on both its sides."""
    for length in (8, 10, 16, 20, 26, 40, 66):
        plan = plan_windows(torch.ones(length, length, dtype=torch.bool), WindowSizes((8, 16), 4, BOTH), WindowCost())
        best = torch.zeros(length)
        for window in plan.windows:
            for place in range(window.rect.left, window.rect.right):
                depth = min(place - window.rect.left, window.rect.right - 1 - place)
                best[place % length] = max(best[place % length], depth)
        assert best.min() >= min(4, length // 4)


def test_a_ring_has_no_beginning():
    """The plan of what is moved along costs the same, if it is moved by whole windows of the smallest size."""
    active = speckled(5, 48, 64, 0.15)
    sizes = WindowSizes((4, 8), 2, BOTH)
    costs = {plan_windows(active.roll((down, across), (0, 1)), sizes, WindowCost()).cost for down, across in ((0, 0), (8, 0), (16, 40), (24, 56))}
    assert max(costs) == pytest.approx(min(costs))


def test_what_lies_on_the_border_of_a_ring_takes_one_window():
    active = torch.zeros(16, 32, dtype=torch.bool)
    active[4:8, :2] = active[4:8, -2:] = True
    (window,) = plan_windows(active, WindowSizes((4, 8), 2, ACROSS), WindowCost()).windows
    assert (window.rect, window.core) == (Rect(2, -4, 10, 4), Rect(4, -2, 8, 2))
    assert len(plan_windows(active, WindowSizes((4, 8), 2), WindowCost()).windows) == 2


@pytest.mark.parametrize("rect", [Rect(-3, -2, 4, 5), Rect(1, -6, 4, 1), Rect(2, 3, 5, 8), Rect(-5, 0, 0, 8)])
def test_pieces_are_what_is_cut(rect):
    value = torch.arange(5 * 8).view(1, 5, 8)
    found = torch.full((1, rect.height, rect.width), -1)
    for here, there in pieces(rect, 5, 8):
        found[..., there.top:there.bottom, there.left:there.right] = value[..., here.top:here.bottom, here.left:here.right]
    assert torch.equal(cut(value, rect), found)
    assert torch.equal(found, value.repeat(1, 2, 2)[..., 5 + rect.top:5 + rect.bottom, 8 + rect.left:8 + rect.right])


@pytest.mark.parametrize("place, window, expected", [
    # Columns of a place and of a window on a canvas of 10, and where the window shows which columns of the place.
    ((2, 8), (-3, 4), [((0, 1), (5, 6)), ((5, 7), (0, 2))]),
    ((0, 10), (-3, 4), [((0, 7), (-3, 4))]),
    ((0, 9), (-3, 4), [((0, 2), (7, 9)), ((3, 7), (0, 4))]),
    ((1, 5), (-3, 4), [((4, 7), (0, 3))]),
    ((-4, 2), (-3, 4), [((3, 5), (0, 2))]),
    ((8, 30), (-3, 4), [((1, 3), (0, 2))]),
    ((5, 7), (-3, 4), []),
    ((20, 30), (-3, 4), []),
    ((3, 9), (2, 8), [((1, 6), (0, 5))]),
    ((0, 10), (2, 8), [((0, 6), (2, 8))]),
])
def test_a_place_in_a_window_over_the_border(place, window, expected):
    found = parts_in_window(Rect(1, place[0], 5, place[1]), Rect(0, window[0], 6, window[1]), (6, 10))
    assert [((seen.left, seen.right), (own.left, own.right)) for seen, own in found] == expected
    assert all((seen.top, seen.bottom, own.top, own.bottom) == (1, 5, 0, 4) for seen, own in found)


@pytest.mark.parametrize("wraps", [BOTH, ACROSS])
def test_strengths_ease_over_the_border(wraps):
    strength = torch.rand(12, 20, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    moved = eased(strength.roll((5 * wraps[0], 7), (0, 1)), 4, wraps).roll((-5 * wraps[0], -7), (0, 1))
    assert torch.equal(eased(strength, 4, wraps), moved)
    assert not torch.equal(eased(strength, 4), moved)


def test_easing_reaches_round_a_ring_that_is_shorter():
    assert torch.equal(eased(torch.tensor([[1.0, 0.0, 1.0]]), 4, BOTH), torch.tensor([[0.25, 0.0, 0.25]]))


# The run.


def step_over(values: torch.Tensor, dim: int) -> tuple[float, float]:
    """The mean step over the wrap, and the largest mean step between two lines inside."""
    steps = (values - values.roll(1, dim)).abs().movedim(dim, 0).flatten(1).mean(1)
    return float(steps[0]), float(steps[1:].max())


def places_of_window(x: torch.Tensor, sigma) -> torch.Tensor:
    """A network that answers with the place in its window: nothing of it fits together over a border."""
    height, width = x.shape[-2:]
    return (torch.linspace(-1, 1, width) + torch.linspace(-1, 1, height)[:, None]).expand(x.shape).contiguous()


def blurred_with_zeros(x: torch.Tensor, sigma) -> torch.Tensor:
    """A convolutional network that takes what lies beyond its window for 0."""
    return torch.nn.functional.avg_pool2d(x, 5, 1, 2) + 1


def blurred_round(x: torch.Tensor, sigma) -> torch.Tensor:
    """A convolutional network that takes its window for a ring."""
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (2, 2, 2, 2), mode="circular"), 5, 1)


SIZES = [(256, 256), (200, 504), (128, 128), (96, 200)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("predict", [places_of_window, blurred_with_zeros])
@pytest.mark.parametrize("method", METHODS[:2])
@every_wrap
def test_the_step_over_the_wrap_is_at_most_that_inside(model, height, width, predict, method, wrap):
    def run(wrap):
        tree = patched(model, even_tree(1.0, height, width), method=method, wrap=wrap)
        latent = torch.ones(1, 16, height // 8, width // 8)
        noise = torch.zeros_like(latent) if predict is blurred_with_zeros else None
        out = sample(model, with_prediction(tree, predict), latent, size=(height, width), noise=noise)
        return model.patcher.model.process_latent_in(out)
    for dim in (-1,) if wrap == "horizontal" else (-1, -2):
        over, inside = step_over(run(wrap), dim)
        assert over <= inside * 1.02 + 1e-6
        if predict is places_of_window:
            assert step_over(run("none"), dim)[0] > 1.9


@every_wrap
def test_spot_diffusion_moves_the_step_away_from_the_wrap(model, wrap):
    """Its windows meet somewhere, but at every step somewhere else, of which the wrap is one place of eight."""
    settings = dict(method="SpotDiffusion", min_window=128, max_window=128, wrap=wrap)
    over = [0, 0]
    for seed in range(8):
        out = sample(model, with_prediction(patched(model, even_tree(1.0), seed=seed, **settings), places_of_window), torch.ones(1, 16, 32, 32), steps=2)
        for index, dim in enumerate((-1, -2)):
            step, inside = step_over(model.patcher.model.process_latent_in(out), dim)
            over[index] += step > inside / 2
            assert step <= inside * 1.001 or (dim == -2 and wrap == "horizontal")
    assert over[0] <= 3
    assert over[1] <= 3 or wrap == "horizontal"


@every_method
@every_wrap
@pytest.mark.parametrize("height, width", [(256, 256), (408, 536), (104, 200)])
def test_a_model_that_answers_cell_by_cell_leaves_no_seam_on_a_ring(model, method, wrap, height, width):
    tree = patched(model, even_tree(1.0, height, width), method=method, wrap=wrap)
    latent = model.latent(height, width)
    out = sample(model, with_prediction(tree, lambda x, sigma: torch.tanh(3 * x)), latent, size=(height, width))
    plain = sample(model, with_prediction(model.patcher, lambda x, sigma: torch.tanh(3 * x)), latent, size=(height, width))
    assert (out - plain).abs().max() < 1e-5


def test_windows_of_a_network_that_wraps_agree_with_it_as_well_over_the_wrap_as_inside(model):
    latent = model.latent(SIDE_PX, SIDE_PX)
    plain = sample(model, with_prediction(model.patcher, blurred_round), latent, steps=2)
    error = (sample(model, with_prediction(patched(model, even_tree(1.0), wrap="both", min_window=128), blurred_round), latent, steps=2) - plain).abs().mean((0, 1))
    whole = (sample(model, with_prediction(patched(model, even_tree(1.0), min_window=128), blurred_round), latent, steps=2) - plain).abs().mean((0, 1))
    near = torch.zeros(32, 32, dtype=torch.bool)
    near[:3] = near[-3:] = near[:, :3] = near[:, -3:] = True
    # Windows meet at the middle, too: there the error is of the same size.
    middle = near.roll((16, 16), (0, 1))
    assert error[near].mean() == pytest.approx(float(error[middle].mean()), rel=0.25)
    assert error[near].mean() < whole[near].mean() / 3


@every_method
@every_wrap
def test_a_picture_that_is_moved_along_comes_out_moved_along(method, wrap):
    """Windows of a real network over the border see what they would see inside: the picture moved by half its length has it there."""
    model = load("flux_schnell")
    settings = dict(method=method, wrap=wrap, min_window=128, max_window=128, shift_method="sorted")
    latent = model.latent(SIDE_PX, SIDE_PX)
    noise = comfy.sample.prepare_noise(latent, 5)
    shift = (16 if wrap == "both" else 0, 16)
    out = sample(model, patched(model, even_tree(1.0), **settings), latent, noise=noise)
    moved = sample(model, patched(model, even_tree(1.0), **settings), latent.roll(shift, (-2, -1)), noise=noise.roll(shift, (-2, -1)))
    assert (moved.roll([-by for by in shift], (-2, -1)) - out).abs().max() < 1e-4
    plain = sample(model, patched(model, even_tree(1.0), **settings | {"wrap": "none"}), latent, noise=noise)
    assert (plain - out).abs().max() > 0.01


@pytest.mark.parametrize("name, method, wrap", [
    *((FLUX, method, "both") for method in METHODS), ("wan21_t2v", METHODS[0], "horizontal"), ("sd15", "SpotDiffusion", "both"),
    ("qwen_image", METHODS[1], "both"), ("ltxv", METHODS[0], "both"),
])
def test_kept_cells_are_exact_and_batches_and_frames_are_sampled_on_a_ring(name, method, wrap):
    model = load(name)
    height, width = 33 * model.cell_px, 40 * model.cell_px
    latent = torch.cat([model.latent(height, width, seed=1), model.latent(height, width, seed=2)])
    noise = comfy.sample.prepare_noise(latent, 5)
    tree = striped_tree(1.0, 0.0, 0.5, 0.0, 1.0, leaf=8 * model.cell_px, height=height)
    sizes = {key: cells * model.cell_px for key, cells in (("min_window", 8), ("max_window", 16), ("tile_overlap", 2))}
    settings = TiledDiffusion(tree, method=method, wrap=wrap, **sizes)
    together = sample(model, settings.patched(model.patcher), latent, size=(height, width), noise=noise, steps=2, cfg=3.0)
    for start in (8, 24):
        assert torch.equal(together[..., start:start + 8], latent[..., start:start + 8])
    changed = (together - latent).abs().amax((0, 1) if latent.ndim == 4 else (0, 1, 2))
    assert changed[:, [0, 3, 36, 39]].min() > 0.1
    for row in range(2):
        alone = sample(model, settings.patched(model.patcher), latent[row:row + 1], size=(height, width), noise=noise[row:row + 1], steps=2, cfg=3.0)
        assert (together[row:row + 1] - alone).abs().max() < 1e-3


def test_strengths_of_a_run_ease_over_the_border(model):
    """Left and right border meet: 1 on the left eases towards 0 on the right."""
    latent = model.latent(SIDE_PX, SIDE_PX)
    towards = lambda x, sigma: torch.zeros_like(x)
    changed = {}
    for wrap in WRAPS:
        out = sample(model, with_prediction(patched(model, striped_tree(1.0, 0.0), wrap=wrap, schedule="blend"), towards), latent)
        assert torch.equal(out[..., 16:], latent[..., 16:])
        share = 1 - model.patcher.model.process_latent_in(out) / model.patcher.model.process_latent_in(latent)
        changed[wrap] = share.mean((0, 1))[:, :16]
    assert changed["none"][:, 0].min() > 0.95 * changed["none"][:, 8].min()
    for wrap in ("horizontal", "both"):
        assert torch.allclose(changed[wrap], changed[wrap].flip(1), atol=1e-3)
        assert changed[wrap][:, 0].max() < 0.8 * changed[wrap][:, 8].min()


def test_none_is_as_ever_and_one_window_is_plain_sampling_bit_for_bit(model):
    assert TiledDiffusion(even_tree(1.0)).wrap == "none"
    window = dict(min_window=1024, max_window=1024)
    assert torch.equal(sample(model, patched(model, even_tree(1.0), wrap="none", **window)), sample(model, model.patcher))


def test_a_window_as_long_as_the_picture_meets_itself_in_another_one(model):
    patcher = patched(model, even_tree(1.0), wrap="horizontal", min_window=1024, max_window=1024, tile_batch_size=1)
    with calls_of(patcher) as shapes:
        sample(model, patcher, steps=3)
    assert shapes == [(1, 16, 32, 32)] * 2 * 3


def test_spot_diffusion_needs_no_more_windows_wherever_its_grid_is(model):
    counts = {}
    for wrap in WRAPS:
        patcher = patched(model, even_tree(1.0), method="SpotDiffusion", wrap=wrap, min_window=128, max_window=128, tile_batch_size=1)
        with calls_of(patcher) as shapes:
            sample(model, patcher, steps=6)
        counts[wrap] = len(shapes)
    assert counts["both"] == 4 * 6
    assert counts["both"] < counts["horizontal"] < counts["none"]


def test_a_wrap_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="wrap: expected one of none, horizontal, both, got 'vertical'"):
        TiledDiffusion(even_tree(1.0), wrap="vertical")


def test_the_input_is_rare_and_graphs_without_it_run_as_ever(model):
    schema = QuadtreeTiledDiffusion.define_schema()
    (wrap,) = (entry for entry in schema.inputs if entry.id == "wrap")
    assert (wrap.default, list(wrap.options), wrap.optional, wrap.advanced) == ("none", ["none", "horizontal", "both"], True, True)
    settings = {entry.id: entry.default for entry in schema.inputs if entry.id not in ("model", "quadtree", "original", "sigmas", "wrap")}
    old = QuadtreeTiledDiffusion.execute(model.patcher, even_tree(1.0), **settings).args[0]
    (wrapper,) = old.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    assert wrapper.__self__.wrap == "none"


def test_a_trained_model_that_does_not_wrap_leaves_no_line_over_the_wrap():
    """The demo's model at strength 1. What it makes of the picture moved along, in one window, has no border at the wrap."""
    quality = load_module("qtd_quality", ROOT / "benchmarks" / "quality.py")
    painter, half = quality.load_painter(), 16
    settings = TiledDiffusion(even_tree(1.0), min_window=128, max_window=128)
    lines = torch.zeros(2, 32, 32, dtype=torch.bool)
    lines[0, half] = lines[1, :, half] = True

    def paint(noise, settings, back):
        text = [[torch.zeros(1, 2, 1024), {}]]
        latent = comfy.sample.sample(
            settings.patched(painter.patcher), noise, 4, 1.0, "euler", "simple", text, text, torch.ones_like(noise), disable_pbar=True)
        return painter.decode(latent.roll((back, back), (-2, -1)))
    sums = {wrap: torch.zeros(2) for wrap in ("none", "both")}
    for seed in range(2):
        noise = comfy.sample.prepare_noise(torch.ones(1, 16, 32, 32), seed)
        whole = paint(noise.roll((half + 5, half + 5), (-2, -1)), quality.one_window(settings), -5)
        for wrap, total in sums.items():
            total += torch.tensor(quality.added_by(lines, paint(noise, replace(settings, wrap=wrap), half), whole, lines))
    ratios = {wrap: 1 + float(added / level) for wrap, (added, level) in sums.items()}
    assert ratios["none"] > 1.2
    assert ratios["both"] <= 1.02


# What a window over the border is given.

INSIDE = [name for name in conditioning.PLACES if name not in ("two areas that overlap", "areas at every border", "an area beyond the border")]


@every_batching
@pytest.mark.parametrize("places", INSIDE)
def test_prompts_keep_their_places_on_a_ring(places, tiling):
    positive = conditioning.PLACES[places](conditioning.prompt("sd15", 1.0), conditioning.prompt("sd15", 3.0))
    assert_windows_see_their_part(load("sd15"), conditioning.prompted, positive, tiling=tiling | {"wrap": "both"})


# Areas that lie on borders, (x, y, width, height) in px, and how far, in cells, they are moved to lie inside.
ON_BORDERS = {
    "left": ((0, 72, 96, 160), (0, 20)), "right": ((472, 72, 64, 160), (0, -20)), "top and left": ((0, 0, 96, 160), (10, 20)),
    "last corner": ((472, 248, 64, 160), (-10, -20)),
}


@every_batching
@pytest.mark.parametrize("place", ON_BORDERS)
def test_an_area_on_the_border_ends_there_as_it_would_inside(place, tiling):
    """The host does not feather an area where it ends with the picture; this picture goes on."""
    model, one, other = load("sd15"), conditioning.prompt("sd15", 1.0), conditioning.prompt("sd15", 3.0)
    latent, ((x, y, width, height), (down, across)) = model.latent(HEIGHT_PX, WIDTH_PX), ON_BORDERS[place]
    on, inside = (one + conditioning.area(other, width, height, *corner) for corner in ((x, y), (x + 8 * across, y + 8 * down)))
    found = denoised(with_call(tiled(model.patcher, wrap="both", **tiling), conditioning.prompted), latent, on)
    plain = denoised(with_call(model.patcher, conditioning.prompted), latent, inside)
    assert (found - plain.roll((-down, -across), (-2, -1))).abs().max() < 1e-5


@every_batching
def test_both_ends_of_a_long_area_are_in_a_window_over_the_border(tiling):
    """By itself an area has its prompt wherever it lies, and nothing elsewhere."""
    model = load("sd15")
    positive = conditioning.area(conditioning.prompt("sd15", 3.0), 496, HEIGHT_PX, 0, 0)
    assert_windows_see_their_part(model, conditioning.prompted, positive, tiling=tiling | {"wrap": "both"})


def test_an_area_along_the_whole_border_goes_on_over_it():
    model, rows = load("sd15"), []
    positive = conditioning.prompt("sd15", 1.0) + conditioning.area(conditioning.prompt("sd15", 3.0), WIDTH_PX, 160, 0, 72)

    def note(call):
        rows.append(call.x.shape[-1])
        return conditioning.prompted(call)
    whole = denoised(with_call(model.patcher, conditioning.prompted), model.latent(HEIGHT_PX, WIDTH_PX), positive)
    out = denoised(with_call(tiled(model.patcher, wrap="horizontal"), note), model.latent(HEIGHT_PX, WIDTH_PX), positive)
    assert (out - whole).abs().max() < 1e-5
    assert set(rows) == {32}


@every_batching
@pytest.mark.parametrize("where", ["the picture", "an area"])
def test_boxes_keep_their_places_on_a_ring(where, tiling):
    positive = conditioning.with_boxes(echo_gligen(), conditioning.BOXES)
    positive = positive if where == "the picture" else conditioning.area(positive, 320, 240, 96, 72)
    assert_windows_see_their_part(load("sd15"), conditioning.drawn, positive, tiling=tiling | {"wrap": "both"})


@pytest.mark.parametrize("what", conditioning.SHAPES)
def test_conditionings_of_the_pictures_place_are_cut_on_a_ring(what):
    kind, name, shape = conditioning.SHAPES[what]
    latent = load(name).latent(8 * conditioning.H, 8 * conditioning.W, batch=2)
    positive = conditioning.with_cond(name, what.split(" of ")[0], kind(drawer(6)(2, *shape[1:])))
    assert_windows_see_their_part(
        load(name), conditioning.given(what.split(" of ")[0]), positive, latent=latent, tiling=dict(tile_batch_size=2, wrap="both"), cfg=4.0)


@every_batching
@pytest.mark.parametrize("kind", control.ECHOES)
def test_hints_go_on_over_the_border(kind, tiling):
    model, positive, negative = control.of_kind(kind)
    assert_windows_see_their_part(model, echoed, positive, negative, tiling=tiling | {"wrap": "both"}, cfg=4.0)


@every_batching
@pytest.mark.parametrize("area", [(320, 240, 120, 88), (496, 240, 0, 88), (WIDTH_PX, 240, 0, 88)])
def test_the_hint_of_an_area_covers_the_area_on_a_ring(area, tiling):
    model, positive, negative = control.of_kind("pixels")
    positive = ConditioningSetMask().append(positive, torch.ones(1, HEIGHT_PX, WIDTH_PX), "default", 1.0)[0]
    positive = conditioning.area(positive, *area, strength=1.0)
    assert_windows_see_their_part(model, echoed, positive, negative, tiling=tiling | {"wrap": "both"})


@every_batching
@pytest.mark.parametrize("kind", echo_patches.kinds())
def test_pictures_of_model_patches_go_on_over_the_border(kind, tiling):
    name, put_on, read = echo_patches.ECHOES[kind]
    model, size = load(name), control.sizes_px(name)
    patcher = put_on(model.patcher, picture(*size), mask=picture(*size, seed=9)[..., 0])
    assert_windows_see_their_part(
        model, read, *control.prompts(name), patcher=patcher, latent=model.latent(*size), tiling=dict(min_window=96, max_window=96) | tiling | {"wrap": "both"})


def test_defaults_fill_what_masks_leave_on_a_ring():
    one, other = conditioning.prompt("sd15", 1.0), conditioning.prompt("sd15", 3.0)
    positive = ConditioningSetDefaultAndCombine().set_default_and_combine(conditioning.masked(other, strength=1.0), one)[0]
    assert_windows_see_their_part(load("sd15"), conditioning.prompted, positive, tiling=dict(wrap="horizontal"))


def test_guides_of_a_video_have_px_that_go_on_over_the_border():
    canvas = Canvas(load("ltxv").patcher.model, (1, 128, 3, 6, 10), torch.device("cpu"), 1, {}, {}, BOTH)
    rows, cols = torch.meshgrid(torch.arange(6), torch.arange(10), indexing="ij")
    px = torch.stack([torch.zeros(6, 10), 32 * rows, 32 * cols]).flatten(1)
    value = torch.stack([px, px + torch.tensor([8, 32, 32])[:, None]], -1)[None]
    found = RULES_OF_CONDS["keyframe_idxs"](value, [Rect(-2, -3, 2, 4)], canvas)
    assert found[0, 1, :, 0].view(4, 7)[:, 0].tolist() == [0, 32, 64, 96]
    assert found[0, 2, :, 0].view(4, 7)[0].tolist() == [0, 32, 64, 96, 128, 160, 192]
    assert torch.equal(found[..., 1] - found[..., 0], torch.tensor([8.0, 32.0, 32.0])[None, :, None].expand(1, 3, 28))


def test_uuids_tell_windows_over_the_border_apart():
    model, calls = load("sd15"), []
    patcher = with_call(tiled(model.patcher, wrap="both", tile_batch_size=1), lambda call: calls.append(tuple(call.transformer_options["uuids"])) or call.x)
    denoised(patcher, model.latent(HEIGHT_PX, WIDTH_PX), conditioning.prompt("sd15", 1.0), percents=(0.2, 0.4))
    half = len(calls) // 2
    assert len(set(calls)) == half and calls[:half] == calls[half:]


def test_windows_over_the_border_show_both_ends(model):
    clone, calls = recorded(patched(model, even_tree(1.0), wrap="horizontal", min_window=128, max_window=128, tile_batch_size=1))
    latent = model.latent(SIDE_PX, SIDE_PX)
    noise = comfy.sample.prepare_noise(latent, 5)
    sample(model, clone, latent, noise=noise, steps=1)
    # At its first step a flow model is given the noise.
    ends = [noise[..., top:top + 20, :].roll(2, -1)[..., :20] for top in (0, 12)]
    middles = [noise[..., top:top + 20, 14:] for top in (0, 12)]
    assert len(calls) == 4
    assert sum(torch.allclose(call.x, end, atol=1e-5) for call in calls for end in ends) == 2
    assert sum(torch.allclose(call.x[..., :18], middle, atol=1e-5) for call in calls for middle in middles) == 2


@every_wrap
def test_self_attention_guidance_is_refused_on_a_ring_even_in_one_window(model, wrap):
    from comfy_extras.nodes_sag import SelfAttentionGuidance
    sd = load("sd15")
    guided = SelfAttentionGuidance.execute(sd.patcher, 0.5, 2.0).args[0]
    patcher = TiledDiffusion(even_tree(1.0), min_window=1024, max_window=1024, wrap=wrap).patched(guided)
    with pytest.raises(ValueError, match="Self-Attention Guidance: expected the whole picture in one window"):
        sample(sd, patcher, cfg=4.0, steps=1)


@pytest.mark.parametrize("first, last, moved", [(0, 64, 8), (60, 68, 8), (50, 60, 16), (44, 60, 24)])
def test_a_ring_is_cut_where_little_goes_on_over_the_cut_and_else_in_the_middle_of_a_square(first, last, moved):
    """64 cells in squares of 16; active are those from one to another. Rolled by 8, 16 or 24, the ends are at cell 56, 48 or 40."""
    active = torch.zeros(64, 8, dtype=torch.bool)
    active[[place % 64 for place in range(first, last)]] = True
    assert _quiet_place(active, Axis(64, True, 16, 2, (16, 32), (16, 32), 0), 2) == moved
    assert _quiet_place(active, Axis(64, False, 16, 2, (16, 32), (16, 32), 0), 2) == 0

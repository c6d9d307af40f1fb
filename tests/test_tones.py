"""Tones that are held: what is slow is the original's, what is fine is the model's, and what is kept stays exact."""
from __future__ import annotations

import pytest
import torch
from sampling import SIDE_PX, calls_of, even_tree, load, patched, sample, striped_tree, with_prediction

from qtd_pack.tiled_diffusion import TiledDiffusion
from qtd_pack.tones import hold_at, low_pass

MODEL = "flux_schnell"


def drifted(x, sigma):
    """A model whose every window has a tone of its own, by its noise, and a fine pattern."""
    out = 20 * x.mean((1, 2, 3), keepdim=True).expand_as(x).clone()
    out[..., ::2, :] += 0.25
    out[..., 1::2, :] -= 0.25
    return out


def test_a_low_pass_keeps_what_is_even_and_takes_what_is_fine():
    fine = torch.ones(2, 3, 48, 64)
    fine[..., ::2] = -1
    assert torch.allclose(low_pass(torch.full((2, 3, 48, 64), 0.7), 16), torch.tensor(0.7))
    assert low_pass(fine, 16).abs().max() < 1e-6


def test_a_low_pass_keeps_the_mean_of_each_square_near():
    """A step over whole squares passes evenly from the middle of one to that of the next."""
    step = torch.zeros(1, 1, 16, 32)
    step[..., 16:] = 1
    row = low_pass(step, 16)[0, 0, 0]
    assert row[:8].abs().max() == 0 and (row[24:] - 1).abs().max() == 0
    assert torch.allclose(row[8:24], (torch.arange(16) + 0.5) / 16, atol=1e-6)


@pytest.mark.parametrize("shape, side", [((1, 4, 50, 66), 16), ((2, 16, 3, 10, 7), 16), ((1, 4, 8, 8), 64), ((1, 4, 5, 90), 4)])
def test_a_low_pass_takes_latents_of_every_shape(shape, side):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = low_pass(value.half(), side)
    assert found.shape == value.shape and found.dtype == torch.float16
    assert (found - low_pass(value, side)).abs().max() < 2e-3
    assert torch.allclose(low_pass(2 * value + 1, side), 2 * low_pass(value, side) + 1, atol=1e-5)


def test_on_a_ring_the_ends_are_neighbours():
    step = torch.zeros(1, 1, 32, 32)
    step[..., 16:] = 1
    across = low_pass(step, 16, (False, True))[0, 0, 0]
    assert torch.allclose(across[:8] + across[8:16].flip(0), 2 * across[:8], atol=1e-6)
    assert across[0] == pytest.approx(0.46875) and low_pass(step, 16)[0, 0, 0, 0] == 0
    assert torch.allclose(low_pass(step.roll(16, -1), 16, (False, True)), low_pass(step, 16, (False, True)).roll(16, -1), atol=1e-6)


def test_the_hold_falls_with_the_noise():
    assert [hold_at(0.8, progress) for progress in (0.0, 0.5, 1.0)] == [0.8, 0.4, 0.0]


def test_windows_that_drift_apart_are_held_and_fine_detail_is_the_models():
    """In windows of 16 cells, after one step from pure noise: tones are the original's, which is even, the pattern is all there."""
    model = load(MODEL)
    scale = model.patcher.model.latent_format
    latent = scale.process_out(torch.full(model.latent_shape(SIDE_PX, SIDE_PX), 0.5))
    outs = [
        scale.process_in(sample(model, with_prediction(patched(model, even_tree(1.0), hold_tones=hold, min_window=128, tile_overlap=0), drifted), latent, steps=1))
        for hold in (0.0, 1.0)]
    errors = [torch.nn.functional.avg_pool2d(out - 0.5, 16).square().mean().sqrt() for out in outs]
    assert errors[0] > 0.4 and errors[1] < errors[0] / 3
    patterns = [out[..., :8, :8].diff(dim=-2).mean((0, 1, 3)) for out in outs]
    assert torch.allclose(patterns[0].abs(), torch.tensor(0.5), atol=1e-4) and torch.allclose(*patterns, atol=1e-4)


@pytest.mark.parametrize("schedule", ["img2img", "blend", "ramp"])
def test_what_is_kept_is_exact(schedule):
    model = load(MODEL)
    latent = model.latent(SIDE_PX, SIDE_PX)
    out = sample(model, patched(model, striped_tree(0.0, 1.0), schedule=schedule, hold_tones=1.0), latent)
    assert torch.equal(out[..., :16], latent[..., :16])
    assert not torch.equal(out[..., 16:], sample(model, patched(model, striped_tree(0.0, 1.0), schedule=schedule), latent)[..., 16:])


def test_without_hold_nothing_changes():
    model = load(MODEL)
    assert torch.equal(sample(model, patched(model, even_tree(0.5))), sample(model, patched(model, even_tree(0.5), hold_tones=0.0)))


def test_without_an_original_there_is_nothing_to_hold():
    model = load(MODEL)
    empty = torch.zeros(model.latent_shape(SIDE_PX, SIDE_PX))
    assert torch.equal(sample(model, patched(model, even_tree(1.0)), empty), sample(model, patched(model, even_tree(1.0), hold_tones=1.0), empty))


def test_holding_asks_the_model_nothing_more():
    model, counts = load(MODEL), []
    for hold in (0.0, 1.0):
        patcher = patched(model, striped_tree(0.5, 1.0), hold_tones=hold)
        with calls_of(patcher) as shapes:
            sample(model, patcher)
        counts.append(list(shapes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("hold", [-0.1, 1.5])
def test_a_hold_that_is_no_share_is_refused(hold):
    with pytest.raises(ValueError, match="hold_tones: expected 0 to 1, got"):
        TiledDiffusion(even_tree(1.0), hold_tones=hold)

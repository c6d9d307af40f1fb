"""How visible windows and leaves are on held-out photos, and that the measures see what an eye sees."""
from __future__ import annotations

import pytest
import torch
from conftest import ROOT, load_module

quality = load_module("qtd_quality", ROOT / "benchmarks" / "quality.py")
NAMES = quality.photos.HELD_OUT


@pytest.fixture(scope="module")
def bench():
    return quality.Bench(quality.load_painter(), quality.held_out(), {})


def seam(bench, name, strength, **settings):
    settings = quality.in_windows(quality.even_tree(bench.pictures[name], strength), **settings)
    return quality.worst_ratio(quality.pooled(bench.even_pairs(name, strength, quality.DRAWS, settings)))


@pytest.mark.parametrize("name", NAMES)
def test_default_settings_leave_no_seam_in_a_photo_sampled_anew(bench, name):
    assert seam(bench, name, 1.0) <= 1.02


@pytest.mark.parametrize("name", NAMES)
def test_default_settings_leave_no_seam_in_a_photo_sampled_by_its_detail(bench, name):
    tree, painting = quality.detail_painting(bench, name)
    whole = bench.paint(name, quality.one_window(quality.in_windows(tree))).picture
    assert quality.seam_ratio(painting, whole) <= 1.02


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_without_overlap_shows(bench, name):
    assert seam(bench, name, 1.0, method="MultiDiffusion", tile_overlap=0) > 1.05


@pytest.mark.parametrize("name", NAMES)
def test_no_line_shows_between_leaves_and_no_more_of_the_original_than_in_whole_canvas_sampling(bench, name):
    borders, ghosts, levels = quality.leaf_figures(bench, name)
    assert borders <= 1.05
    assert max(share - level for share, level in zip(ghosts, levels)) <= 0.05


def test_without_easing_lines_show_between_leaves(bench, monkeypatch):
    monkeypatch.setattr(quality.sampling_run, "EASE_CELLS", 0)
    assert quality.leaf_figures(bench, NAMES[0])[0] > 1.2


@pytest.mark.parametrize("name", NAMES)
def test_composite_makes_kept_pixels_exact_and_no_edge_around_them(bench, name):
    picture = bench.pictures[name]
    tree, painting = quality.detail_painting(bench, name)
    result = quality.composite(picture, painting.picture, tree)
    kept = quality.strength_raster(tree, *picture.shape[1:3]) == 0
    assert kept.any()
    assert torch.equal(result[0][kept], picture[0][kept])
    assert quality.kept_edge_ratio(result, picture, tree) <= 1.02


def gradient_picture(height=256, width=256):
    """Noise on a ramp: a picture with the same gradient energy everywhere."""
    noise = torch.randn(1, height, width, 1, generator=torch.Generator().manual_seed(0))
    return (0.5 + 0.04 * noise).expand(-1, -1, -1, 3)


@pytest.mark.parametrize("step, expected", [(0.0, 1.0), (0.02, 1.0417), (0.1, 2.04)])
def test_a_step_along_a_line_counts_as_its_energy_over_the_pictures(step, expected):
    picture = gradient_picture()
    borders = torch.zeros(2, 32, 32, dtype=torch.bool)
    borders[1, :, 16] = True
    stepped = picture + step * (torch.arange(256) >= 128)[None, None, :, None]
    added, level = quality.added_by(borders, stepped, picture, borders)
    # The noise has a squared step of 2 * 0.04 ** 2 at each of three depths, the step its square at one.
    assert 1 + added / level == pytest.approx(expected, rel=0.05)


def test_a_slow_passage_is_no_line():
    picture = gradient_picture()
    borders = torch.zeros(2, 32, 32, dtype=torch.bool)
    borders[1, :, 16] = True
    passage = 0.1 * ((torch.arange(256) - 96) / 64).clamp(0, 1)[None, None, :, None]
    added, level = quality.added_by(borders, picture + passage, picture, borders)
    assert 1 + added / level == pytest.approx(1.0, abs=0.002)


def test_a_ghost_is_the_share_of_the_original_that_is_left():
    original, other = gradient_picture(), gradient_picture().flip(1)
    where = torch.ones(32, 32, dtype=torch.bool)
    assert quality.ghost(0.3 * original + 0.7 * other, original, where) == pytest.approx(0.3, abs=0.01)


def test_structural_similarity_is_1_for_equals_and_falls_with_damage():
    picture = gradient_picture()
    noise = 0.02 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    assert quality.ms_ssim(picture, picture) == pytest.approx(1.0)
    assert 1 > quality.ms_ssim(picture + noise, picture) > quality.ms_ssim(picture + 3 * noise, picture)


def test_the_other_way_is_undone_even_after_an_error():
    usual = quality.blending.blend_weight
    with pytest.raises(ValueError, match="not now"), quality.instead(quality.blending, "blend_weight", None):
        raise ValueError("not now")
    assert quality.blending.blend_weight is usual

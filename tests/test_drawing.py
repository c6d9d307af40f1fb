"""How a tree looks over its picture."""
from __future__ import annotations

import torch
from pictures import busy_corner, by_threshold, flat

from qtd_pack.drawing import draw_quadtree, strength_colour


def test_the_colours_get_lighter_with_strength():
    luminance = strength_colour(torch.linspace(0, 1, 101)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert bool((luminance.diff() > 0).all())


def test_the_overlay_shows_strengths_and_borders():
    tree = by_threshold(busy_corner(256, 256, 64))
    image = flat(256, 256)
    overlay = draw_quadtree(image, tree)
    assert overlay.shape == (1, 256, 256, 3)
    assert torch.allclose(overlay[0, 200, 60], 0.55 * image[0, 0, 0] + 0.45 * strength_colour(torch.tensor(0.5)))
    assert torch.equal(overlay[0, 128, :], torch.full((256, 3), 0.9))
    assert torch.equal(overlay[0, :64, 64], torch.full((64, 3), 0.9))

"""Pictures, masks and trees that several tests take."""
from __future__ import annotations

import math

import pytest
import skimage.data
import torch

from qtd_pack.quadtree import Leaf, Quadtree, build_quadtree
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.utils import Rect


def flat(height, width, value=0.3):
    return torch.full((1, height, width, 3), value)


def busy_corner(height, width, side):
    """Flat but for black and white noise in the top left corner."""
    image = flat(height, width)
    image[:, :side, :side] = torch.rand(1, side, side, 3).round()
    return image


def photo():
    return torch.from_numpy(skimage.data.astronaut()).float()[None] / 255


def built():
    """A tree of one leaf, of a picture of 776 x 1000 px."""
    return Quadtree(1000, 776, 1024, 1024, (Leaf(Rect(0, 0, 1000, 776), 1024, 0.0, 0.5),))


def layout(tree):
    return [(leaf.rect.top, leaf.rect.left, leaf.rect.bottom, leaf.rect.right, leaf.strength) for leaf in tree.leaves]


def by_threshold(image, threshold=25.0, **sizes):
    return build_quadtree(image, detail_budget=0, content_threshold=threshold, **{"min_leaf": 64, "max_leaf": 256} | sizes)


# Width, height and px per cell; what the host's VAEs leave of each is cropped_to and begins at crop_start.
CROPPED_SIZES = [
    (501, 383, 8), (1000, 750, 8), (1080, 1350, 8), (1920, 1080, 16), (131, 97, 8), (250, 187, 16), (331, 260, 32), (333, 250, 4)]


SIZES = pytest.mark.parametrize("width, height, cell_px", CROPPED_SIZES)


def cropped_to(side, cell_px):
    return side // cell_px * cell_px


def crop_start(side, cell_px):
    return side % cell_px // 2


def cropped(picture, cell_px):
    """What a VAE of the host sees of a picture, (B, H, W, C) or (B, H, W)."""
    height, width = picture.shape[1:3]
    top, left = crop_start(height, cell_px), crop_start(width, cell_px)
    return picture[:, top:top + cropped_to(height, cell_px), left:left + cropped_to(width, cell_px)]


def scattered(height, width):
    """A tree with strengths of 0, 0.25, ... 1 in no order."""
    min_leaf = 8 * math.ceil(max(height, width) / 512)
    strengths = torch.randint(0, 5, (-(-height // min_leaf), -(-width // min_leaf))) / 4
    mask = strengths.repeat_interleave(min_leaf, 0).repeat_interleave(min_leaf, 1)[:height, :width]
    return quadtree_from_mask(mask, min_leaf=min_leaf, max_leaf=min_leaf * 4)


def strengths_of_pixels(tree):
    """The strength over each pixel of the tree's picture, from its leaves alone."""
    found = torch.full((tree.height, tree.width), torch.nan)
    for leaf in tree.leaves:
        found[leaf.rect.top:leaf.rect.bottom, leaf.rect.left:leaf.rect.right] = leaf.strength
    return found


def at(values, rows, cols):
    """The values under points; beyond the border those at the border."""
    rows, cols = (points.floor().long().clamp(0, length - 1) for points, length in zip((rows, cols), values.shape))
    return values[rows][:, cols]

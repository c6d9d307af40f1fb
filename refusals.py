"""What cannot be sampled window by window, and what leads out of it?"""
from __future__ import annotations

import torch

from . import control
from .placement import find_placement, way_to_the_tree
from .quadtree import Quadtree
from .sampling_run import Run


def check_latent(latent: torch.Tensor, latent_shapes) -> None:
    """Raise ValueError for latents without a height and a width of their own."""
    if latent.ndim < 4 or (latent_shapes is not None and len(latent_shapes) > 1):
        raise ValueError(
            f"latent: expected a picture's or a video's, (batch, channels, [frames,] height, width), got {tuple(latent.shape)}"
            f"{', several packed into one' if latent_shapes is not None and len(latent_shapes) > 1 else ''}. "
            "Packed audio and video, and audio alone, cannot be tiled: remove Quadtree Tiled Diffusion from this model.")


def check_canvas(tree: Quadtree, latent: torch.Tensor, cell_px: int) -> None:
    """Raise ValueError unless the latent is of the tree's picture, as large or larger; pictures are cropped to whole cells."""
    height, width = (cells * cell_px for cells in latent.shape[-2:])
    if tree.kept_share == 1:
        return  # an empty mask knows no size
    made = f"quadtree: made for a picture of {tree.width} x {tree.height} px, but what is to be sampled is {width} x {height} px"
    tiles = "Nodes that sample a part at a time (tile upscalers, detailers) cannot use this tree: give them the model from before Quadtree Tiled Diffusion."
    missing = tree.height - height, tree.width - width
    if max(missing) > cell_px and min(missing) < -cell_px:
        raise ValueError(f"{made}, which is another shape. {way_to_the_tree(tree)} {tiles}")
    if max(missing) > cell_px:
        raise ValueError(f"{made}, which is smaller: a part of it, or a smaller version. {tiles} To sample a smaller version, scale the picture first and build the quadtree from that.")
    if find_placement((tree.height, tree.width), (height, width), cell_px) is None:
        raise ValueError(
            f"{made}: enlarged {height / tree.height:.2f} times in height and {width / tree.width:.2f} times in width, which is another aspect. "
            f"Enlarge both sides alike. {way_to_the_tree(tree)} {tiles}")


def check_size(x: torch.Tensor, run: Run) -> None:
    """Raise ValueError if a sampler has given the latent another size on its way (LCM Upscale does), or asks about some images of a batch."""
    if x.shape[-2:] != run.facts.strengths.shape:
        height, width = run.facts.strengths.shape
        raise ValueError(
            f"sampler: expected one that keeps the latent's size, {width} x {height} cells, but it went on with {x.shape[-1]} x {x.shape[-2]}. "
            "Choose another sampler, or enlarge the latent between two of them.")
    if x.shape[0] % run.facts.shape[0]:
        raise ValueError(
            f"sampler: expected one that asks about all images of a batch at once, {run.facts.shape[0]}, but it asked about {x.shape[0]}, and which they are cannot be told. "
            "Choose another sampler, or sample the images one after another.")


def check_guidance(model_options, run: Run) -> None:
    """Raise ValueError for Self-Attention Guidance, which takes the attention of the last call for that of the whole picture."""
    size = tuple(run.facts.strengths.shape)
    functions = model_options.get("sampler_post_cfg_function", [])
    sizes = run.facts.sizes
    in_windows = any(sizes.wraps) or any(sizes.lengths(length)[0] < length for length in size)
    if in_windows and any("SelfAttentionGuidance" in getattr(function, "__qualname__", "") for function in functions):
        raise ValueError(
            "Self-Attention Guidance: expected the whole picture in one window, as it lays one window's attention over all of it. "
            "Remove that node, use Perturbed-Attention Guidance instead, or make min_window as large as the picture and `wrap` none.")


def check_controls(conds, run: Run) -> None:
    """Raise ValueError for a control that cannot be cut, if there is something to cut it to."""
    try:
        control.check_controls(conds)
    except ValueError:
        if not run.is_one_window:
            raise

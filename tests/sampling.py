"""Sampling as the host's nodes do it, and the things that tests ask of a run."""
from __future__ import annotations

import contextlib

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import tiny_models
from tiny_models import TinyModel, load

from qtd_pack.quadtree import Leaf, Quadtree
from qtd_pack.utils import Rect
from qtd_pack.tiled_diffusion import TiledDiffusion

SIDE_PX = 256


def even_tree(strength: float, height: int = SIDE_PX, width: int = SIDE_PX) -> Quadtree:
    """One leaf over the whole picture."""
    return Quadtree(height, width, 4096, 4096, (Leaf(Rect(0, 0, height, width), 4096, 0.0, strength),))


def striped_tree(*strengths: float, leaf: int = 128, height: int = SIDE_PX) -> Quadtree:
    """Columns of square leaves, one strength each."""
    rects = [(Rect(top, left * leaf, top + leaf, (left + 1) * leaf), amount) for top in range(0, height, leaf) for left, amount in enumerate(strengths)]
    return Quadtree(height, leaf * len(strengths), leaf, leaf, tuple(Leaf(rect, leaf, 0.0, amount) for rect, amount in rects))


def patched(model: TinyModel, tree: Quadtree, **settings):
    """The model with the tree, in windows small enough for a picture of SIDE_PX to need several."""
    return TiledDiffusion(tree, **{"min_window": 64, "max_window": 128, "tile_overlap": 16} | settings).patched(model.patcher)


def sample(model: TinyModel, patcher, latent=None, *, size=(SIDE_PX, SIDE_PX), steps=4, cfg=1.0, sampler="euler", scheduler="simple", noise=None, noise_seed=5, **options):
    """What KSampler and KSampler (Advanced) do."""
    latent = model.latent(*size) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, noise_seed) if noise is None else noise
    return comfy.sample.sample(
        patcher, noise, steps, cfg, sampler, scheduler, model.positive(*size), model.negative(*size), latent, seed=noise_seed, disable_pbar=True, **options)


@contextlib.contextmanager
def calls_of(patcher):
    """The shapes of x at each call of the model, as a list that fills while the patcher samples."""
    shapes = []

    def record(executor, x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return executor(x, *args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    patcher.add_wrapper_with_key(kind, "calls_of", record)
    yield shapes
    patcher.remove_wrappers_with_key(kind, "calls_of")


def with_prediction(patcher, predict):
    """A clone whose model returns predict(x, sigma) as denoised, whatever its weights say."""
    return tiny_models.with_prediction(patcher, lambda call: predict(call.x, call.sigma))


__all__ = ["SIDE_PX", "calls_of", "even_tree", "load", "patched", "sample", "striped_tree", "with_prediction"]

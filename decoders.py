"""Which steps does the host's decoder take, and how far does each of them look?

A decoder is walked in two parts. What it does at the resolution of its latent takes a tenth of its operations and sees the
whole picture (the middle attention, the first normalisations), so it is done once, for all of it. From the first
enlargement on, windows go through it step by step. The modules are the host's own and are called as they are, so weights
are cast, moved and patched as ever; none is changed. In elements of a step's own resolution; `cells` are those of what the
decoder gets, which has 8 px to a cell even where a latent packs 2 x 2 of them (FLUX.2).
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import comfy.ldm.models.autoencoder
import comfy.ldm.modules.diffusionmodules.model as kl
import comfy.ldm.wan.vae
import comfy.model_management
import comfy.ops
import comfy.taesd.taesd as tiny

# Queries that lie far from all windows attend for so many by so many cells at once.
FAR_CELLS = 8

# Where more of the picture is near, it is not worth it.
FULL = 0.85

# Elements of the attention's scores at once: little beside what a window takes.
SCORES = 1 << 26


@dataclass(frozen=True, eq=False)
class Step:
    """One layer, as a window goes through it.

    run(x, skip) gives both anew; skip is what a block keeps for its end. norm: the group norm that x goes through first, with
    the statistics of the whole picture. before, after: how far it looks, in elements before and after it grows by `grows`.
    weights: of its convolutions, which each element that comes out has to meet. channels: that come out.
    """

    run: Callable
    before: int = 0
    grows: int = 1
    after: int = 0
    norm: torch.nn.Module | None = None
    weights: int = 0
    channels: int = 0


@dataclass(frozen=True, eq=False)
class Decoder:
    """How a VAE's decoder is walked.

    channels: of the latent. enter(latent) gives what the decoder itself gets, in cells. whole(cells, near) what the windows are
    cut from; near: bool, (height, width), the cells whose values count. entry_weights: of the convolutions of `whole`.
    attention: channels of its attention, 0 if there is none.
    """

    channels: int
    enter: Callable
    whole: Callable
    steps: tuple[Step, ...]
    entry_weights: int
    attention: int = 0

    @property
    def cell_px(self) -> int:
        return math.prod(step.grows for step in self.steps)

    @property
    def has_norms(self) -> bool:
        return any(step.norm is not None for step in self.steps)


def decoder_of(model: torch.nn.Module, frames: int) -> Decoder | None:
    """How the host's autoencoder is walked, or None if it is not known how. frames: of the latent."""
    if isinstance(model, comfy.ldm.models.autoencoder.AutoencodingEngine) and type(model.decoder) is kl.Decoder and _is_plain(model.decoder):
        return _autoencoder_kl(model)
    if type(model) is tiny.TAESD and _known(model.taesd_decoder) and not _normalises_late(model.taesd_decoder):
        return _taesd(model)
    if type(model) is comfy.ldm.wan.vae.WanVAE and frames == 1 and _known(model.decoder.upsamples):
        return _wan(model)
    return None


def _weights(*modules: torch.nn.Module) -> int:
    """Numbers in the convolutions of modules."""
    return sum(part.weight.numel() for module in modules for part in module.modules() if isinstance(part, (torch.nn.Conv2d, torch.nn.Conv3d)))


def _through(module: torch.nn.Module, **reach) -> Step:
    """A layer that needs nothing but what comes in."""
    return Step(lambda x, skip: (module(x), skip), weights=_weights(module), **reach)


# The autoencoder of Stable Diffusion, SDXL, SD3, FLUX and FLUX.2


def _is_plain(decoder: kl.Decoder) -> bool:
    """Whether the decoder is made of what is walked here: blocks of two-dimensional convolutions, attention in the middle only."""
    blocks = [decoder.mid.block_1, decoder.mid.block_2, *(block for level in decoder.up for block in level.block)]
    return (
        isinstance(decoder.conv_in, torch.nn.Conv2d) and type(decoder.mid.attn_1) is kl.AttnBlock and not any(len(level.attn) for level in decoder.up)
        and all(type(block) is kl.ResnetBlock and isinstance(block.norm1, torch.nn.GroupNorm) for block in blocks))


def _autoencoder_kl(model) -> Decoder:
    decoder = model.decoder
    coarsest, *finer = reversed(decoder.up)
    steps = [_enlarging(coarsest.upsample)] if finer else []
    for level in finer:
        steps += [half for block in level.block for half in _halves(block)]
        if level is not finer[-1]:
            steps.append(_enlarging(level.upsample))
    steps.append(Step(lambda x, skip: (_pixels(decoder, x), None), after=1, norm=decoder.norm_out, weights=_weights(decoder.conv_out), channels=decoder.conv_out.out_channels))
    first = getattr(model, "post_quant_conv", decoder.conv_in)
    return Decoder(
        first.in_channels * (1 if getattr(model, "bn", None) is None else 4), lambda latent: _without_decoder(model).decode(latent),
        lambda cells, near: _middle(decoder, coarsest, cells, near), tuple(steps), _weights(decoder.conv_in, decoder.mid, coarsest.block), decoder.mid.attn_1.in_channels)


def _without_decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The same autoencoder with nothing where its decoder is: it gives what the decoder would get."""
    shadow = copy.copy(model)
    shadow._modules = {**model._modules, "decoder": torch.nn.Identity()}
    return shadow


def _enlarging(upsample: torch.nn.Module) -> Step:
    return _through(upsample, grows=2, after=1 if upsample.with_conv else 0, channels=upsample.conv.out_channels if upsample.with_conv else 0)


def _halves(block: kl.ResnetBlock) -> list[Step]:
    """A block is two steps, since each begins with a normalisation."""
    def first(x, skip):
        return block.conv1(F.silu(x, inplace=True)), skip

    def second(x, skip):
        shortcut = skip
        if block.in_channels != block.out_channels:
            shortcut = block.conv_shortcut(skip) if block.use_conv_shortcut else block.nin_shortcut(skip)
        return block.conv2(F.silu(x, inplace=True)) + shortcut, None

    shortcut = [module for name, module in block.named_children() if name.endswith("shortcut")]
    return [
        Step(first, after=1, norm=block.norm1, weights=_weights(block.conv1), channels=block.out_channels),
        Step(second, after=1, norm=block.norm2, weights=_weights(block.conv2, *shortcut), channels=block.out_channels)]


def _pixels(decoder: kl.Decoder, x: torch.Tensor) -> torch.Tensor:
    x = decoder.conv_out(F.silu(x, inplace=True))
    return torch.tanh(x) if decoder.tanh_out else x


def _middle(decoder: kl.Decoder, coarsest: torch.nn.Module, cells: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """All that the decoder does at its coarsest resolution."""
    x = decoder.mid.block_1(decoder.conv_in(cells), None)
    attention = decoder.mid.attn_1
    normed = attention.norm(x)
    attended = _attend(attention.q(normed), attention.k(normed), attention.v(normed), near, attention.optimized_attention)
    x = decoder.mid.block_2(x + attention.proj_out(attended), None)
    for block in coarsest.block:
        x = block(x, None)
    return x


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, near: torch.Tensor, attention: Callable) -> torch.Tensor:
    """Attention over the whole picture, (B, C, H, W), for the cells that count; for the others by blocks of cells."""
    height, width = query.shape[-2:]
    if min(height, width) < 2 * FAR_CELLS or float(near.float().mean()) > FULL:
        return attention(query, key, value)
    near = near.to(query.device).flatten()
    coarse = F.adaptive_avg_pool2d(query, (height // FAR_CELLS, width // FAR_CELLS))
    keys, values = (tensor.flatten(2).transpose(1, 2)[:, None].contiguous() for tensor in (key, value))
    far = _in_slices(coarse.flatten(2).transpose(1, 2)[:, None], keys, values)[:, 0].transpose(1, 2).unflatten(2, coarse.shape[-2:])
    out = F.interpolate(far, (height, width), mode="nearest-exact").flatten(2)
    out[:, :, near] = _in_slices(query.flatten(2)[:, :, near].transpose(1, 2)[:, None], keys, values)[:, 0].transpose(1, 2)
    return out.unflatten(2, (height, width))


def _in_slices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of any number of queries, (B, 1, N, C), so many at once that their scores take little memory."""
    step = max(SCORES // key.shape[2], 1)
    return torch.cat([F.scaled_dot_product_attention(part.contiguous(), key, value) for part in query.split(step, 2)], 2)


# The tiny autoencoders


def _known(layers: torch.nn.Module) -> bool:
    kinds = (tiny.Clamp, tiny.Block, torch.nn.ReLU, torch.nn.Conv2d, torch.nn.Upsample, comfy.ldm.wan.vae.ResidualBlock, comfy.ldm.wan.vae.Resample)
    return all(isinstance(layer, kinds) for layer in layers)


def _coarsest(layers: torch.nn.Module) -> tuple[list, list]:
    """The layers before the first enlargement, and the others."""
    layers = list(layers)
    first = next(index for index, layer in enumerate(layers) if isinstance(layer, (torch.nn.Upsample, comfy.ldm.wan.vae.Resample)))
    return layers[:first], layers[first:]


def _normalises_late(layers: torch.nn.Module) -> bool:
    """Whether one of the host's tiny autoencoders normalises after its coarsest resolution."""
    return any(getattr(layer, "pool", None) is not None for layer in _coarsest(layers)[1])


def _taesd(model: tiny.TAESD) -> Decoder:
    coarsest, finer = _coarsest(model.taesd_decoder)

    def enter(latent):
        cells = (latent - model.vae_shift) * model.vae_scale
        return F.pixel_shuffle(cells, 2) if packed > 1 else cells

    def whole(cells, near):
        for layer in coarsest:
            cells = layer(cells)
        return cells

    packed = 4 if isinstance(model.taesd_decoder, getattr(tiny, "DecoderFlux2", ())) else 1
    channels = next(layer.in_channels for layer in coarsest if isinstance(layer, torch.nn.Conv2d)) * packed
    steps = tuple(_tiny_step(layer) for layer in finer)
    return Decoder(channels, enter, whole, (*steps, Step(lambda x, skip: (x.sub(0.5).mul(2), skip))), _weights(*coarsest))


def _tiny_step(layer: torch.nn.Module) -> Step:
    if isinstance(layer, torch.nn.Upsample):
        return _through(layer, grows=2)
    if isinstance(layer, tiny.Block):
        return _through(layer, after=3)
    return _through(layer, after=1 if isinstance(layer, torch.nn.Conv2d) else 0)


# Wan 2.1 and Qwen-Image, one frame: its normalisations are over the channels of each pixel


def _wan(model: comfy.ldm.wan.vae.WanVAE) -> Decoder:
    decoder = model.decoder
    first, finer = _coarsest(decoder.upsamples)
    coarsest = [decoder.conv1, *decoder.middle, *first]

    def whole(cells, near):
        for layer in coarsest:
            cells = _wan_attention(layer, cells, near) if isinstance(layer, comfy.ldm.wan.vae.AttentionBlock) else layer(cells)
        return cells

    steps = [_wan_step(layer) for layer in finer]
    steps += [_through(layer, after=1 if isinstance(layer, torch.nn.Conv3d) else 0) for layer in decoder.head]
    attention = sum(layer.dim for layer in decoder.middle if isinstance(layer, comfy.ldm.wan.vae.AttentionBlock))
    return Decoder(model.conv2.in_channels, model.conv2, whole, tuple(steps), _weights(*coarsest) // 3, attention)


def _wan_attention(layer: comfy.ldm.wan.vae.AttentionBlock, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    query, key, value = layer.to_qkv(layer.norm(x[:, :, 0])).chunk(3, 1)
    return x + layer.proj(_attend(query, key, value, near, layer.optimized_attention))[:, :, None]


def _wan_step(layer: torch.nn.Module) -> Step:
    """A single frame meets a third of a causal convolution's weights."""
    if isinstance(layer, comfy.ldm.wan.vae.Resample):
        return Step(lambda x, skip: (layer(x), skip), grows=2, after=1, weights=_weights(layer.resample))
    return Step(lambda x, skip: (layer(x), skip), after=2, weights=_weights(layer) // 3)

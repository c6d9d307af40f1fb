"""Attention patches as other packs make them: each holds a mask of the picture where its window's part has to be found.

KINDS: by name a family and a function (patcher, mask) -> patcher that puts the patch on a clone. Masks are (b, height,
width). What a patch does is large, and depends on where the mask is 1.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

import comfy.hooks
import torch
from comfy.ldm.modules.attention import optimized_attention
from tiny_models import drawer

# The attention blocks of the small SD 1.5.
BLOCKS = [("input", 5), ("middle", 0), ("output", 3)]


def for_tokens(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """A mask for so many tokens of a picture in its proportion: (b, tokens, 1)."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    height = max(round((tokens * mask.shape[-2] / mask.shape[-1]) ** 0.5), 1)
    return torch.nn.functional.interpolate(mask, (height, tokens // height), mode="bilinear").flatten(1).unsqueeze(-1)


def rows_of(mask: torch.Tensor, rows: int, chunks: int) -> torch.Tensor:
    """One mask for each image, the last repeated, for each conditioning."""
    images = rows // chunks
    if mask.shape[0] < images:
        mask = torch.cat([mask, mask[-1:].expand(images - mask.shape[0], -1, -1)])
    return mask[:images].repeat(chunks, 1, 1)


def attend(out, q, k, v, options, *, cond, weight, mask=None, **further):
    """Attention to tokens of a picture beside the text's, where the mask is 1."""
    keys = cond[..., :k.shape[-1]].repeat(q.shape[0], 1, -(-k.shape[-1] // cond.shape[-1]))[..., :k.shape[-1]]
    beside = optimized_attention(q, keys, keys, options["n_heads"]) * weight
    return beside if mask is None else beside * rows_of(for_tokens(mask, q.shape[1]), q.shape[0], len(options["cond_or_uncond"]))


def embeds() -> torch.Tensor:
    """With last sizes in the proportion of a latent of 32 x 48 cells."""
    return drawer(21)(1, 32, 48)


class SeveralAttentions:
    """One object for a block, with the arguments of everything that was added to it."""

    def __init__(self, callback, **kwargs):
        self.callback, self.kwargs = [callback], [kwargs]

    def add(self, callback, **kwargs):
        self.callback.append(callback)
        self.kwargs.append(kwargs)

    def __call__(self, q, k, v, options):
        out = optimized_attention(q, k, v, options["n_heads"])
        for callback, kwargs in zip(self.callback, self.kwargs):
            assert kwargs["cond"].shape == (1, 32, 48)
            out = out + callback(out, q, k, v, options, **kwargs)
        return out


def with_several(patcher, mask):
    patcher = patcher.clone()
    for block in BLOCKS:
        patch = SeveralAttentions(attend, cond=embeds(), weight=0.5, mask=None, mask_type="a word")
        patch.add(attend, cond=embeds(), weight=3.0, mask=mask, sigmas=torch.rand(32, 48))
        patcher.set_model_attn2_replace(patch, *block)
    return patcher


def replaced_by(q, k, v, options, mask, cond):
    return optimized_attention(q, k, v, options["n_heads"]) + attend(None, q, k, v, options, cond=cond, weight=3.0, mask=mask)


def with_partial(patcher, mask):
    patcher = patcher.clone()
    for block in BLOCKS:
        patcher.set_model_attn1_replace(functools.partial(replaced_by, mask=mask, cond=embeds()), *block)
    return patcher


class Regions:
    """Two regions of the picture, the one beside the mask and the one under it: the masks' rows are no images."""

    def __init__(self, mask):
        self.masks = torch.cat([1 - mask[:1], mask[:1]])[:, None]
        self.weights = {"k": torch.rand(32, 48), "v": torch.rand(1, 32, 48)}
        self.counted = [0]

    def keys(self, q, k, v, extra_options):
        self.chunks = len(extra_options["cond_or_uncond"])
        self.counted[0] += 1
        return q, k, v

    def output(self, out, extra_options):
        under = for_tokens(self.masks, out.shape[1]).repeat_interleave(out.shape[0], 0)
        assert under.shape[0] == 2 * out.shape[0] and self.chunks in (1, 2)
        return (torch.cat([0.2 * out, 2.0 * out]) * under).view(2, *out.shape).sum(0)


def with_bound_methods(patcher, mask):
    patcher, regions = patcher.clone(), Regions(mask)
    patcher.set_model_attn2_patch(regions.keys)
    patcher.set_model_attn2_output_patch(regions.output)
    return patcher


def with_closures(patcher, mask):
    """The masks as a list that two functions close over, with a count that both write."""
    patcher, masks, calls = patcher.clone(), [mask, 1 - mask], 0

    def keys(q, k, v, extra_options):
        nonlocal calls
        calls += 1
        return q, k, v

    def output(out, extra_options):
        assert calls > 0
        first, second = (rows_of(for_tokens(mask, out.shape[1]), out.shape[0], len(extra_options["cond_or_uncond"])) for mask in masks)
        return out * (2.0 * first + 0.2 * second)

    patcher.set_model_attn2_patch(keys)
    patcher.set_model_attn2_output_patch(output)
    return patcher


def with_default(patcher, mask):
    patcher = patcher.clone()

    def output(out, extra_options, area_mask=mask, *, gain=3.0):
        return out + gain * out * rows_of(for_tokens(area_mask, out.shape[1]), out.shape[0], len(extra_options["cond_or_uncond"]))

    patcher.set_model_attn1_output_patch(output)
    return patcher


@dataclass(frozen=True)
class Region:
    mask: torch.Tensor
    gain: float


class BlockPatch:
    """A patch of UNet's blocks that keeps an object with a mask."""

    def __init__(self, mask):
        self.region = Region(mask, 2.0)

    def __call__(self, h, transformer_options):
        mask = torch.nn.functional.interpolate(self.region.mask[:, None], h.shape[-2:], mode="area")[:, 0]
        return h + self.region.gain * h * rows_of(mask, h.shape[0], len(transformer_options["cond_or_uncond"]))[:, None]


def with_block_patch(patcher, mask):
    patcher = patcher.clone()
    patcher.set_model_input_block_patch(BlockPatch(mask))
    return patcher


class BlockReplacement:
    """Of a transformer for FLUX: adds to the picture's tokens where the mask is 1."""

    def __init__(self, mask, gain):
        self.mask, self.gain = mask, gain

    def __call__(self, args, extra):
        tokens = args["img"].shape[1] - self.text(args)
        out = extra["original_block"](args)
        under = rows_of(for_tokens(self.mask, tokens), out["img"].shape[0], len(args["transformer_options"]["cond_or_uncond"]))
        out["img"] = torch.cat([out["img"][:, :self.text(args)], out["img"][:, self.text(args):] * (1 + self.gain * under)], 1)
        return out

    def text(self, args) -> int:
        return 0 if "txt" in args else 64


def with_dit_blocks(patcher, mask):
    patcher = patcher.clone()
    patcher.set_model_patch_replace(BlockReplacement(mask, 2.0), "dit", "double_block", 0)
    replacement = BlockReplacement(mask, -0.5)
    patcher.set_model_patch_replace(lambda args, extra: replacement(args, extra), "dit", "single_block", 0)
    return patcher


class RegionalAttention:
    """What FLUX's picture tokens attend to less: those on the other side of a mask (1, height, width) in cells."""

    def __init__(self, mask):
        tokens = torch.nn.functional.avg_pool2d(mask, 2).flatten().round()
        self.attn_mask = torch.zeros(64 + len(tokens), 64 + len(tokens))
        self.attn_mask[64:, 64:] = -4.0 * (tokens[:, None] - tokens).abs()

    def __call__(self, args, extra):
        return extra["original_block"](args | {"attn_mask": self.attn_mask[None, None]})


def with_regional_attention(patcher, mask):
    patcher = patcher.clone()
    for block in ("double_block", "single_block"):
        patcher.set_model_patch_replace(RegionalAttention(mask), "dit", block, 0)
    return patcher


KINDS = {
    "an object with arguments": ("sd15", with_several),
    "functools.partial": ("sd15", with_partial),
    "bound methods": ("sd15", with_bound_methods),
    "closures": ("sd15", with_closures),
    "a default argument": ("sd15", with_default),
    "an object in an object": ("sd15", with_block_patch),
    "blocks of a transformer": ("flux_dev", with_dit_blocks),
}


class RegionsHook(comfy.hooks.TransformerOptionsHook):
    """Puts regions into the model for one conditioning only, through what the host merges last."""

    def __init__(self, mask, scope):
        super().__init__(hook_scope=scope)
        regions = Regions(mask)
        self.transformers_dict = {
            "patches": {"attn2_patch": [regions.keys], "attn2_output_patch": [regions.output]},
            "a_pack": {"mask": mask, "conds": [embeds()]},
        }


def hooked(conds: list, mask, scope) -> list:
    group = comfy.hooks.HookGroup()
    group.add(RegionsHook(mask, scope))
    return comfy.hooks.set_hooks_for_conditioning(conds, group)

"""How much work are a network's layers, for a patch, a token of text and a pair of them in attention?

Asked of the layers themselves, by their names and sizes, whatever the family. Checked against operations that torch
counts on the host's networks at full size.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from .windows import WindowCost

# Names of layers in a network's blocks: those that see one vector a window, those of the text in blocks that it passes
# beside the patches, and those through which patches look at it.
ONCE = re.compile(r"(^|[._])(mod|modulation)([._]|$)|adaln|emb_layers", re.IGNORECASE)
TEXT = re.compile(r"(^|[._])(txt|text|context|cap)_|add_[qkv]_proj|to_add_out")
LOOKED_AT = re.compile(r"(cross_attn\.[kv]|attn2\.to_[kv])$")
# SD 3.5 medium's patches attend to each other a second time.
ATTENTION_AGAIN = re.compile(r"x_block\.attn2$")

# Cells of a UNet's patch, along a side: its input is halved three times at most.
UNET_PATCH = 8


@dataclass(frozen=True, slots=True)
class Work:
    """What a network's blocks do: weights that a patch passes and that a token of text passes, and the widths of all attentions.

    looking: the widths of attention in which patches look at a text that does not itself go on; 0 where it does.
    """

    patch: float = 0.0
    text: float = 0.0
    attention: float = 0.0
    looking: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.patch + other.patch, self.text + other.text, self.attention + other.attention, self.looking + other.looking)

    def cost(self, patch: int, frames: int, text_tokens: int, width: int) -> WindowCost:
        """The price of a window by these layers; a middling transformer's where nothing is known of them.

        A weight is two operations on what passes it, a pair in attention four for each of its width.
        """
        if not self.patch or not self.attention:
            return WindowCost(patch, frames, text_tokens, width)
        weights = self.patch + 2 * self.looking * text_tokens
        return WindowCost(patch, frames, text_tokens, width, weights / (2 * self.attention * width), self.text / weights, not self.looking)


def network_work(network, width: int) -> Work:
    """What the network's blocks do, whatever its family."""
    return unet_work(network) if hasattr(network, "input_blocks") else transformer_work(network, width)


def transformer_work(network, width: int) -> Work:
    """Of the blocks that patches pass one after another; not of those of the text alone, nor of blocks without attention."""
    lists = [blocks for name, blocks in network.named_children() if isinstance(blocks, torch.nn.ModuleList) and not TEXT.search(name)]
    return sum((_block_work(block, width) for blocks in lists for block in blocks if _has_heads(block)), Work())


def unet_work(network) -> Work:
    """Of a patch of UNET_PATCH cells a side, which each halving makes a quarter as many positions."""
    work, positions = Work(), float(UNET_PATCH ** 2)
    for module in (module for block in (*network.input_blocks, network.middle_block, *network.output_blocks) for module in block):
        positions *= {"Downsample": 1 / 4, "Upsample": 4.0}.get(type(module).__name__, 1.0)
        here = _block_work(module, 0)
        width = sum(layer.out_features for name, layer in module.named_modules() if name.endswith("attn1.to_q"))
        work += Work(here.patch * positions, here.text if here.looking else 0.0, width * positions ** 2, here.looking * positions)
    return work


def _block_work(block: torch.nn.Module, width: int) -> Work:
    """Of one block, whose attention is so wide. Where it has no layers for the text alone, text passes those of the patches."""
    patch = text = looking = 0
    for name, layer in block.named_modules():
        if ONCE.search(name):
            continue
        if LOOKED_AT.search(name):
            text, looking = text + _weights(layer), looking + layer.out_features / 2
        elif TEXT.search(name):
            text += _weights(layer)
        else:
            patch += _weights(layer)
    again = sum(bool(ATTENTION_AGAIN.search(name)) for name, _ in block.named_modules())
    return Work(patch, text or patch, width * (1 + again), looking)


def _weights(layer: torch.nn.Module) -> int:
    """Of a linear layer or a convolution, by its sizes, since quantised ones are stored in other shapes."""
    if hasattr(layer, "in_features"):
        return layer.in_features * layer.out_features
    if hasattr(layer, "in_channels") and hasattr(layer, "kernel_size"):
        return layer.in_channels * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    return 0


def _has_heads(block: torch.nn.Module) -> bool:
    return any(name.endswith("heads") for module in block.modules() for name in vars(module))

"""Trains the demo's diffusion model: the host's own Flux class, small enough for a git repository.

    COMFYUI_DIR=... torchrun --nproc-per-node 2 demo/train_denoiser.py --minutes 60

Flow matching on windows of latents that the demo's autoencoder made. Sigmas lean towards the low and middle
levels, which is where image to image works. The text is two tokens of zeros, always.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional

from measures import denoising_gains
from photos import Crops, enlarged, held_out_photos, to_array
from training import (
    MODELS, Averaged, Budget, add_arguments, append_row, join_workers, learn, load_weights, optimizers_for, reduced_precision, save_half,
    use_host,
)

use_host()
import comfy.model_management
import comfy.ops
from comfy.ldm.flux.model import Flux
from comfy.taesd.taesd import TAESD

LATENT_CHANNELS = 16
# The host's LotusConditioning node gives two tokens of 1024; it is its only source of a conditioning without a text encoder.
TEXT_TOKENS, TEXT_CHANNELS = 2, 1024
# What the host's detection reads from the weights, or assumes: it fixes head size, ratio, patch and theta.
SHAPE = dict(
    image_model="flux", in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, vec_in_dim=None, context_in_dim=TEXT_CHANNELS,
    hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=8, axes_dim=[16, 56, 56], theta=10000,
    patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[],
)
ADAM_ONLY = ("img_in", "txt_in", "time_in", "final_layer")
# Side in cells, and how often; every batch holds about the same number of tokens. Each shape is compiled on its own.
WINDOWS = (32, 48, 64)
WINDOW_SHARES = (0.6, 0.28, 0.12)
TOKENS = 2048
STEPS_PER_NEW_PICTURE = 8
# How many times a soft picture was enlarged; and the sigma from which on all its softness is let through.
ENLARGED = (1.5, 3.2)
SOFT_SIGMA = 0.15


class TrainingOps(comfy.ops.disable_weight_init):
    """The host's layers, but norms keep their own copy of an input that the blocks later add to in place."""

    class LayerNorm(comfy.ops.disable_weight_init.LayerNorm):
        def forward(self, x):
            return super().forward(x.clone())


# Where each block's attention looks at first, in patches down and right of its own.
FIRST_LOOKS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (0, 0), (1, 1), (-1, -1), (0, 0))
SHARP_FREQUENCIES = 6


@torch.no_grad()
def look_at_neighbours(model):
    """Starts every block's attention as a soft look at a neighbouring patch, the same whatever is in it.

    The biases of query and key alone make it: under rotary positions their product is a bump around the offset. From
    random weights a transformer takes most of a short training to find out what is next to what.
    """
    size, axes = sum(SHAPE["axes_dim"]), SHAPE["axes_dim"]
    layers = [model.double_blocks[0].img_attn.qkv] + [block.linear1 for block in model.single_blocks]
    for layer, offsets in zip(layers, FIRST_LOOKS):
        layer.weight[: 2 * size] *= 0.2
        for axis, offset in zip((1, 2), offsets):
            for index in range(SHARP_FREQUENCIES):
                first = sum(axes[:axis]) + 2 * index
                angle = torch.tensor(offset * SHAPE["theta"] ** (-2 * index / axes[axis]))
                layer.bias[first], layer.bias[first + 1] = 2 * angle.cos(), 2 * angle.sin()
                layer.bias[size + first] = 2


def build(operations=TrainingOps):
    """The host's module; modulation and output start at zero, so every block starts as the identity."""
    model = Flux(dtype=torch.float32, operations=operations, **SHAPE)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        elif parameter.ndim < 2 or "mod" in name or name.startswith(("final_layer", "txt_in")):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.xavier_uniform_(parameter)
    look_at_neighbours(model)
    model.txt_in.weight.requires_grad_(False)
    return model


def keep_residual_in_full_precision(model):
    """Under autocast the first layers would hand on bf16 and everything added to it would be rounded."""
    for layer in (model.img_in, model.txt_in):
        layer.register_forward_hook(lambda module, inputs, output: output.float())


def load_encoder(path):
    autoencoder = TAESD(latent_channels=LATENT_CHANNELS)
    autoencoder.load_state_dict(load_weights(path))
    return autoencoder.taesd_encoder.to(memory_format=torch.channels_last).requires_grad_(False)


@torch.no_grad()
def encode(encoder, pixels):
    """Pixels, 0 to 1, to latents as the diffusion model sees them (the host's process_latent_in applied)."""
    with reduced_precision():
        return encoder(pixels.contiguous(memory_format=torch.channels_last)).float().contiguous()


def latent_pair(encoder, crops, side):
    """Latents of a crisp picture of `side` px, mirrored where the photo is smaller, and of it shrunk and enlarged again."""
    crisp = crops.batch(1, side, side, 1.2, 2.2)
    soft = enlarged(crisp[0].transpose(1, 2, 0), crops.rng.uniform(*ENLARGED)).transpose(2, 0, 1)[None]
    return encode(encoder, torch.from_numpy(np.concatenate([crisp, soft]))).flatten(0, 1)


def draw_windows(rng, bank):
    """A batch of windows of one shape from anywhere in the bank, crisp and soft."""
    side = rng.choice(WINDOWS, p=WINDOW_SHARES)
    rows, columns = bank.shape[2] - side + 1, bank.shape[3] - side + 1
    places = [(rng.integers(len(bank)), rng.integers(rows), rng.integers(columns)) for _ in range(TOKENS * 4 // side ** 2)]
    return torch.stack([bank[index, :, top:top + side, left:left + side] for index, top, left in places]).chunk(2, 1)


def draw_sigmas(rng, count):
    """Four in five between 0.03 and 0.7, the rest anywhere."""
    common = rng.random(count) < 0.8
    return torch.from_numpy(np.where(common, rng.uniform(0.03, 0.7, count), rng.uniform(0.001, 1, count)).astype(np.float32))


def velocity(model, x, sigma):
    """The model under the conditioning it is always used with; the host passes sigma itself as the timestep."""
    text = torch.zeros(len(x), TEXT_TOKENS, TEXT_CHANNELS)
    with reduced_precision():
        return model(x, sigma, text).float()


def objective(model, crisp, soft, sigma, soft_share):
    """Flow matching that ends at the crisp latent, with a share of the windows more or less soft on the way.

    Softness grows with sigma, so that the velocity stays bounded and a sampler that starts from a soft picture meets
    on its way what was trained.
    """
    level = sigma.view(-1, 1, 1, 1)
    softness = (torch.rand_like(level) < soft_share) * torch.rand_like(level) * (level / SOFT_SIGMA).clamp(max=1)
    x = torch.lerp(torch.lerp(crisp, soft, softness), torch.randn_like(crisp), level)
    return functional.mse_loss(velocity(model, x, sigma), (x - crisp) / level)


def denoised(model, x, sigma):
    return x - sigma * velocity(model, x, torch.full((len(x),), sigma))


def held_out_latents(encoder):
    return [encode(encoder, torch.from_numpy(to_array(photo)).permute(2, 0, 1)[None]) for photo in held_out_photos().values()]


def report(averaged, latents, arguments, row):
    """Scores the averaged weights on held-out photos, logs the row, and saves them."""
    with torch.no_grad():
        row.update(denoising_gains(lambda x, sigma: denoised(averaged.module, x, sigma), latents))
    append_row(arguments.curve, row)
    save_half(averaged.module.state_dict(), arguments.out)


def start(arguments):
    model = build()
    keep_residual_in_full_precision(model)
    if arguments.resume:
        model.load_state_dict(load_weights(arguments.resume))
    return model


def train(arguments):
    worker = join_workers()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = start(arguments)
    torch.manual_seed(arguments.seed + worker)
    rng = np.random.default_rng(arguments.seed + worker)
    encoder = load_encoder(arguments.autoencoder)
    crops = Crops(arguments.seed + worker, synthetic_share=0.2)
    bank = torch.stack([latent_pair(encoder, crops, arguments.side) for _ in range(arguments.pictures)])
    latents = held_out_latents(encoder)
    optimizers = optimizers_for(model.named_parameters(), ADAM_ONLY)
    averaged, budget = Averaged(model), Budget(arguments.minutes, 20 if arguments.resume else 100)
    if arguments.compile:
        model.compile(dynamic=False)

    def next_loss(step):
        if step % STEPS_PER_NEW_PICTURE == 0:
            bank[rng.integers(len(bank))] = latent_pair(encoder, crops, arguments.side)
        crisp, soft = draw_windows(rng, bank)
        return objective(model, crisp, soft, draw_sigmas(rng, len(crisp)), arguments.soft_share)

    learn(
        model, next_loss, budget, (lambda row: report(averaged, latents, arguments, row)) if worker == 0 else None, averaged=averaged, optimizers=optimizers,
        learning_rate=arguments.learning_rate, first_report=2, report_every=4)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "denoiser", seed=2, learning_rate=2e-3)
    parser.add_argument("--pictures", type=int, default=100, help="pictures in the latent bank at a time")
    parser.add_argument("--soft-share", type=float, default=0.0, help="share of the windows that are soft on the way to the crisp ones")
    parser.add_argument("--compile", action="store_true", help="a third faster; takes a C++ compiler and a minute at the start")
    parser.add_argument("--side", type=int, default=512, help="side of each in pixels")
    parser.add_argument("--autoencoder", type=Path, default=MODELS / "autoencoder.safetensors")
    return parser.parse_args()


if __name__ == "__main__":
    comfy.model_management.in_training = True
    train(parse_arguments())

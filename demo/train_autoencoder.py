"""Trains the demo's autoencoder: the host's tiny autoencoder (TAESD) with 16 latent channels, 8 px per cell.

    COMFYUI_DIR=... torchrun --nproc-per-node 2 demo/train_autoencoder.py --minutes 60

The encoder starts as a linear codec (the principal components of 8 x 8 px blocks), so that the decoder has
something to learn from at once.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as functional

from measures import psnr
from photos import Crops, held_out_photos, to_array, to_picture
from training import (
    Averaged, Budget, add_arguments, append_row, join_workers, learn, load_weights, optimizers_for, reduced_precision, save_half,
    use_host,
)

use_host()
from comfy.taesd.taesd import TAESD, Block

LATENT_CHANNELS = 16
# The host's Flux latent format; with these the decoder sees the latent that the diffusion model sees.
SCALE_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
COMPONENTS = 60
# Layers of the host's encoder and decoder between which the stages are cut: up to `EARLY` the encoder only moves
# pixels to channels; up to `MIDDLE` the decoder works on cells and on blocks of 4 x 4 px.
EARLY, MIDDLE = 7, 10
BLOCK_PIXELS = 48
ADAM_ONLY = ("taesd_encoder.0.", "taesd_encoder.14.", "taesd_decoder.1.", "taesd_decoder.19.")


def build():
    """The host's module with random weights; every block starts as a plain ReLU."""
    model = TAESD(latent_channels=LATENT_CHANNELS)
    model.vae_scale.data.fill_(SCALE_FACTOR)
    model.vae_shift.data.fill_(SHIFT_FACTOR)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            torch.nn.init.zeros_(module.conv[4].weight)
    return model


def leave_out_blocks(model):
    """Runs the costly blocks of the first minutes as the ReLU that they start as, which takes a third of the time."""
    for part, layers in ((model.taesd_encoder, (1, 4, 5)), (model.taesd_decoder, (14, 15, 18))):
        for layer in layers:
            part[layer].forward = torch.relu


def run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def space_to_depth(x):
    return torch.cat([x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)], 1)


def depth_to_space(x):
    count, channels, height, width = x.shape
    x = x.reshape(count, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(count, channels // 4, height * 2, width * 2)


@torch.no_grad()
def start_encoder_as_linear_codec(encoder, pixels):
    """Channels 0.. carry the pixels themselves, space to depth at each stride, and one channel the constant 1."""
    encoder[0].weight[:4] = 0
    for channel in range(3):
        encoder[0].weight[channel, channel, 1, 1] = 1
    encoder[0].bias[3] = 1
    for layer, count in ((2, 12), (6, BLOCK_PIXELS)):
        weight = encoder[layer].weight
        weight[: count + 1] = 0
        for out in range(count):
            tap, channel = divmod(out, count // 4)
            weight[out, channel, 1 + tap // 2, 1 + tap % 2] = 1
        weight[count, count // 4, 1, 1] = 1
    fit_components(encoder, pixels)


def fit_components(encoder, pixels):
    """Last stride: the leading principal components of a block, lifted to stay positive; last layer: 16 of them."""
    blocks = space_to_depth(space_to_depth(space_to_depth(pixels))).permute(0, 2, 3, 1).reshape(-1, 4 * BLOCK_PIXELS)
    mean = blocks.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov(blocks.T))
    deviation = variances.flip(0)[:COMPONENTS].sqrt()
    target = deviation ** 0.25
    target = target / target[:LATENT_CHANNELS].square().mean().sqrt()
    projection = vectors.flip(1)[:, :COMPONENTS] * (target / deviation)
    lift = -((blocks - mean) @ projection).min(0).values
    weight = encoder[10].weight
    weight[: COMPONENTS + 1] = 0
    for tap in range(4):
        part = projection[BLOCK_PIXELS * tap: BLOCK_PIXELS * (tap + 1)]
        weight[:COMPONENTS, :BLOCK_PIXELS, 1 + tap // 2, 1 + tap % 2] = part.T
    weight[:COMPONENTS, BLOCK_PIXELS, 1, 1] = lift - mean @ projection
    weight[COMPONENTS, BLOCK_PIXELS, 1, 1] = 1
    encoder[14].weight.zero_()
    for channel in range(LATENT_CHANNELS):
        encoder[14].weight[channel, channel, 1, 1] = 1
    encoder[14].bias.copy_(-lift[:LATENT_CHANNELS])


def fit_convolution(weight, features, target):
    """Sets the first rows of a 3 x 3 convolution without bias to the least-squares fit of the target."""
    columns = functional.unfold(features, 3, padding=1).transpose(1, 2).flatten(0, 1)
    wanted = target.flatten(2).transpose(1, 2).flatten(0, 1)
    moments = columns.T @ columns
    moments.diagonal().add_(1e-4 * moments.diagonal().mean() + 1e-8)
    solution = torch.linalg.solve(moments, columns.T @ wanted)
    weight[: wanted.shape[1]] = solution.T.reshape(-1, *weight.shape[1:])


@torch.no_grad()
def start_decoder_as_linear_fit(model, pixels):
    """Both signs of the latent pass the first ReLU; each upsampling then predicts the pixels of ever smaller blocks.

    Nearest upsampling followed by a convolution cannot place pixels by itself, so this is a blurry start, but one in
    which channels 0.. mean the same thing everywhere.
    """
    decoder = model.taesd_decoder
    decoder[1].weight[: 2 * LATENT_CHANNELS] = 0
    for channel in range(LATENT_CHANNELS):
        decoder[1].weight[channel, channel, 1, 1] = 1
        decoder[1].weight[LATENT_CHANNELS + channel, channel, 1, 1] = -1
    decoder[1].bias[-1] = 1
    halves = space_to_depth(pixels)
    features = run([decoder[index] for index in range(7)], model.taesd_encoder(pixels))
    fit_convolution(decoder[7].weight, features, space_to_depth(halves))
    doubled = functional.interpolate(blocks_of_four(pixels), scale_factor=2)
    fit_convolution(decoder[12].weight, doubled, halves)
    decoder[12].weight[:, BLOCK_PIXELS:] = 0
    decoder[10].conv[0].weight[:, BLOCK_PIXELS:] = 0
    features = run([decoder[index] for index in range(10, 17)], blocks_of_four(pixels))
    fit_convolution(decoder[17].weight, features, pixels)
    decoder[19].weight.mul_(0.05)
    decoder[19].weight[:, :3] = 0
    for channel in range(3):
        decoder[19].weight[channel, channel, 1, 1] = 1


def blocks_of_four(pixels):
    """What the decoder's channels mean at a quarter of the resolution: the 48 values of 4 x 4 px, and 16 unused."""
    return functional.pad(space_to_depth(space_to_depth(pixels)), (0, 0, 0, 0, 0, 64 - BLOCK_PIXELS))


def reconstruct(model, pixels):
    return model.decode(model.encode(pixels * 2 - 1)) / 2 + 0.5


def gradients(pixels):
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def picture_loss(decoded, pixels):
    """Absolute, squared and gradient errors."""
    error = (decoded.float() - pixels).abs()
    edges = sum(functional.l1_loss(a, b) for a, b in zip(gradients(decoded.float()), gradients(pixels)))
    return error.mean() + 10 * error.square().mean() + 0.5 * edges


def noisy(latent, largest):
    return latent + torch.rand(len(latent), 1, 1, 1) * largest * torch.randn_like(latent)


def power_loss(latent):
    """Keeps the mean square of latents at 1 and their means at 0, as flow matching wants them."""
    latent = latent.float()
    return 0.01 * ((latent.square().mean() - 1) ** 2 + latent.mean((0, 2, 3)).square().mean())


def cells_objective(model, pixels, latent_noise):
    """Encoder and low resolutions of the decoder: the 4 x 4 px blocks that its channels should hold."""
    with torch.no_grad():
        early = run([model.taesd_encoder[index] for index in range(EARLY)], pixels)
    latent = run([model.taesd_encoder[index] for index in range(EARLY, 15)], early)
    features = run([model.taesd_decoder[index] for index in range(MIDDLE)], noisy(latent, latent_noise))
    return picture_loss(depth_to_space(depth_to_space(features[:, :BLOCK_PIXELS])), pixels) + power_loss(latent)


def pixels_objective(model, pixels, latent_noise):
    """High resolutions of the decoder: pixels from true 4 x 4 px blocks that are a little noisy."""
    blocks = blocks_of_four(pixels)
    blocks[:, :BLOCK_PIXELS] += latent_noise * 0.1 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(blocks[:, :BLOCK_PIXELS])
    return picture_loss(run([model.taesd_decoder[index] for index in range(MIDDLE, 20)], blocks.relu()), pixels)


def whole_objective(model, pixels, latent_noise):
    latent = model.taesd_encoder(pixels)
    return picture_loss(model.taesd_decoder(noisy(latent, latent_noise)), pixels) + power_loss(latent)


OBJECTIVES = {"cells": cells_objective, "pixels": pixels_objective, "whole": whole_objective}


@torch.no_grad()
def held_out_psnr(model, folder=None):
    """Name to dB of the clamped reconstruction; pictures go to `folder` to be looked at."""
    results = {}
    for name, photo in held_out_photos().items():
        pixels = torch.from_numpy(to_array(photo)).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
        with reduced_precision():
            decoded = reconstruct(model, pixels).float().clamp(0, 1)
        results[name] = psnr(decoded, pixels)
        if folder:
            to_picture(decoded[0].permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return results


def report(averaged, arguments, row):
    """Scores the averaged weights on held-out photos, logs the row, and saves them."""
    row.update(held_out_psnr(averaged.module, arguments.pictures))
    append_row(arguments.curve, row)
    save_half(averaged.module.state_dict(), arguments.out)


def high_resolutions(state):
    """The decoder's layers that the stage `pixels` trains."""
    return {key: value for key, value in state.items() if key.startswith("taesd_decoder.") and int(key.split(".")[1]) >= MIDDLE}


def start(arguments):
    """A fresh model with its linear encoder, or the weights of an earlier run."""
    model = build()
    if arguments.resume:
        model.load_state_dict(load_weights(arguments.resume))
        if arguments.pixels_from:
            model.load_state_dict(high_resolutions(load_weights(arguments.pixels_from)), strict=False)
    else:
        pixels = torch.from_numpy(Crops(arguments.seed).batch(60, 96, 96))
        start_encoder_as_linear_codec(model.taesd_encoder, pixels)
        start_decoder_as_linear_fit(model, pixels)
    if arguments.fewer_blocks:
        leave_out_blocks(model)
    return model.to(memory_format=torch.channels_last)


def train(arguments):
    worker = join_workers()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = start(arguments)
    torch.manual_seed(arguments.seed + worker)
    crops = Crops(arguments.seed + worker, synthetic_share=arguments.synthetic_share)
    model.vae_scale.requires_grad_(False)
    model.vae_shift.requires_grad_(False)
    optimizers = optimizers_for(model.named_parameters(), ADAM_ONLY)
    averaged, budget = Averaged(model), Budget(arguments.minutes, 20 if arguments.resume else 100)

    def next_loss(step):
        pixels = torch.from_numpy(crops.batch(arguments.batch, arguments.side, arguments.side, 0.6, 2.5))
        with reduced_precision():
            return OBJECTIVES[arguments.stage](model, pixels.contiguous(memory_format=torch.channels_last), arguments.latent_noise)

    learn(
        model, next_loss, budget, (lambda row: report(averaged, arguments, row)) if worker == 0 else None, averaged=averaged, optimizers=optimizers,
        learning_rate=arguments.learning_rate, first_report=1, report_every=2)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "autoencoder", seed=1, learning_rate=1e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="crop side in pixels")
    parser.add_argument("--synthetic-share", type=float, default=0.3, help="share of crops that come from synthetic textures")
    parser.add_argument("--latent-noise", type=float, default=0.1, help="largest deviation of noise on the latents; they have unit power")
    parser.add_argument("--stage", choices=OBJECTIVES, default="whole")
    parser.add_argument("--fewer-blocks", action="store_true", help="for the first run: leave the costly blocks as they start")
    parser.add_argument("--pictures", type=Path, help="folder for reconstructions of the held-out photos, to be looked at")
    parser.add_argument("--pixels-from", type=Path, help="weights of a run of the stage `pixels`, to go on from together with --resume")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())

"""Autoencoders of the kinds that the host loads, small enough for a processor.

Those of `KINDS` go through the host's own loader, with seeded weights and without an encoder. `fitted()` makes pictures: its
weights are those of tests/fit_autoencoder.py, and what it decodes are latents of the demo's autoencoder, `demo()`.
"""
from __future__ import annotations

import functools
import logging
from pathlib import Path

import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.sd
import comfy.taesd.taesd
import comfy.utils
import torch
from safetensors.torch import load_file
from tiny_models import drawer, seeded_weights

ROOT = Path(__file__).resolve().parent.parent
FITTED = Path(__file__).resolve().parent / "models" / "autoencoder_kl.safetensors"
SIZES = dict(double_z=True, resolution=256, in_channels=3, out_ch=3, num_res_blocks=2, attn_resolutions=[], dropout=0.0)


@functools.lru_cache(maxsize=None)
def demo() -> comfy.sd.VAE:
    """The demo's: a tiny autoencoder, without normalisations."""
    return comfy.sd.VAE(comfy.utils.load_torch_file(str(ROOT / "demo" / "models" / "autoencoder.safetensors")))


@functools.lru_cache(maxsize=None)
def fitted() -> comfy.sd.VAE:
    """An AutoencoderKL that was fitted to decode the demo's latents."""
    sizes = {**SIZES, "ch": 32, "ch_mult": [1, 1, 2, 2], "z_channels": 16}
    weights = {"decoder." + name: value for name, value in unpacked(load_file(FITTED)).items()}
    weights |= {"post_quant_conv.weight": torch.eye(16)[:, :, None, None], "post_quant_conv.bias": torch.zeros(16)}
    return loaded(weights, config={"params": {"ddconfig": sizes, "embed_dim": 16}}, dtype=torch.float32)


def unpacked(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights from bytes: each row of a matrix has its own scale."""
    return {
        name: value.float() * stored[name + ".scale"].float().view(-1, *[1] * (value.ndim - 1)) if value.dtype == torch.int8 else value.float()
        for name, value in stored.items() if not name.endswith(".scale")}


def loaded(weights: dict[str, torch.Tensor], **arguments) -> comfy.sd.VAE:
    """The host's loader, which warns of the encoder that is missing."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        return comfy.sd.VAE(weights, **arguments)
    finally:
        logging.getLogger().setLevel(level)


def kl(channels: int, packed: bool = False, seed: int = 0) -> comfy.sd.VAE:
    """As SD's (4 channels), SD3's and FLUX's (16); packed as FLUX.2's (32, by 2 x 2)."""
    sizes = {**SIZES, "ch": 32, "ch_mult": [1, 2, 4, 4], "z_channels": channels}
    model = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig={**sizes, "batch_norm_latent": packed}, embed_dim=channels)
    weights = {name: value for name, value in seeded_weights(model, seed).items() if name.startswith(("decoder.", "post_quant_conv."))}
    if packed:
        weights |= {"bn.running_mean": drawer(1)(4 * channels) * 0.1, "bn.running_var": torch.linspace(0.5, 2, 4 * channels)}
    return loaded(weights, dtype=torch.float32)


def tiny(channels: int) -> comfy.sd.VAE:
    """As TAESD (4), TAEF1 (16) and the one of FLUX.2 (128, packed, with normalisations in its middle)."""
    return loaded({**seeded_weights(comfy.taesd.taesd.TAESD(latent_channels=channels)), "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}, dtype=torch.float32)


def wan() -> comfy.sd.VAE:
    """As Wan 2.1's and Qwen-Image's."""
    sizes = dict(z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True])
    return loaded(seeded_weights(comfy.ldm.wan.vae.WanVAE(dim=16, **sizes)), dtype=torch.float32)


KINDS = {
    "SD": lambda: kl(4), "FLUX": lambda: kl(16), "FLUX.2": lambda: kl(32, packed=True), "TAESD": lambda: tiny(4), "TAEF1": lambda: tiny(16), "TAEF2": lambda: tiny(128),
    "Wan": wan,
}


@functools.lru_cache(maxsize=None)
def of_kind(name: str) -> comfy.sd.VAE:
    return KINDS[name]()


def latent_for(vae: comfy.sd.VAE, height: int, width: int, batch: int = 1, seed: int = 1, frames: int = 1) -> torch.Tensor:
    """Something to decode for a picture of so many px: soft noise."""
    cell_px = vae.spacial_compression_decode()
    shape = (batch, vae.latent_channels, *((frames,) if vae.latent_dim == 3 else ()), height // cell_px, width // cell_px)
    noise = drawer(seed)(*shape)
    flat = torch.nn.functional.avg_pool2d(noise.flatten(0, -3), 3, 1, 1, count_include_pad=False).reshape(shape)
    return 2 * flat + 0.3 * noise

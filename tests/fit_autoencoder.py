"""Fits the decoder of an AutoencoderKL, small but with all its parts, to the latents of the demo's autoencoder.

    COMFYUI_DIR=... python tests/fit_autoencoder.py --minutes 40

Tests of decoding need one whose pictures are pictures; weights at random say little of how statistics differ between the
parts of a photo. The weights are stored in bytes.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "demo"))
from photos import Crops, held_out_photos, to_array  # noqa: E402
from train_autoencoder import MODELS, TAESD, np, picture_loss  # noqa: E402
from training import Averaged, Budget, load_weights, optimizers_for, reduced_precision, take_step  # noqa: E402

from comfy.ldm.modules.diffusionmodules.model import Decoder  # noqa: E402
from measures import psnr  # noqa: E402

SIDE = 128
SIZES = dict(ch=32, ch_mult=[1, 1, 2, 2], num_res_blocks=2, attn_resolutions=[], in_channels=3, out_ch=3, resolution=256, z_channels=16)


def demo_autoencoder() -> TAESD:
    model = TAESD(latent_channels=16).eval().requires_grad_(False)
    model.load_state_dict(load_weights(MODELS / "autoencoder.safetensors"))
    return model


def new_decoder() -> Decoder:
    decoder = Decoder(**SIZES)
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
            module.weight.data.mul_(0.3 if name.endswith("conv2") else 0.36 if name == "conv_in" else 1)
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return decoder.to(memory_format=torch.channels_last)


def some_crops(model: TAESD) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and their latents."""
    crops = Crops(1, synthetic_count=40, synthetic_share=0.2)
    pixels = torch.from_numpy(np.concatenate([crops.batch(8, SIDE, SIDE, 0.6, 2.5) for _ in range(60)])) * 2 - 1
    with torch.no_grad(), reduced_precision():
        return pixels, torch.cat([model.encode(part) for part in pixels.split(8)]).float()


def fit(minutes: float) -> Decoder:
    """Crops of several sizes, so that neither borders nor statistics are always those of one."""
    torch.manual_seed(0)
    pixels, latents = some_crops(demo_autoencoder())
    decoder, budget = new_decoder(), Budget(minutes, 20)
    optimizers, averaged = optimizers_for(decoder.named_parameters(), ("conv_in", "conv_out")), Averaged(decoder, 0.995)
    while budget.advance():
        side = (96, 128, 64)[budget.step % 3] // 8
        chosen = torch.randint(len(pixels), (6,))
        top, left = torch.randint(SIDE // 8 - side + 1, (2,)).tolist()
        latent = latents[chosen, :, top:top + side, left:left + side]
        wanted = pixels[chosen, :, top * 8:(top + side) * 8, left * 8:(left + side) * 8]
        with reduced_precision():
            decoded = decoder(latent.contiguous(memory_format=torch.channels_last))
        take_step(picture_loss(decoded / 2 + 0.5, wanted / 2 + 0.5), optimizers, budget.factor(), 2e-3)
        averaged.update(decoder)
    return averaged.module


def in_bytes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each row of a matrix by its largest number."""
    stored = {}
    for name, value in weights.items():
        if value.ndim < 2:
            stored[name] = value.half()
            continue
        scale = (value.flatten(1).abs().amax(1) / 127).half().float().clamp_min(1e-7)
        stored[name] = (value / scale.view(-1, *[1] * (value.ndim - 1))).round().clamp(-127, 127).to(torch.int8).contiguous()
        stored[name + ".scale"] = scale
    return stored


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TESTS / "models" / "autoencoder_kl.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.enable_grad():
        decoder = fit(arguments.minutes)
    for name, photo in held_out_photos().items():
        pixels = torch.from_numpy(to_array(photo)).permute(2, 0, 1)[None]
        decoded = decoder(demo_autoencoder().encode(pixels * 2 - 1)) / 2 + 0.5
        print(f"{name}: {psnr(decoded.clamp(0, 1), pixels):.1f} dB")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(in_bytes(decoder.state_dict()), arguments.out)


if __name__ == "__main__":
    main()

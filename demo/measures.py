"""How good the demo's models are: agreement of pictures, and what the denoiser gains over a blur."""
import math

import torch
import torch.nn.functional as functional

SCORED_SIGMAS = (0.2, 0.4, 0.6)
BLUR_WIDTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)


def psnr(picture, reference, peak=1.0):
    return 10 * math.log10(peak ** 2 / torch.mean((picture.float() - reference.float()) ** 2).item())


def blurred(x, width):
    """Gaussian blur of a latent; `width` is its deviation in cells."""
    radius = math.ceil(3 * width)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / width) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(x.shape[1], 1, -1, -1)
    return functional.conv2d(functional.pad(x, (radius,) * 4, mode="reflect"), kernel, groups=x.shape[1])


def error_after_best_gain(estimate, latent):
    gain = (estimate * latent).sum() / estimate.square().sum()
    return (gain * estimate - latent).square().mean().item()


def gains_at(denoise, latent, sigma, generator):
    """dB that `denoise(x, sigma)` is closer to the latent than x is, and than the best Gaussian blur of x is.

    Noisy and blurred are given the scalar that suits each best, and the blur its best width.
    """
    x = sigma * torch.randn(latent.shape, generator=generator) + (1 - sigma) * latent
    error = (denoise(x, sigma) - latent).square().mean().item()
    others = error_after_best_gain(x, latent), min(error_after_best_gain(blurred(x, width), latent) for width in BLUR_WIDTHS)
    return [10 * math.log10(other / error) for other in others]


def denoising_gains(denoise, latents, sigmas=SCORED_SIGMAS):
    """Means over pictures of `gains_at`, as over_noisy_SIGMA and over_blur_SIGMA."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for sigma in sigmas:
        gains = torch.tensor([gains_at(denoise, latent, sigma, generator) for latent in latents])
        rows[f"over_noisy_{sigma}"], rows[f"over_blur_{sigma}"] = gains.mean(0).tolist()
    return rows

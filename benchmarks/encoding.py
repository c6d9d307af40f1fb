"""Would encoding an enlarged picture by windows pay? What it would take, and how near it would be to encoding everything."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import autoencoders
import comfy.ldm.models.autoencoder
import torch
import torch.nn.functional as F
from counting import LiveBytes
from measuring import table, timed
from plans import BUDGETS, PHOTOS, load_photo, photo_tree
from qtd_pack.decode_plan import parts_of
from qtd_pack.decoders import _halves
from qtd_pack.piecewise import Moments, normalised
from qtd_pack.placement import strength_raster
from qtd_pack.utils import Rect, cut, scaled
from tiny_models import seeded_weights

# The longest side of a part, and of the photo, in px.
PART_PX, ENCODED_PX = 256, 768

# What sampling sees around what is active: the nodes' default overlap.
OVERLAP_PX = 64


@dataclass(frozen=True)
class Layer:
    """One layer of an encoder: what it looks at before and after each place, and by how much it shrinks."""

    run: Callable
    before: int = 1
    after: int = 1
    shrinks: int = 1
    norm: torch.nn.Module | None = None


def layers_of(encoder) -> list[Layer]:
    """Those of the host's encoder down to its coarsest resolution."""
    layers = [Layer(lambda x, skip: (encoder.conv_in(x), None))]
    for level in encoder.down:
        layers += [Layer(half.run, norm=half.norm) for block in level.block for half in _halves(block)]
        if hasattr(level, "downsample"):
            layers.append(Layer(lambda x, skip, module=level.downsample: (module(x), None), before=0, shrinks=2))
    return layers


def moments_of(x: torch.Tensor, norm: torch.nn.GroupNorm) -> Moments:
    groups = x[0].unflatten(0, (norm.num_groups, -1)).flatten(1)
    found = [torch.var_mean(group, correction=0) for group in groups]
    return Moments(*(torch.stack([pair[which] for pair in found]).double() for which in (1, 0)))


def by_parts(encoder, x: torch.Tensor, largest: int, peaks: list[int] | None = None) -> torch.Tensor:
    """Features at the coarsest resolution, layer by layer in parts; normalised by all of them. peaks: gets the bytes that each part takes."""
    skip = None
    for layer in layers_of(encoder):
        moments = None if layer.norm is None else moments_of(x, layer.norm)
        kept = (x if skip is None else skip) if layer.norm is not None else None
        height, width = (side // layer.shrinks for side in x.shape[-2:])
        out = None
        for part in parts_of(Rect(0, 0, height, width), largest // layer.shrinks):
            with LiveBytes() if peaks is not None else contextlib.nullcontext() as live:
                rect = scaled(part, layer.shrinks)
                seen = Rect(max(rect.top - layer.before, 0), max(rect.left - layer.before, 0), min(rect.bottom + layer.after, x.shape[-2]), min(rect.right + layer.after, x.shape[-1]))
                piece, beside = (None if whole is None else cut(whole, seen) for whole in (x, kept))
                made, goes_on = layer.run(piece if moments is None else normalised(layer.norm, piece, moments), beside)
                top, left = (part.top - seen.top // layer.shrinks, part.left - seen.left // layer.shrinks)
                made = made[..., top:top + part.height, left:left + part.width]
            if peaks is not None:
                peaks.append(live.peak)
            out = x.new_empty(1, made.shape[1], height, width) if out is None else out
            out[..., part.top:part.bottom, part.left:part.right] = made
        x, skip = out, kept if goes_on is not None else None
        largest //= layer.shrinks
    return x


def coarsest(encoder, x: torch.Tensor) -> torch.Tensor:
    """What the encoder does at its coarsest resolution."""
    x = encoder.mid.block_2(encoder.mid.attn_1(encoder.mid.block_1(x, None)), None)
    return encoder.conv_out(F.silu(encoder.norm_out(x)))


def encoder_with_weights(width: int = 32) -> torch.nn.Module:
    """SD's, narrower, with seeded weights: what windows do to its statistics needs no pictures."""
    sizes = {**autoencoders.SIZES, "ch": width, "ch_mult": [1, 2, 4, 4], "z_channels": 4}
    model = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=sizes, embed_dim=4)
    model.load_state_dict(seeded_weights(model, 0))
    return model.encoder.eval()


def tiled(encoder, x: torch.Tensor, side: int, overlap: int) -> torch.Tensor:
    """As the host encodes by tiles."""
    import comfy.utils

    return comfy.utils.tiled_scale(x, encoder, side, side, overlap, upscale_amount=1 / 8, out_channels=8)


def encoded_rows(photos, side: int, part: int) -> list[tuple]:
    encoder, rows = encoder_with_weights(), []
    for name in photos:
        x = load_photo(name, side).movedim(-1, 1) * 2 - 1
        peaks: list[int] = []
        with LiveBytes() as live:
            whole = encoder(x)
        with LiveBytes() as waiting:
            ours = coarsest(encoder, by_parts(encoder, x, part, peaks))
        seconds = [timed(action) for action in (lambda: encoder(x), lambda: coarsest(encoder, by_parts(encoder, x, part)))]
        errors = [float((found - whole).abs().mean() / whole.std()) for found in (ours, tiled(encoder, x, part, part // 4))]
        rows.append((name, f"{errors[0]:.1e}", f"{errors[1]:.1e}", f"{max(peaks) / live.peak:.2f}", f"{waiting.peak / live.peak:.2f}", f"{seconds[1] / seconds[0]:.2f}"))
    return rows


def seen_rows(photos, side: int) -> list[tuple]:
    """The share of a picture that sampling sees: what is active, and the overlap around it."""
    rows = []
    for budget in BUDGETS:
        shares = []
        for name in photos:
            tree = photo_tree(name, side, budget)
            active = (strength_raster(tree, tree.height // 8, tree.width // 8) > 0).float()
            reach = OVERLAP_PX // 8
            shares.append(float(F.max_pool2d(active[None, None], 2 * reach + 1, 1, reach).mean()))
        rows.append((budget, f"{sum(shares) / len(shares):.2f}", f"{min(shares):.2f}"))
    return rows


def demo_error(photos, side: int, part: int) -> tuple[float, float]:
    """Of the demo's autoencoder: mean and most levels of 255 by which a tiled encode differs after decoding."""
    vae, means, most = autoencoders.demo(), [], 0.0
    for name in photos:
        picture = load_photo(name, side)
        one, other = (vae.decode(latent) for latent in (vae.encode(picture), vae.encode_tiled(picture, tile_x=part, tile_y=part, overlap=part // 4)))
        difference = 255 * (one - other).abs()
        means.append(float(difference.mean()))
        most = max(most, float(difference.max()))
    return sum(means) / len(means), most


def encode_part(tiny: bool) -> str:
    """Encoding."""
    photos, side, encoded_px, part = (PHOTOS[:1], 512, 256, 128) if tiny else (PHOTOS, 2048, ENCODED_PX, PART_PX)
    with torch.inference_mode():
        seen, rows = seen_rows(photos, side), encoded_rows(photos[:3], encoded_px, part)
        mean, most = demo_error(photos[:3], encoded_px, part)
    return (
        "## Encoding an enlarged picture\n\n" + table(("budget", "share that sampling sees", "least of the photos"), seen) +
        f"\nPhotos of {side} px, the nodes' defaults: what is active and the overlap around it has to be encoded. Encoding no more than that halves the time only where little changes.\n\n"
        + table(("photo", "error by parts", "error by tiles", "bytes at once", "and waiting", "time"), rows) +
        f"\nAn encoder as SD's, a quarter as wide, with weights at random; photos of {encoded_px} px, parts and tiles of {part} px. By parts: layer by layer, normalised by all of the picture. "
        "Errors are means, as shares of the standard deviation of what a whole encode gives; bytes and time, as shares of a whole encode's. What waits between two layers lies in the computer's memory, and goes to the device and back for each of them. "
        f"The demo's autoencoder has no normalisations: by parts it is exact, and by tiles {mean:.2f} levels of 255 away on average after decoding, {most:.0f} at most.\n\n"
        "Not built: at the usual budgets sampling sees most of the picture, so no half of the time is saved; by parts the device needs little memory, but all of it together no less than a whole encode does, "
        "as every layer waits whole for the statistics of the next one, and it takes longer.\n")

"""What does decoding only what changed cost, and how near is it to decoding everything?"""
from __future__ import annotations

import contextlib
import math
import statistics

import autoencoders
import comfy.ldm.models.autoencoder
import torch
import torch.nn.functional as F
from counting import LiveBytes
from measuring import table, timed
from plans import BUDGETS, PHOTOS, load_photo, photo_tree
from qtd_pack import decode, piecewise
from qtd_pack.compositing import composite
from qtd_pack.decode import decode_changed
from qtd_pack.decode_plan import Price, plan_decode
from qtd_pack.decoders import Decoder, decoder_of
from qtd_pack.placement import strength_raster
from qtd_pack.quadtree import build_quadtree
from torch.utils.flop_counter import FlopCounterMode


# The longest side of a window, and of a photo that is decoded, in px.
WINDOW_PX, DECODED_PX, DECODED_WINDOW_PX = 512, 768, 256


def sd_decoder() -> Decoder:
    """That of SD and SDXL at its own size, without weights."""
    sizes = {**autoencoders.SIZES, "ch": 128, "ch_mult": [1, 2, 4, 4], "z_channels": 4}
    with torch.device("meta"):
        return decoder_of(comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=sizes, embed_dim=4), 1)


def planned(decoder: Decoder, changed: torch.Tensor) -> float:
    """Operations of a decode of what changed, samples and all that is done once included, as a share of a whole decode's."""
    active = F.max_pool2d(changed[None, None].float(), decoder.cell_px)[0, 0] > 0
    price, plan = Price(decoder, *active.shape), plan_decode(decoder, active, WINDOW_PX // decoder.cell_px)
    return price.of_plan(plan) / price.whole


def planned_rows(photos, side: int) -> list[tuple]:
    decoder, rows = sd_decoder(), []
    for budget in BUDGETS:
        found = []
        for name in photos:
            tree = photo_tree(name, side, budget)
            changed = strength_raster(tree, tree.height, tree.width) > 0
            share, cost = float(changed.float().mean()), planned(decoder, changed)
            found.append((name, share, cost))
            rows.append((name, budget, f"{share:.2f}", f"{cost:.2f}", f"{cost / share:.2f}"))
        share, cost = (statistics.mean(values) for values in list(zip(*found))[1:])
        rows.append(("**mean**", budget, f"{share:.2f}", f"{cost:.2f}", f"{cost / share:.2f}"))
    return rows


@contextlib.contextmanager
def counting_parts():
    """The most bytes that each thing took that is done at once, beside what waits."""
    peaks, real = [], {(decode, "begin"): decode.begin, (piecewise, "made"): piecewise.made}

    def counted(function):
        def call(*args):
            with LiveBytes() as live:
                result = function(*args)
            peaks.append(live.peak)
            return result
        return call

    for (module, name), function in real.items():
        setattr(module, name, counted(function))
    try:
        yield peaks
    finally:
        for (module, name), function in real.items():
            setattr(module, name, function)


def measured(action) -> tuple[torch.Tensor, int, int]:
    """What an action gives; its operations, and the most bytes that lived at once."""
    with LiveBytes() as live, FlopCounterMode(display=False) as counter:
        result = action()
    return result, counter.get_total_flops(), live.peak


def levels(one: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> tuple[float, float]:
    differences = (255 * (one - other).abs())[:, where].flatten()
    return float(differences.mean()), float(differences.kthvalue(math.ceil(0.99 * len(differences))).values)


def decoded_row(name: str, side: int) -> dict[str, float]:
    """One photo decoded whole, by the host's tiles, and where it changed."""
    vae, picture, cells = autoencoders.fitted(), load_photo(name, side), DECODED_WINDOW_PX // 8
    latent, tree = autoencoders.demo().encode(picture), build_quadtree(picture, detail_budget=0.25, min_leaf=32, max_leaf=256)
    changed = strength_raster(tree, *picture.shape[1:3]) > 0
    decode, changes = lambda: vae.decode(latent), lambda: decode_changed(vae, latent, picture, tree, window=DECODED_WINDOW_PX)
    # Beside counting, small operations would seem slow.
    seconds = [timed(action) for action in (decode, changes)]
    whole, *of_whole = measured(decode)
    tiled, *of_tiled = measured(lambda: vae.decode_tiled(latent, tile_x=cells, tile_y=cells, overlap=cells // 4))
    with counting_parts() as parts:
        ours, *of_ours = measured(changes)
    expected = composite(picture, whole, tree)
    errors = dict(zip(("mean", "p99"), levels(ours, expected, changed)))
    errors |= dict(zip(("tiled mean", "tiled p99"), levels(composite(picture, tiled, tree), expected, changed)))
    shares = {f"{key}{what}": mine / all_of_it for key, values in (("", of_ours), ("tiled ", of_tiled)) for what, mine, all_of_it in zip(("operations", "bytes"), values, of_whole)}
    return {"share": float(changed.float().mean()), "time": seconds[1] / seconds[0], "at once": max(parts) / of_whole[1], **errors, **shares}


def decoded_rows(photos, side: int) -> list[tuple]:
    with torch.inference_mode():
        found = {name: decoded_row(name, side) for name in photos}
    found["**mean**"] = {key: statistics.mean(row[key] for row in found.values()) for key in next(iter(found.values()))}
    columns = ("share", "mean", "p99", "tiled mean", "tiled p99", "operations", "time", "at once", "bytes", "tiled operations", "tiled bytes")
    return [(name, *(f"{row[key]:.2f}" for key in columns)) for name, row in found.items()]


def decode_part(tiny: bool) -> str:
    """Decoding."""
    photos, side, decoded_px = (PHOTOS[:1], 512, 256) if tiny else (PHOTOS, 2048, DECODED_PX)
    text = "## Decoding only what changed\n\n" + table(("photo", "budget", "share with a strength", "operations of a whole decode", "ratio"), planned_rows(photos, side))
    text += (
        f"\nSD's and SDXL's decoder at its own size, photos of {side} px, windows of {WINDOW_PX} px; all that is done once and the samples for statistics included. "
        "Counted from its layers, as tests check against torch's own count. Limit: a ratio of 1.40. What is done once for the whole picture takes 7 % of a whole decode, and its attention more, so a small share pays more for itself; where nearly all changed, all is decoded, which needs no samples.\n\n")
    header = ("photo", "share", "mean error", "99 %", "tiled mean", "tiled 99 %", "operations", "time", "bytes at once", "and waiting", "tiled operations", "tiled bytes")
    return text + table(header, decoded_rows(photos, decoded_px)) + (
        f"\nAn AutoencoderKL fitted to the demo's latents, photos of {decoded_px} px, budget 0.25, windows of {DECODED_WINDOW_PX} px. Errors where something changed, in levels of 255, "
        "against a whole decode that is composited; tiled is the host's tiled decode of everything with tiles of that size. Operations, time and the most bytes that lived at once "
        "are shares of the whole decode's: at once, what a part of a window takes while it is computed, which is what has to lie on the device; and with the windows that wait for the others, for which the computer's memory does. Limits: 1.50, 6.00 and a third of tiled.\n")

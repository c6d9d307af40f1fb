"""How is only what changed decoded? In pixels, unless said otherwise.

Kept pixels are the original's, so only what has a strength above 0 goes through the decoder, in windows. The result is that of
decoding the whole and compositing it.
"""
from __future__ import annotations

import contextlib
import logging

import torch
import torch.nn.functional as F

import comfy.model_management
import comfy.utils

from .compositing import composite, share_of_result
from .decode_plan import Plan, plan_decode
from .decoders import Decoder, decoder_of
from .memory import if_memory
from .piecewise import Limits, begin, decode_windows
from .quadtree import Quadtree
from .utils import Rect, area, scaled

log = logging.getLogger(__name__)

# A window of the smallest size that is made where memory is short.
LEAST_WINDOW_PX = 128


def decode_changed(vae, samples: torch.Tensor, original: torch.Tensor, tree: Quadtree, *, feather: int = 32, window: int = 0) -> torch.Tensor:
    """Decode what has a strength above 0, and keep the original's pixels everywhere else, bit for bit.

    samples: a latent (B, C, [T,] h, w). original: (B, H, W, C), what was encoded. feather: see composite. window: the longest
    side of a window's core in px; 0 takes what memory allows. Returns (B * T, H, W, C). Raises ValueError for a VAE that is
    not one for pictures, for a latent that does not belong to it or holds NaN, and for sizes that do not belong together.
    """
    samples = check_latent(vae, samples)
    height, width = (cells * vae.spacial_compression_decode() for cells in samples.shape[-2:])
    alpha = _alpha(original, tree, height, width, feather)
    if not bool((alpha > 0).any()):
        return composite(original, _nothing(vae, samples, height, width), tree, feather=feather)
    image = _decoded(vae, samples, alpha, window)
    return composite(original, image, tree, feather=feather)


def check_latent(vae, samples: torch.Tensor) -> torch.Tensor:
    """The latent as its VAE takes it. Raises ValueError for one that it cannot decode."""
    vae.throw_exception_if_invalid()
    if vae.latent_dim == 1 or vae.extra_1d_channel is not None or vae.output_channels < 3:
        raise ValueError("vae: expected one for pictures, got one for sound or shapes. Connect the VAE that made the latent; VAE Decode Audio decodes sound.")
    if getattr(samples, "is_nested", False):
        raise ValueError("samples: expected a latent of pictures or a video, got several packed into one (video with sound). Separate them first, and decode the video's latent.")
    if vae.latent_dim == 2 and samples.ndim == 5:
        samples = samples[:, :, 0]
    decoder = decoder_of(vae.first_stage_model, samples.shape[2] if samples.ndim == 5 else 1)
    channels = vae.latent_channels if decoder is None else decoder.channels
    if samples.ndim != vae.latent_dim + 2 or samples.shape[1] != channels or 0 in samples.shape:
        raise ValueError(
            f"samples: expected a latent of this VAE, {channels} channels in {vae.latent_dim + 2} dimensions, got {tuple(samples.shape)}. "
            "Connect the VAE of the model that sampled it.")
    broken = (~torch.isfinite(samples)).flatten(0, -3).any(0)
    if bool(broken.any()):
        cell_px = vae.spacial_compression_decode()
        rows, cols = broken.nonzero(as_tuple=True)
        raise ValueError(
            f"samples: expected finite numbers, got NaN or infinite ones in {len(rows)} of {broken.numel()} cells, between x {int(cols.min()) * cell_px}, y {int(rows.min()) * cell_px} "
            f"and x {(int(cols.max()) + 1) * cell_px}, y {(int(rows.max()) + 1) * cell_px} px. The sampling made them: try another precision, sampler or strength.")
    return samples


def _nothing(vae, samples: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What is laid on the original where nothing changed; takes no memory."""
    frames = 1 if samples.ndim == 4 else samples.shape[2] if vae.temporal_compression_decode() is None else vae.upscale_ratio[0](samples.shape[2])
    return torch.zeros((), dtype=torch.float32).expand(len(samples) * frames, height, width, 3)


def _alpha(original: torch.Tensor, tree: Quadtree, height: int, width: int, feather: int) -> torch.Tensor:
    """How much of each pixel of the decoded picture is taken, (height, width). Raises ValueError for sizes that do not fit."""
    if original.ndim != 4 or 0 in original.shape:
        raise ValueError(f"original: expected a picture of shape (batch, height, width, channels), got {tuple(original.shape)}. Connect the picture that was encoded.")
    rows, cols = original.shape[1:3]
    if not (height <= rows and width <= cols):
        raise ValueError(
            f"original: expected the picture that was encoded, {width} x {height} px or less than a cell more, got {cols} x {rows}. "
            "Connect what went into VAE Encode, after all scaling.")
    alpha = share_of_result(original, torch.zeros(()).expand(1, height, width, 3), tree, feather=feather)
    top, left = (rows - height) // 2, (cols - width) // 2
    return alpha[top:top + height, left:left + width]


def _decoded(vae, samples: torch.Tensor, alpha: torch.Tensor, window: int) -> torch.Tensor:
    """The decoded picture, (B * T, height, width, C), right wherever alpha is above 0."""
    frames = samples.shape[2] if samples.ndim == 5 else 1
    decoder = decoder_of(vae.first_stage_model, frames)
    if decoder is None:
        what = "a video" if frames > 1 else "pictures"
        log.info("Quadtree Decode: %s is not known to decode %s by windows: all of it is decoded, and composited.", type(vae.first_stage_model).__name__, what)
        return _whole(vae, samples)
    context = getattr(comfy.model_management, "cuda_device_context", contextlib.nullcontext)
    with torch.no_grad(), context(vae.device):
        image = _by_windows(vae, decoder, samples, alpha, window)
    return _whole(vae, samples) if image is None else image


def _whole(vae, samples: torch.Tensor) -> torch.Tensor:
    image = vae.decode(samples)
    return image.reshape(-1, *image.shape[-3:])


def _by_windows(vae, decoder: Decoder, samples: torch.Tensor, alpha: torch.Tensor, window: int) -> torch.Tensor | None:
    """The picture with its windows decoded and nothing elsewhere; None if there is no memory for what comes before them."""
    active = F.max_pool2d((alpha > 0)[None, None].float(), decoder.cell_px)[0, 0] > 0
    largest, room = _load(vae, samples, window)
    plan = plan_decode(decoder, active, max(largest // decoder.cell_px, 1))
    canvas = _Canvas(vae, decoder, plan, len(samples))
    for number in range(len(samples)):
        latent = samples[number:number + 1].to(device=vae.device, dtype=vae.vae_dtype)
        walk = if_memory(lambda: begin(decoder, plan, latent, Limits(vae.device, vae.output_device, room), canvas.tell))
        if walk is None:
            log.warning("Quadtree Decode: there is no memory for the first window. The host decodes all of it.")
            return None
        decode_windows(walk, canvas.writer(number))
    return canvas.image


def _load(vae, samples: torch.Tensor, window: int) -> tuple[int, float]:
    """Bring the VAE to its device. Returns the longest side of a window in px, and the bytes that the host reckons for one."""
    cell_px = vae.spacial_compression_decode()
    longest = max(samples.shape[-2:]) * cell_px
    side = min(window or longest, longest)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=_memory(vae, samples, side), force_full_load=vae.disable_offload)
    if not window:
        free = vae.patcher.get_free_memory(vae.device)
        while side > LEAST_WINDOW_PX and _memory(vae, samples, side) > free:
            side = -(-side // 2)
    return side, _memory(vae, samples, side)


def _memory(vae, samples: torch.Tensor, side: int) -> float:
    """Bytes that the host reckons for decoding a square of one image."""
    cells = -(-side // vae.spacial_compression_decode())
    return vae.memory_used_decode((1, *samples.shape[1:-2], *(min(cells, length) for length in samples.shape[-2:])), vae.vae_dtype)


class _Canvas:
    """The picture that windows are written to, and the progress of it."""

    def __init__(self, vae, decoder: Decoder, plan: Plan, images: int):
        self.vae, self.plan, self.images, self.cell_px = vae, plan, images, decoder.cell_px
        self.image: torch.Tensor | None = None
        self.done = 0.0
        self.total = images * sum(area(core) for core in plan.windows)
        self.bar = comfy.utils.ProgressBar(self.total)

    def tell(self, cells: float) -> None:
        self.done += cells
        self.bar.update_absolute(min(round(self.done), self.total), self.total)

    def writer(self, number: int):
        """What takes the pixels of each window of one image, as the decoder leaves them."""
        def write(core: Rect, pixels: torch.Tensor) -> None:
            pixels = self.vae.process_output(pixels.to(device=self.vae.output_device, dtype=self.vae.vae_output_dtype(), copy=True))
            pixels = pixels.movedim(1, -1).flatten(0, -4)  # (T, height, width, C)
            if self.image is None:
                self.image = pixels.new_zeros(self.images * len(pixels), self.plan.height * self.cell_px, self.plan.width * self.cell_px, pixels.shape[-1])
            rect = scaled(core, self.cell_px)
            self.image[number * len(pixels):(number + 1) * len(pixels), rect.top:rect.bottom, rect.left:rect.right] = pixels

        return write

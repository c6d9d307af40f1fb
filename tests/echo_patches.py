"""Model patches of the host with networks that give back the picture that their patch holds.

ECHOES: by name a family, a function that puts the patch on a model, and one that reads the picture out of a call.
"""
from __future__ import annotations

import math

import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet, QwenImageDiffsynthControlnet, SUPIRApply, ZImageControlPatch
from hosts import needs, of_host
from tiny_controls import CPU, EchoVAE, spread
from tiny_models import Call
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

AnimaLLLiteApply = of_host("comfy_extras.nodes_model_patch", "AnimaLLLiteApply")
WanUni3CCnetPatch = of_host("comfy_extras.nodes_model_patch", "WanUni3CCnetPatch")


class Echo(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # a patcher asks a network for its device


class QwenBlocks(QwenImageBlockWiseControlNet):
    def __init__(self, additional: int):
        super().__init__(num_layers=0, additional_in_dim=additional, dim=64, operations=comfy.ops.manual_cast)
        self.img_in.forward = lambda tokens: tokens

    def control_block(self, img, encoded, index):
        return encoded


class ZImageBlocks(Echo):
    n_control_layers = 1

    def __init__(self, additional: int):
        super().__init__()
        self.additional_in_dim = additional

    def forward(self, txt, encoded, pe, vec):
        return as_tokens(encoded)

    def forward_noise_refiner_block(self, index, context, x, mask, pe, vec):
        return None, context

    def forward_control_block(self, index, context, x, mask, pe, vec):
        return context, context


class Uni3CBlocks(Echo):
    num_layers = 1

    def process_input(self, hidden):
        return as_tokens(hidden[:, 20:]), None

    def forward_block(self, index, hidden, temb, freqs):
        return hidden, hidden


class LLLite(Echo):
    cond_in_channels, inpaint_masked_input = 4, False

    def encode_conditioning(self, pixels):
        return pixel_unshuffle(pixels, 8)

    def apply(self, x, encoded, index, target, strength):
        return x + encoded.repeat(x.shape[0] // encoded.shape[0], 1, 1, 1)


class GLVControl(Echo):
    class Project(torch.nn.Module):
        def forward(self, features, h, control_scale):
            return features

    def __init__(self):
        super().__init__()
        self.project_modules = torch.nn.ModuleList([self.Project()])

    def control_model(self, hint, timesteps, x, context, y):
        return [hint]


class FramesVAE(EchoVAE):
    """A VAE for video whose latent frames are every fourth frame."""

    def temporal_compression_decode(self) -> int:
        return 4

    def encode(self, pixels):
        return super().encode(pixels[::4]).movedim(0, 1).unsqueeze(0)


def as_tokens(cells: torch.Tensor) -> torch.Tensor:
    """(b, c, [t,] h, w) as tokens of 2 x 2 cells, (b, tokens, 4 c)."""
    frames = cells.movedim(2, 1) if cells.ndim == 5 else cells.unsqueeze(1)
    return pixel_unshuffle(frames, 2).flatten(3).movedim(2, 3).flatten(1, 2)


def as_cells(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The way back, with the shape of a latent."""
    height, width = (math.ceil(length / 2) for length in like.shape[-2:])
    frames = pixel_shuffle(tokens.unflatten(1, (-1, height * width)).movedim(3, 2).unflatten(3, (height, width)), 2)
    cells = spread(frames.movedim(1, 2), like.shape[1])[..., :like.shape[-2], :like.shape[-1]]
    return cells if like.ndim == 5 else cells[:, :, 0]


def blank_tokens(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.zeros(x.shape[0], math.prod(x.shape[2:-2]) * math.prod(math.ceil(length / 2) for length in x.shape[-2:]), width)


def wrapped(network: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.CoreModelPatcher(network, load_device=CPU, offload_device=CPU)


def patches(call: Call, place: str) -> list:
    return call.transformer_options["patches"][place]


def with_qwen(patcher, image, mask=None, vae=None):
    blocks = wrapped(QwenBlocks(0 if mask is None else 4))
    return QwenImageDiffsynthControlnet().diffsynth_controlnet(patcher, blocks, vae or EchoVAE(video=True), image, 1.0, mask=mask)[0]


def of_qwen(call: Call) -> torch.Tensor:
    (patch,) = patches(call, "double_block")
    img = blank_tokens(call.x, 64 + patch.model_patch.model.additional_in_dim)
    return as_cells(patch({"x": call.x, "img": img, "block_index": 0})["img"], call.x)


def with_z_image(patcher, image, mask=None, vae=None):
    """As the host's node does it for a network of the class ZImage_Control."""
    mask = mask if mask is None else 1 - mask[:, None, None]
    inpaint = None if mask is None else image.flip(1)
    patch = ZImageControlPatch(wrapped(ZImageBlocks(0 if mask is None else 17)), vae or EchoVAE(), image, 1.0, inpaint_image=inpaint, mask=mask)
    patcher = patcher.clone()
    patcher.set_model_noise_refiner_patch(patch)
    patcher.set_model_double_block_patch(patch)
    return patcher


def of_z_image(call: Call) -> torch.Tensor:
    (patch,), (same,) = patches(call, "double_block"), patches(call, "noise_refiner")
    assert patch is same
    x = comfy.ldm.common_dit.pad_to_patch_size(call.x, (2, 2))
    img = blank_tokens(x, 4 * (16 + patch.model_patch.model.additional_in_dim))
    for block in ("noise_refiner", "double"):
        patch({"x": x, "img": img, "img_input": torch.zeros_like(img), "txt": None, "pe": None, "vec": None, "block_index": 0, "block_type": block})
    return as_cells(img, call.x)


def with_uni3c(patcher, image, mask=None, vae=None):
    """The host's node asks its network for a width that an echo has not."""
    video = torch.cat([image.roll(16 * frame, 2) for frame in range(9)])
    patcher = patcher.clone()
    patcher.set_model_double_block_patch(WanUni3CCnetPatch(wrapped(Uni3CBlocks()), video, vae or FramesVAE(), comfy.latent_formats.Wan21(), 1.0, 1e9, 0.0))
    return patcher


def of_uni3c(call: Call) -> torch.Tensor:
    (patch,) = patches(call, "double_block")
    x = comfy.ldm.common_dit.pad_to_patch_size(call.x, (1, 2, 2))
    options = {key: call.transformer_options[key] for key in ("cond_or_uncond", "sigmas")}
    out = patch({"x": x, "img": blank_tokens(x, 64), "vec": torch.zeros(x.shape[0], 4), "block_index": 0, "transformer_options": options})
    return as_cells(out["img"], call.x)


def with_supir(patcher, image, mask=None, vae=None):
    return SUPIRApply.execute(
        model=patcher, model_patch=wrapped(GLVControl()), vae=vae or EchoVAE(), image=image, strength_start=1.0, strength_end=1.0, restore_cfg=0.0,
        restore_cfg_s_tmin=0.05)[0]


def of_supir(call: Call) -> torch.Tensor:
    (middle,), (output,) = patches(call, "middle_block_after_patch"), patches(call, "output_block_patch")
    ((_, upsample),) = patches(call, "forward_timestep_embed_patch")
    assert middle.__self__ is output.__self__ is upsample.__self__
    told = dict.fromkeys(("timesteps", "context", "y", "h"))
    return spread(middle(told | {"x": call.x, "transformer_options": {}})["h"], call.x.shape[1])


def with_lllite(patcher, image, mask=None, vae=None):
    return AnimaLLLiteApply().apply_patch(patcher, wrapped(LLLite()), image, 1.0, 0.0, 1.0, mask)[0]


def of_lllite(call: Call) -> torch.Tensor:
    options = {"sigmas": call.transformer_options["sigmas"], "model_patch_data": {}, "block_index": 0}
    patches(call, "post_input")[0]({"x": call.x, "transformer_options": options})
    blank = torch.zeros(call.x.shape[0], 256, *call.x.shape[-2:])
    out = patches(call, "mlp_patch")[0]({"x": blank, "transformer_options": options})["x"]
    query = patches(call, "attn1_patch")[0](blank, blank, blank, extra_options=options)["q"]
    assert torch.equal(out, query)
    return spread(out, call.x.shape[1]).unsqueeze(2)


ECHOES = {
    "Qwen-Image DiffSynth": ("qwen_image", with_qwen, of_qwen),
    "Z-Image Fun": ("z_image", with_z_image, of_z_image),
    "Uni3C": ("wan21_t2v", with_uni3c, of_uni3c),
    "SUPIR": ("sdxl", with_supir, of_supir),
    "Anima LLLite": ("qwen_image", with_lllite, of_lllite),
}
NEEDED = {"Uni3C": needs("WanUni3CCnetPatch", WanUni3CCnetPatch), "Anima LLLite": needs("AnimaLLLiteApply", AnimaLLLiteApply)}


def kinds(*names: str) -> list:
    """The families of these names, all where none is given, as a test's parameters: those that this host lacks are skipped."""
    return [pytest.param(name, marks=NEEDED.get(name, ()), id=name) for name in names or ECHOES]

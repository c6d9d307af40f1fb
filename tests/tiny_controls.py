"""Small ControlNets, adapters, model patches, VAEs and GLIGEN from the host's own classes, and echoes of them.

An echo goes through the host's own ControlNet, T2IAdapter or Gligen; only its network is replaced, by one that gives
back its hint, so that a test can compare what a window saw with the same part of the whole.
"""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.gligen
import comfy.latent_formats
import comfy.ldm.flux.controlnet
import comfy.ldm.lumina.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.t2i_adapter.adapter
import comfy.taesd.taesd
import torch
from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet
from torch.nn.functional import pixel_unshuffle

from tiny_models import FLUX, QWEN, SD3, SDXL, UNET, Call, drawer, filled, seeded_weights

CPU = torch.device("cpu")
FP32 = {"dtype": torch.float32, "device": CPU, "operations": comfy.ops.disable_weight_init}
ADAPTER_CHANNELS = [32, 64, 128, 128]


def picture(height_px: int, width_px: int, batch: int = 1, seed: int = 7) -> torch.Tensor:
    """A hint as an IMAGE (b, height, width, 3) in 0..1: blobs of about 32 px under a texture, no two parts alike."""
    draw = drawer(seed)
    blobs = draw(batch, 3, max(2, height_px // 32), max(2, width_px // 32))
    blobs = torch.nn.functional.interpolate(blobs, (height_px, width_px), mode="bicubic")
    return torch.sigmoid(3 * blobs + 0.3 * draw(batch, 3, height_px, width_px)).movedim(1, -1)


def wrapped(network: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.CoreModelPatcher(filled(network), load_device=CPU, offload_device=CPU)


def hint_weights(template: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Seeded weights, larger where the hint comes in: eight layers of SiLU would leave little of it."""
    return {key: 1.8 * value if "input_hint_block" in key else value for key, value in seeded_weights(template).items()}


def unet_controlnet(sizes: dict) -> comfy.controlnet.ControlNet:
    """A ControlNet of SD1.5 or SDXL shape, its hint in px, read by the host's loader from its weights."""
    sizes = {key: value for key, value in sizes.items() if key != "out_channels"}
    template = comfy.cldm.cldm.ControlNet(**sizes, num_head_channels=64, hint_channels=3)
    return comfy.controlnet.load_controlnet_state_dict(hint_weights(template))


def sd15_controlnet() -> comfy.controlnet.ControlNet:
    return unet_controlnet(UNET)


def sdxl_controlnet() -> comfy.controlnet.ControlNet:
    return unet_controlnet(SDXL)


def flux_controlnet(inpaint: bool = False, union_modes: int = 0) -> comfy.controlnet.ControlNet:
    """InstantX's kind: the hint goes through a VAE; for inpainting a mask is concatenated to it."""
    network = comfy.ldm.flux.controlnet.ControlNetFlux(
        latent_input=True, num_union_modes=union_modes, control_latent_channels=17 if inpaint else 16, **FP32, **FLUX
    )
    return comfy.controlnet.ControlNet(
        filled(network),
        compression_ratio=1,
        latent_format=comfy.latent_formats.Flux(),
        concat_mask=inpaint,
        load_device=CPU,
        extra_conds=["y", "guidance"],
    )


def flux_pixel_controlnet() -> comfy.controlnet.ControlNet:
    """XLabs' kind: the hint stays in px."""
    template = comfy.ldm.flux.controlnet.ControlNetFlux(**FP32, **FLUX)
    return comfy.controlnet.load_controlnet_flux_xlabs_mistoline(hint_weights(template))


def sd3_controlnet(inpaint: bool = False) -> comfy.controlnet.ControlNet:
    network = comfy.cldm.mmdit.ControlNet(num_blocks=1, control_latent_channels=17 if inpaint else 16, **FP32, **SD3)
    latent_format = comfy.latent_formats.SD3()
    latent_format.shift_factor = 0  # as the host's loader sets it
    return comfy.controlnet.ControlNet(
        filled(network), compression_ratio=1, latent_format=latent_format, concat_mask=inpaint, load_device=CPU
    )


def qwen_controlnet() -> comfy.controlnet.ControlNet:
    """InstantX's kind for Qwen-Image; its hint is five-dimensional once it has been through the VAE."""
    network = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(**FP32, **QWEN)
    return comfy.controlnet.ControlNet(
        filled(network),
        compression_ratio=1,
        latent_format=comfy.latent_formats.Wan21(),
        load_device=CPU,
        extra_conds=[],
    )


def t2i_adapter(channels_in: int = 3) -> comfy.controlnet.T2IAdapter:
    return loaded_adapter(64 * channels_in, xl=False)


def t2i_adapter_xl() -> comfy.controlnet.T2IAdapter:
    """SDXL's kind: its hint must be a multiple of 16 px, two cells."""
    return loaded_adapter(3 * 256, xl=True)


def loaded_adapter(channels: int, xl: bool) -> comfy.controlnet.T2IAdapter:
    template = comfy.t2i_adapter.adapter.Adapter(
        ADAPTER_CHANNELS, nums_rb=2, cin=channels, ksize=1, sk=True, use_conv=False, xl=xl
    )
    return comfy.controlnet.load_t2i_adapter(seeded_weights(template))


def t2i_adapter_light() -> comfy.controlnet.T2IAdapter:
    network = filled(comfy.t2i_adapter.adapter.Adapter_light(ADAPTER_CHANNELS, nums_rb=1, cin=3 * 64))
    return comfy.controlnet.T2IAdapter(network, network.input_channels, 8, "nearest-exact", CPU)


def qwen_diffsynth_patch(inpaint: bool = False) -> comfy.model_patcher.ModelPatcher:
    """For the host's QwenImageDiffsynthControlnet node."""
    return wrapped(
        QwenImageBlockWiseControlNet(
            num_layers=1, additional_in_dim=4 if inpaint else 0, dim=64, operations=comfy.ops.manual_cast
        )
    )


def z_image_fun_patch(inpaint: bool = False) -> comfy.model_patcher.ModelPatcher:
    """For the host's ZImageFunControlnet node. With more layers than the small model's its state would outlive a call."""
    return wrapped(
        comfy.ldm.lumina.controlnet.ZImage_Control(
            dim=256,
            n_heads=2,
            n_kv_heads=2,
            multiple_of=32,
            ffn_dim_multiplier=1.0,
            n_control_layers=1,
            additional_in_dim=17 if inpaint else 0,
            refiner_control=inpaint,
            operations=comfy.ops.manual_cast,
        )
    )


def vae(latent_channels: int = 16) -> comfy.sd.VAE:
    """The host's small VAE of 8 px per cell, for images."""
    template = comfy.taesd.taesd.TAESD(latent_channels=latent_channels)
    return comfy.sd.VAE(sd=seeded_weights(template), device=CPU, dtype=torch.float32)


def video_vae() -> comfy.sd.VAE:
    """The VAE of Wan and Qwen-Image with eight channels: five-dimensional latents of 8 px per cell."""
    template = comfy.ldm.wan.vae.WanVAE(
        dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    return comfy.sd.VAE(sd=seeded_weights(template), device=CPU, dtype=torch.float32)


class EchoVAE:
    """A VAE whose cell has 16 values of its own 8 x 8 px and sees no other. `sizes` lists what it encoded."""

    def __init__(self, video: bool = False):
        self.video = video
        self.sizes: list[tuple[int, int]] = []

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: (b, height, width, colours)."""
        self.sizes.append(tuple(pixels.shape[1:3]))
        latent = spread(pixel_unshuffle(pixels.movedim(-1, 1), 8), 16)
        return latent.unsqueeze(2) if self.video else latent


class EchoNetwork(torch.nn.Module):
    """A control network whose only output is its hint."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # a patcher asks a network for its device

    def forward(self, hint, **inputs) -> dict:
        return {"output": [hint.clone()]}


class EchoAdapter(torch.nn.Module):
    """A T2I adapter whose only feature is its hint, the pixels of a cell as channels."""

    def __init__(self, unshuffle_amount: int = 8):
        super().__init__()
        self.unshuffle_amount = unshuffle_amount

    def forward(self, hint) -> dict:
        return {"input": [pixel_unshuffle(hint, 8)]}


class EchoGligen(comfy.gligen.Gligen):
    """GLIGEN whose patch only holds its boxes (n, 4): left, top, right, bottom in fractions of the size of x."""

    def __init__(self):
        super().__init__([], None, 64)

    def _set_position(self, boxes, masks, positive_embeddings):
        def patch(x, extra_options):
            return x

        patch.boxes = boxes[0, masks[0] > 0]
        return patch


def echo_control(**options) -> comfy.controlnet.ControlNet:
    """Options of the host's ControlNet: compression_ratio=1 and a latent_format make it one that needs a VAE."""
    return comfy.controlnet.ControlNet(EchoNetwork(), load_device=CPU, **options)


def echo_adapter(channels_in: int = 3, unshuffle_amount: int = 8) -> comfy.controlnet.T2IAdapter:
    return comfy.controlnet.T2IAdapter(EchoAdapter(unshuffle_amount), channels_in, 8, "nearest-exact", CPU)


def spread(cells: torch.Tensor, channels: int) -> torch.Tensor:
    """So many of the channels of (b, c, h, w), from the first to the last."""
    return cells[:, torch.linspace(0, cells.shape[1] - 1, channels).round().long()]


def in_cells(hint: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A hint in the shape of a latent: where it has several px per cell, those of a cell become its channels."""
    ratio = hint.shape[-1] // like.shape[-1]
    cells = spread(pixel_unshuffle(hint, ratio) if ratio > 1 else hint, like.shape[1])
    return cells[..., :like.shape[-2], :like.shape[-1]].expand_as(like)


def echoed(call: Call) -> torch.Tensor:
    """For `with_prediction`: the denoised value is what the echoing controls of this call add up to, 0 without any."""
    outputs = [output for place in (call.control or {}).values() for output in place]
    return sum((in_cells(output, call.x) for output in outputs), torch.zeros_like(call.x))


def gligen() -> comfy.model_patcher.ModelPatcher:
    """For the three attention blocks of the small SD1.5, read by the host's loader from its weights."""
    weights = {}
    for place, channels in (("input_blocks.4", 64), ("middle_block.1", 128), ("output_blocks.3", 64)):
        fuser = comfy.gligen.GatedSelfAttentionDense(channels, 64, channels // 64, 64)
        weights |= {f"{place}.1.fuser.{key}": value for key, value in seeded_weights(fuser).items()}
    position_net = comfy.gligen.PositionNet(64, 64)
    weights |= {f"position_net.{key}": value for key, value in seeded_weights(position_net).items()}
    return comfy.model_patcher.CoreModelPatcher(comfy.gligen.load_gligen(weights), load_device=CPU, offload_device=CPU)


def echo_gligen() -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.CoreModelPatcher(EchoGligen(), load_device=CPU, offload_device=CPU)

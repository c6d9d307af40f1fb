"""Small models under the file names that the shipped workflows ask for, read by the host's own loaders.

Networks, VAEs and the upscaler are a few megabytes with seeded weights. Text encoders have one size each, built into
the host: theirs are all zero, holes in a sparse file, so that a prompt means nothing; those of the T5 family are too
large even so and have no stand-in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import comfy.cldm.cldm
import comfy.ldm.wan.vae
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models as supported
import comfy.taesd.taesd
import torch
from tiny_models import FLUX, UNET, WAN, build, drawer, seeded_weights

Shapes = Mapping[str, tuple[int, ...]]

# The smallest SDXL that the host's loader knows, Segmind Vega, as narrow as it may be.
NARROW_SDXL = UNET | dict(
    model_channels=320, channel_mult=[1, 1, 1], transformer_depth=[0, 0, 1, 1, 2, 2], transformer_depth_middle=-1,
    transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2], use_linear_in_transformer=True, context_dim=2048,
    num_classes="sequential", adm_in_channels=2816,
)


def flux_transformer() -> dict[str, torch.Tensor]:
    """As wide as what the host's SD3 text encoding gives for a lone CLIP-L."""
    return network_weights(supported.Flux, FLUX | {"context_in_dim": 4096, "vec_in_dim": 2048})


def wan_transformer() -> dict[str, torch.Tensor]:
    return network_weights(supported.WAN21_T2V, WAN)


def network_weights(config: type, sizes: dict) -> dict[str, torch.Tensor]:
    return seeded_weights(build(config, sizes).diffusion_model)


def image_vae(latent_channels: int) -> dict[str, torch.Tensor]:
    return seeded_weights(comfy.taesd.taesd.TAESD(latent_channels=latent_channels))


def video_vae() -> dict[str, torch.Tensor]:
    template = comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )
    return seeded_weights(template)


def sdxl_checkpoint() -> dict[str, torch.Tensor]:
    network = network_weights(supported.Segmind_Vega, NARROW_SDXL)
    return {
        **{f"model.diffusion_model.{name}": value for name, value in network.items()},
        **{f"first_stage_model.{name}": value for name, value in image_vae(4).items()},
    }


def sdxl_text_encoders() -> Shapes:
    encoders = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16).state_dict()
    return shapes(supported.SDXL(dict(NARROW_SDXL)).process_clip_state_dict_for_saving(encoders))


def sdxl_controlnet() -> dict[str, torch.Tensor]:
    sizes = {key: value for key, value in NARROW_SDXL.items() if key not in ("out_channels", "transformer_depth_output")}
    return seeded_weights(comfy.cldm.cldm.ControlNet(**sizes, num_head_channels=64, hint_channels=3))


def clip_l() -> Shapes:
    return shapes(comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float16).transformer.state_dict())


def upscaler() -> dict[str, torch.Tensor]:
    """Four times larger, of the kind that Real-ESRGAN calls Compact: two convolutions and an activation between them."""
    draw = drawer(0)
    return {
        "body.0.weight": 0.2 * draw(8, 3, 3, 3), "body.0.bias": torch.zeros(8), "body.1.weight": torch.full((8,), 0.25),
        "body.2.weight": 0.02 * draw(48, 8, 3, 3), "body.2.bias": torch.zeros(48),
    }


def shapes(weights: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in weights.items()}


def nothing() -> dict:
    return {}


# For each file what is written and the shapes of what is left zero.
STAND_INS: dict[str, tuple[Callable[[], Mapping[str, torch.Tensor]], Callable[[], Shapes]]] = {
    "diffusion_models/flux1-dev.safetensors": (flux_transformer, nothing),
    "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors": (wan_transformer, nothing),
    "vae/ae.safetensors": (lambda: image_vae(16), nothing),
    "vae/wan_2.1_vae.safetensors": (video_vae, nothing),
    "text_encoders/clip_l.safetensors": (nothing, clip_l),
    "checkpoints/sd_xl_base_1.0.safetensors": (sdxl_checkpoint, sdxl_text_encoders),
    "controlnet/TTPLANET_Controlnet_Tile_realistic_v2_fp16.safetensors": (sdxl_controlnet, nothing),
    "upscale_models/RealESRGAN_x4plus.safetensors": (upscaler, nothing),
}


def write_stand_in(models: Path, name: str) -> None:
    """Write one of STAND_INS into a models folder, unless it is there."""
    path = models / name
    if path.exists():
        return
    weights, zeros = STAND_INS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, weights(), zeros())


def write_safetensors(path: Path, weights: Mapping[str, torch.Tensor], zeros: Shapes) -> None:
    """Write float16 tensors, then zeros as a hole in the file, in the format of safetensors."""
    header, offset = {}, 0
    for name, shape in {**shapes(weights), **zeros}.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in weights.values():
            file.write(value.half().contiguous().numpy().tobytes())
        file.truncate(8 + len(text) + offset)

"""The host's networks at their published widths and depths, without their weights: what does one evaluation take?

Built on the `meta` device, where tensors have shapes and nothing else, so that operations can be counted on any machine.
Sizes are those that the host's detector reads from the published weights.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.supported_models as supported
import torch
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


@dataclass(frozen=True)
class FullSize:
    """config, sizes: as the host's detector writes them. text: tokens and their width. px: of a cell.

    frames: of the latent, None for a picture. more(text tokens, rows): further arguments of the network.
    """

    name: str
    config: type
    sizes: dict
    text: tuple[int, int]
    channels: int
    px: int = 8
    frames: int | None = None
    more: Callable[[int], dict] = field(default=lambda tokens: {})

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of one picture or video of so many cells."""
        return 1, self.channels, *(() if self.frames is None else (self.frames,)), height, width


FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=19,
    depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
FLUX2 = FLUX | dict(
    image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=15360, hidden_size=6144, mlp_ratio=3.0, num_heads=48, depth=8,
    depth_single_blocks=48, axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1, qkv_bias=False, global_modulation=True, mlp_silu_act=True, ops_bias=False,
    default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3])
CHROMA = {key: value for key, value in FLUX.items() if key != "guidance_embed"} | dict(
    image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=3072, hidden_dim=5120, n_layers=5, vec_in_dim=None)
SDXL = dict(
    image_size=32, use_checkpoint=False, use_spatial_transformer=True, legacy=False, in_channels=4, out_channels=4, model_channels=320,
    num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    transformer_depth_middle=10, use_linear_in_transformer=True, context_dim=2048, adm_in_channels=2816, num_classes="sequential", num_head_channels=64,
    num_heads=-1, use_temporal_resblock=False, use_temporal_attention=False)
SD15 = SDXL | dict(
    num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1, use_linear_in_transformer=False, context_dim=768,
    adm_in_channels=None, num_classes=None, num_head_channels=-1, num_heads=8)
SD3 = dict(
    in_channels=16, out_channels=16, patch_size=2, depth=24, input_size=None, adm_in_channels=2048, num_patches=192 * 192, pos_embed_max_size=192,
    pos_embed_scaling_factor=None, qk_norm=None, x_block_self_attn_layers=[],
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}})
SD35_LARGE = SD3 | dict(
    depth=38, qk_norm="rms", context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}})
SD35_MEDIUM = SD3 | dict(qk_norm="rms", num_patches=384 * 384, pos_embed_max_size=384, x_block_self_attn_layers=list(range(13)))
QWEN = dict(image_model="qwen_image", in_channels=64, num_layers=60)
WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=5120, in_dim=16, out_dim=16, num_heads=40, ffn_dim=13824, num_layers=40, patch_size=(1, 2, 2), freq_dim=256,
    window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6)
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2], vec_in_dim=768, axes_dim=[16, 56, 56], meanflow=False,
    context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=20, depth_single_blocks=40, theta=256, qkv_bias=True, byt5=False,
    guidance_embed=True, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False)
LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=2304, cap_feat_dim=2304, n_layers=26, qk_norm=True, n_heads=24, n_kv_heads=8,
    axes_dims=[32, 32, 32], axes_lens=[300, 512, 512], rope_theta=10000.0)
Z_IMAGE = LUMINA | dict(
    dim=3840, cap_feat_dim=2560, n_layers=30, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0,
    ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32)
LTXV = dict(image_model="ltxv", num_layers=28, attention_head_dim=64, cross_attention_dim=2048)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=META, dtype=torch.bfloat16)


def pooled(width: int) -> Callable[[int], dict]:
    return lambda tokens: {"y": ones(1, width)}


def distilled(width: int) -> Callable[[int], dict]:
    return lambda tokens: {"y": ones(1, width), "guidance": ones(1)}


def of_lumina(tokens: int) -> dict:
    return {"num_tokens": tokens}


# Rows of FullSize: px of a cell and frames are those of a picture of 8 px unless they stand here.
MODELS = {
    model.name: model
    for model in (
        FullSize("FLUX.1-dev", supported.Flux, FLUX, (512, 4096), 16, more=distilled(768)),
        FullSize("FLUX.2-dev", supported.Flux2, FLUX2, (512, 15360), 128, px=16, more=lambda tokens: {"guidance": ones(1)}),
        FullSize("Chroma", supported.Chroma, CHROMA, (512, 4096), 16, more=lambda tokens: {"guidance": ones(1)}),
        FullSize("SD 1.5", supported.SD15, SD15, (77, 768), 4),
        FullSize("SDXL", supported.SDXL, SDXL, (77, 2048), 4, more=pooled(2816)),
        FullSize("SD 3 medium", supported.SD3, SD3, (154, 4096), 16, more=pooled(2048)),
        FullSize("SD 3.5 medium", supported.SD3, SD35_MEDIUM, (154, 4096), 16, more=pooled(2048)),
        FullSize("SD 3.5 large", supported.SD3, SD35_LARGE, (154, 4096), 16, more=pooled(2048)),
        FullSize("Qwen-Image", supported.QwenImage, QWEN, (256, 3584), 16, frames=1),
        FullSize("Wan 2.1 1.3B", supported.WAN21_T2V, WAN | dict(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30), (512, 4096), 16, frames=21),
        FullSize("Wan 2.1 14B", supported.WAN21_T2V, WAN, (512, 4096), 16, frames=21),
        FullSize("Wan 2.2 A14B image to video", supported.WAN21_T2V, WAN | dict(in_dim=36), (512, 4096), 36, frames=21),
        FullSize("Wan 2.2 5B", supported.WAN22_T2V, WAN | dict(dim=3072, num_heads=24, ffn_dim=14336, num_layers=30, in_dim=48, out_dim=48), (512, 4096), 48, px=16, frames=31),
        FullSize("HunyuanVideo", supported.HunyuanVideo, HUNYUAN, (256, 4096), 16, frames=33, more=distilled(768)),
        FullSize("LTX-Video 2B", supported.LTXV, LTXV, (256, 4096), 128, px=32, frames=13, more=lambda tokens: {"attention_mask": None}),
        FullSize("Lumina 2", supported.Lumina2, LUMINA, (256, 2304), 16, more=of_lumina),
        FullSize("Z-Image", supported.ZImage, Z_IMAGE, (256, 2560), 16, more=of_lumina),
    )
}


@functools.lru_cache(maxsize=None)
def built(name: str):
    """The host's model of that name on `meta`."""
    full = MODELS[name]
    config = full.config(dict(full.sizes))
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device=META).requires_grad_(False)


@functools.lru_cache(maxsize=None)
def operations(name: str, height: int, width: int, text: int | None = None, references: tuple[tuple[int, int], ...] = ()) -> int:
    """Multiplications and additions of one evaluation of a window of height x width cells, as torch counts them.

    text: tokens of the prompt. references: sizes of pictures beside it, in cells.
    """
    full, network = MODELS[name], built(name).diffusion_model
    tokens = full.text[0] if text is None else text
    more = full.more(tokens)
    if references:
        more["ref_latents"] = [ones(*full.latent_shape(*size)) for size in references]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(ones(*full.latent_shape(height, width)), ones(1), context=ones(1, tokens, full.text[1]), **more)
    return counter.get_total_flops()

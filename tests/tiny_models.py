"""Small models of every family, made from the host's own classes with seeded weights, for the host's own samplers.

`load(name)` gives a model, its conditionings and latents in the sizes of a picture. No weight is zero: a denoised value
depends on the latent, its position, the prompt and everything else its family is conditioned with.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.clip_vision
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as supported
import torch
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from comfy.patcher_extension import WrappersMP

TOKENS = 64
QUERY_KEY_NORMS = re.compile(r"(norm_(added_)?[qk]|(query|key|q|k)_norm|ln_[qk])\.\w+$")


@dataclass(frozen=True)
class Canvas:
    """The sizes that a conditioning may have to fit. `latent` is the whole shape; px are those of the picture."""

    latent: tuple[int, ...]
    height_px: int
    width_px: int


@dataclass(frozen=True)
class Family:
    """One family. `sizes` is its network's configuration as the host's detector would write it.

    text_dim: width of a prompt token. frames: latent frames, None for a four-dimensional latent.
    extras(canvas, draw): further values of a conditioning; draw(*shape) gives seeded normal numbers.
    detected: the host's loader reads these sizes back from the weights. False: it has larger ones built in.
    """

    config: type
    sizes: dict
    text_dim: int = 64
    frames: int | None = None
    patch_cells: int = 2
    detected: bool = True
    extras: Callable[[Canvas, Callable], dict] = field(default=lambda canvas, draw: {})


@dataclass(frozen=True)
class TinyModel:
    """A model patcher with everything a sampler needs beside it."""

    name: str
    family: Family
    patcher: comfy.model_patcher.ModelPatcher

    @property
    def cell_px(self) -> int:
        return self.patcher.model.latent_format.spacial_downscale_ratio

    @property
    def patch_cells(self) -> int:
        return self.family.patch_cells

    def latent_shape(self, height_px: int, width_px: int, batch: int = 1) -> tuple[int, ...]:
        frames = () if self.family.frames is None else (self.family.frames,)
        channels = self.patcher.model.latent_format.latent_channels
        return (batch, channels, *frames, height_px // self.cell_px, width_px // self.cell_px)

    def latent(self, height_px: int, width_px: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
        """What the family's VAE could have given: of unit variance once the model has scaled it."""
        noise = drawer(seed)(*self.latent_shape(height_px, width_px, batch))
        return self.patcher.model.latent_format.process_out(noise)

    def conds(self, height_px: int, width_px: int, seed: int = 2) -> list:
        """A conditioning as the host's text encoding and conditioning nodes leave it. The seed is the prompt."""
        draw = drawer(seed)
        canvas = Canvas(self.latent_shape(height_px, width_px), height_px, width_px)
        return [[draw(1, TOKENS, self.family.text_dim), self.family.extras(canvas, draw)]]

    def positive(self, height_px: int, width_px: int) -> list:
        return self.conds(height_px, width_px, seed=2)

    def negative(self, height_px: int, width_px: int) -> list:
        return self.conds(height_px, width_px, seed=3)


def drawer(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def weight(name: str, shape: torch.Size, draw: Callable) -> torch.Tensor:
    """Normal numbers scaled so that a layer keeps the variance of what enters it."""
    noise = draw(*shape)
    if name.endswith("bias"):
        return 0.1 * noise
    if QUERY_KEY_NORMS.search(name):
        return 2 + 0.2 * noise  # attention that picks single tokens, so that a prompt is not averaged away
    if name.endswith(("weight", "scale", "gamma")):
        fan_in = math.prod(shape[1:])
        return noise / math.sqrt(fan_in) if fan_in > 1 else 1 + 0.2 * noise
    return 0.5 * noise  # tables of positions and modulations, padding tokens


def seeded_weights(network: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = drawer(seed)
    return {name: weight(name, value.shape, draw) for name, value in sorted(network.state_dict().items())}


def filled(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network itself, with seeded weights."""
    network.load_state_dict(seeded_weights(network, seed))
    return network.requires_grad_(False)


def build(config: type, sizes: dict) -> torch.nn.Module:
    """The host's model of these sizes, its weights not set."""
    model_config = config(dict(sizes))
    model_config.set_inference_dtype(torch.float32, None)
    return model_config.get_model({}, "", device=torch.device("cpu"))


@functools.lru_cache(maxsize=None)
def load(name: str) -> TinyModel:
    """The family's model; one per process, so patch only clones of its patcher."""
    family = FAMILIES[name]
    model = build(family.config, family.sizes)
    weights = seeded_weights(model.diffusion_model)
    if family.detected:
        patcher = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
        return TinyModel(name, family, patcher)
    model.load_model_weights(weights, "")
    cpu = torch.device("cpu")
    return TinyModel(name, family, comfy.model_patcher.CoreModelPatcher(model, load_device=cpu, offload_device=cpu))


@dataclass(frozen=True)
class Call:
    """What one call of a model's apply_model was given. conds: its further conditionings by name."""

    x: torch.Tensor
    sigma: torch.Tensor
    c_concat: torch.Tensor | None
    context: torch.Tensor | None
    control: dict | None
    transformer_options: dict
    conds: dict

    @classmethod
    def of(cls, x, sigma, c_concat=None, context=None, control=None, transformer_options=None, **conds) -> Call:
        """Takes apply_model's arguments; copies x, which samplers overwrite, and control, which UNets empty."""
        control = control and {place: list(values) for place, values in control.items()}
        return cls(x.clone(), sigma, c_concat, context, control, transformer_options or {}, conds)

    @property
    def cells(self) -> int:
        """Cells of all rows and frames together."""
        return self.x.numel() // self.x.shape[1]


def with_prediction(patcher, predict: Callable[[Call], torch.Tensor]):
    """A clone of the patcher whose denoised value is predict(call), the network itself left out."""
    clone = patcher.clone()

    def instead(executor, *args, **kwargs):
        return predict(Call.of(*args, **kwargs))

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "prediction", instead)
    return clone


def recorded(patcher) -> tuple[comfy.model_patcher.ModelPatcher, list[Call]]:
    """A clone of the patcher, and the list that every call of its model is appended to."""
    clone, calls = patcher.clone(), []

    def beside(executor, *args, **kwargs):
        calls.append(Call.of(*args, **kwargs))
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "recording", beside)
    return clone, calls


def pooled(canvas: Canvas, draw: Callable) -> dict:
    return {"pooled_output": draw(1, 64)}


def distilled(canvas: Canvas, draw: Callable) -> dict:
    return {"pooled_output": draw(1, 64), "guidance": 3.5}


def padded_prompt(canvas: Canvas, draw: Callable) -> dict:
    """As the T5 encoding of LTX-Video leaves it: the last quarter of the tokens is padding."""
    return {"frame_rate": 25, "attention_mask": (torch.arange(TOKENS) < TOKENS * 3 // 4).int().unsqueeze(0)}


def blob_mask(canvas: Canvas, draw: Callable) -> torch.Tensor:
    """A mask of the picture (1, 1, H px, W px), 0 or 1 in blobs that no two parts of it share."""
    smooth = torch.nn.functional.interpolate(draw(1, 1, 8, 8), (canvas.height_px, canvas.width_px), mode="bilinear")
    return (smooth > 0).float()


def inpainting(canvas: Canvas, draw: Callable) -> dict:
    return {"concat_latent_image": draw(*canvas.latent), "concat_mask": blob_mask(canvas, draw)}


def references(canvas: Canvas, draw: Callable) -> dict:
    """One reference of the canvas' size and one of its own, as two ReferenceLatent nodes in a row leave them."""
    return {"reference_latents": [draw(*canvas.latent), draw(*canvas.latent[:-2], 12, 8)]}


def vision(canvas: Canvas, draw: Callable) -> dict:
    output = comfy.clip_vision.Output()
    output["penultimate_hidden_states"] = draw(1, 257, 1280)
    return {"clip_vision_output": output}


def first_frame(canvas: Canvas, draw: Callable) -> dict:
    """Start image and mask as WanImageToVideo leaves them: the mask has one value per pixel frame and cell."""
    batch, channels, frames, *cells = canvas.latent
    mask = torch.ones(batch, 4, frames, *cells)
    mask[:, :, :1] = 0
    return {"concat_latent_image": draw(*canvas.latent), "concat_mask": mask}


def control_video(canvas: Canvas, draw: Callable) -> dict:
    """Control frames and their mask as WanVaceToVideo leaves them: two latents, and 8 x 8 px of mask for every cell."""
    batch, channels, *frames_and_cells = canvas.latent
    frames, mask = draw(batch, 2 * channels, *frames_and_cells), (draw(batch, 64, *frames_and_cells) > 0).float()
    return {"vace_frames": [frames], "vace_mask": [mask], "vace_strength": [1.0]}


def together(*parts: Callable) -> Callable[[Canvas, Callable], dict]:
    return lambda canvas, draw: {key: value for part in parts for key, value in part(canvas, draw).items()}


FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=128,
    mlp_ratio=4.0, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)
FLUX2 = FLUX | dict(
    image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, mlp_ratio=3.0,
    axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1, qkv_bias=False, global_modulation=True, mlp_silu_act=True,
    ops_bias=False, default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3],
)
CHROMA = FLUX | dict(
    image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=128, hidden_dim=64, n_layers=1,
    vec_in_dim=None,
)
del CHROMA["guidance_embed"]
RADIANCE = CHROMA | dict(
    image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=16,
    nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=512, nerf_final_head_type="conv",
    nerf_embedder_dtype=torch.float32,
) | {name: False for name in ("use_x0", "use_sequential_txt_ids") if name in ChromaRadianceParams.__dataclass_fields__}  # older hosts lack the last
UNET = dict(
    image_size=32, use_checkpoint=False, use_spatial_transformer=True, legacy=False, in_channels=4, out_channels=4,
    model_channels=32, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 0, 1, 0, 0],
    transformer_depth_output=[0, 0, 0, 0, 0, 1, 0, 0, 0], transformer_depth_middle=1,
    use_linear_in_transformer=False, context_dim=64, adm_in_channels=None, use_temporal_resblock=False,
    use_temporal_attention=False,
)
SDXL = UNET | dict(
    num_classes="sequential", adm_in_channels=64 + 6 * 256, use_linear_in_transformer=True,
    transformer_depth=[0, 0, 0, 0, 0, 1], transformer_depth_output=[0, 0, 0, 0, 0, 0, 0, 0, 1],
)
SD3 = dict(
    in_channels=16, out_channels=16, patch_size=2, depth=2, input_size=None, adm_in_channels=64,
    num_patches=96 * 96, pos_embed_max_size=96, pos_embed_scaling_factor=None, qk_norm="rms",
    x_block_self_attn_layers=[],
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
)
QWEN = dict(
    image_model="qwen_image", in_channels=64, out_channels=16, num_layers=1, attention_head_dim=64,
    num_attention_heads=1, joint_attention_dim=64, axes_dims_rope=(16, 24, 24),
)
WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=128, in_dim=16, out_dim=16, num_heads=1, ffn_dim=128, num_layers=1,
    patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
)
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2], vec_in_dim=768,
    axes_dim=[16, 56, 56], meanflow=False, context_in_dim=64, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
    depth_single_blocks=1, theta=256, qkv_bias=True, byt5=False, guidance_embed=True, use_cond_type_embedding=False,
    vision_in_dim=None, meanflow_sum=False,
)
LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=64, n_layers=1, n_refiner_layers=1,
    qk_norm=True, n_heads=2, n_kv_heads=1, axes_dims=[16, 16, 16], axes_lens=[300, 512, 512], rope_theta=10000.0,
    ffn_dim_multiplier=1.0, multiple_of=32,
)
Z_IMAGE = LUMINA | dict(
    dim=256, n_kv_heads=2, axes_dims=[32, 48, 48], rope_theta=256.0, z_image_modulation=True, time_scale=1000.0,
    pad_tokens_multiple=32,
)
LTXV = dict(image_model="ltxv", num_layers=1, attention_head_dim=4, cross_attention_dim=128)

FAMILIES: dict[str, Family] = {
    "flux_dev": Family(supported.Flux, FLUX, extras=distilled),
    "flux_schnell": Family(supported.FluxSchnell, FLUX | {"guidance_embed": False}, extras=pooled),
    "flux_fill": Family(supported.FluxInpaint, FLUX | {"in_channels": 96}, extras=together(distilled, inpainting)),
    "flux_kontext": Family(supported.Flux, FLUX, extras=together(distilled, references)),
    "flux2": Family(supported.Flux2, FLUX2, patch_cells=1, extras=lambda canvas, draw: {"guidance": 4.0}),
    "flux2_edit": Family(supported.Flux2, FLUX2, patch_cells=1, extras=references),
    "chroma": Family(supported.Chroma, CHROMA, detected=False),
    "radiance": Family(supported.ChromaRadiance, RADIANCE, patch_cells=16, detected=False),
    "sd15": Family(supported.SD15, UNET, patch_cells=4, detected=False),
    "sd15_inpaint": Family(supported.SD15, UNET | {"in_channels": 9}, patch_cells=4, detected=False, extras=inpainting),
    "sdxl": Family(supported.SDXL, SDXL, patch_cells=4, detected=False, extras=pooled),
    "sd3": Family(supported.SD3, SD3, extras=pooled),
    "qwen_image": Family(supported.QwenImage, QWEN, frames=1, detected=False),
    "qwen_image_edit": Family(supported.QwenImage, QWEN, frames=1, detected=False, extras=references),
    "wan21_t2v": Family(supported.WAN21_T2V, WAN, text_dim=4096, frames=3),
    "wan21_i2v": Family(
        supported.WAN21_I2V,
        WAN | {"model_type": "i2v", "in_dim": 36},
        text_dim=4096,
        frames=3,
        extras=together(vision, first_frame),
    ),
    "wan21_vace": Family(
        supported.WAN21_Vace,
        WAN | {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
        text_dim=4096,
        frames=3,
        extras=control_video,
    ),
    "wan22_i2v": Family(supported.WAN21_T2V, WAN | {"in_dim": 36}, text_dim=4096, frames=3, extras=first_frame),
    "wan22_5b": Family(supported.WAN22_T2V, WAN | {"in_dim": 48, "out_dim": 48}, text_dim=4096, frames=3),
    "hunyuan_video": Family(
        supported.HunyuanVideo,
        HUNYUAN,
        frames=3,
        extras=lambda canvas, draw: {"pooled_output": draw(1, 768), "guidance": 6.0},
    ),
    "ltxv": Family(supported.LTXV, LTXV, text_dim=4096, frames=3, patch_cells=1, extras=padded_prompt),
    "lumina2": Family(supported.Lumina2, LUMINA, detected=False),
    "z_image": Family(supported.ZImage, Z_IMAGE, detected=False),
    "z_image_omni": Family(supported.ZImage, Z_IMAGE, detected=False, extras=references),
}

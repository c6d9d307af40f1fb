"""All that the pack uses of the host beyond its public node API, in one table. What has moved is told in a sentence."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
from dataclasses import dataclass
from pathlib import Path

import autoencoders
import comfy.conds
import comfy.context_windows
import comfy.hooks
import comfy.patcher_extension
import comfy.samplers
import comfy.taesd.taesd
import pytest
import tiny_controls
import torch
from comfyui_version import __version__
from hosts import of_host
from sampling import load, sample

from qtd_pack import conditioning

pytestmark = pytest.mark.short

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in ROOT.glob("*.py") if path.name != "run.py")
HOST_MODULES = ("comfy", "comfy_extras", "comfy_execution", "server", "nodes", "execution", "folder_paths", "latent_preview", "node_helpers")


@dataclass(frozen=True)
class Seam:
    """One name of the host. files: of the pack, that use it. takes: how it is called, as positions and names, where it is called.

    has: what is used of it besides. optional: the pack does without it where there is none.
    """

    name: str
    files: str
    takes: tuple[int, tuple[str, ...]] | None = None
    has: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Line:
    """A line of the host that writes or reads a key, or gives an object an attribute, which no import leads to.

    key: as the pack spells it. file: of the host. line: what it is found by; the key in quotes if there is none. since: the first
    host that is known to have it.
    """

    key: str
    file: str
    files: str
    line: str = ""
    since: str = "0.20.1"

    @property
    def pattern(self) -> str:
        return self.line or rf"""["']{self.key}["']"""


def call(positions: int, *names: str) -> tuple[int, tuple[str, ...]]:
    return positions, names


SEAMS = [
    Seam("comfy.conds.CONDConstant", "conditioning", has="process_cond can_concat concat _copy_with"),
    Seam("comfy.conds.CONDList", "conditioning", has="process_cond can_concat concat _copy_with"),
    Seam("comfy.conds.CONDCrossAttn", "conditioning", has="can_concat concat"),
    Seam("comfy.conds.CONDRegular", "conditioning", has="process_cond can_concat concat _copy_with"),
    Seam("comfy.conds.CONDRegular.process_cond", "conditioning", call(1, "batch_size", "area")),
    Seam("comfy.conds.CONDRegular._copy_with", "conditioning", call(2)),
    Seam("comfy.context_windows.IndexListContextWindow.get_tensor", "sampling_run", call(2)),
    Seam("comfy.controlnet.ControlBase", "control", has="pre_run cleanup copy_to get_models set_cond_hint set_previous_controlnet get_extra_hooks inference_memory_requirements"),
    Seam("comfy.controlnet.__name__", "control"),
    Seam("comfy.controlnet.ControlNet.get_control", "control", call(6)),
    Seam("comfy.controlnet.T2IAdapter", "control", has="get_control"),
    Seam("comfy.controlnet.T2IAdapter.get_control", "control", call(6)),
    Seam("comfy.hooks.EnumHookType.TransformerOptions", "patches"),
    Seam("comfy.hooks.HookGroup", "control patches"),
    Seam("comfy.latent_formats.LatentFormat", "control patches", has="spacial_downscale_ratio latent_channels process_in"),
    Seam("comfy.ldm.models.autoencoder.AutoencodingEngine", "decoders", has="decode"),
    Seam("comfy.ldm.modules.diffusionmodules.model.AttnBlock", "decoders", has="forward"),
    Seam("comfy.ldm.modules.diffusionmodules.model.Decoder", "decoders", has="forward"),
    Seam("comfy.ldm.modules.diffusionmodules.model.ResnetBlock", "decoders", has="forward"),
    Seam("comfy.ldm.wan.vae.AttentionBlock", "decoders"),
    Seam("comfy.ldm.wan.vae.Resample", "decoders"),
    Seam("comfy.ldm.wan.vae.ResidualBlock", "decoders"),
    Seam("comfy.ldm.wan.vae.WanVAE", "decoders"),
    Seam("comfy.model_management.OOM_EXCEPTION", "watch"),
    Seam("comfy.model_management.cuda_device_context", "decode", call(1), optional=True),
    Seam("comfy.model_management.get_free_memory", "model_facts piecewise", call(1)),
    Seam("comfy.model_management.is_oom", "memory", call(1)),
    Seam("comfy.model_management.load_models_gpu", "control decode", call(1, "memory_required", "force_full_load")),
    Seam("comfy.model_management.loaded_models", "control", call(0, "only_currently_used")),
    Seam("comfy.model_management.raise_non_oom", "piecewise", call(1)),
    Seam("comfy.model_management.soft_empty_cache", "loading memory piecewise tiled_diffusion", call(0)),
    Seam("comfy.model_management.throw_exception_if_processing_interrupted", "devices piecewise", call(0)),
    Seam("comfy.model_patcher.ModelPatcher", "control patches", has="clone add_wrapper_with_key remove_wrappers_with_key get_free_memory"),
    Seam("comfy.model_patcher.ModelPatcher.add_wrapper_with_key", "tiled_diffusion", call(4)),
    Seam("comfy.model_patcher.ModelPatcher.remove_wrappers_with_key", "tiled_diffusion", call(3)),
    Seam("comfy.model_base.BaseModel.memory_required", "model_facts", call(2, "cond_shapes")),
    Seam("comfy.model_base.BaseModel.extra_conds", "conditioning", call(1, "noise", "device", "area")),
    Seam("comfy.model_base.BaseModel.process_latent_in", "outcome sampling_run", call(2)),
    Seam("comfy.model_patcher.ModelPatcher.get_additional_models_with_key", "loading", call(2)),
    Seam("comfy.model_patcher.ModelPatcher.set_additional_models", "loading", call(3)),
    Seam("comfy.model_sampling.CONST.noise_scaling", "layout", call(4)),
    Seam("comfy.model_sampling.COSMOS_RFLOW.noise_scaling", "layout", call(4)),
    Seam("comfy.model_sampling.EDM.noise_scaling", "layout", call(4)),
    Seam("comfy.model_sampling.EPS.noise_scaling", "layout", call(4)),
    Seam("comfy.model_sampling.IMG_TO_IMG.noise_scaling", "layout", call(4)),
    Seam("comfy.model_sampling.IMG_TO_IMG_FLOW.noise_scaling", "layout", call(4)),
    Seam("comfy.model_sampling.V_PREDICTION.noise_scaling", "layout", call(4)),
    Seam("comfy.model_sampling.X0.noise_scaling", "layout", call(4)),
    Seam("comfy.multigpu.MultiGPUThreadPool.get_result", "devices", call(2), optional=True),
    Seam("comfy.multigpu.MultiGPUThreadPool.submit", "devices", call(3), optional=True),
    Seam("comfy.ops.cast_bias_weight", "piecewise", call(2, "offloadable")),
    Seam("comfy.ops.uncast_bias_weight", "piecewise", call(4)),
    Seam("comfy.patcher_extension.WrappersMP", "foreign tiled_diffusion watch", has="APPLY_MODEL CALC_COND_BATCH DIFFUSION_MODEL OUTER_SAMPLE PREDICT_NOISE PREPARE_SAMPLING SAMPLER_SAMPLE"),
    Seam("comfy.samplers.__file__", "foreign"),
    Seam("comfy.samplers.get_area_and_mult", "conditioning", call(3)),
    Seam("comfy.samplers.CFGGuider.predict_noise", "tiled_diffusion", call(4, "seed")),
    Seam("comfy.samplers.resolve_areas_and_cond_masks_multidim", "reach", call(3)),
    Seam("comfy.sd.CLIP", "control patches"),
    Seam("comfy.sd.VAE", "control decode patches", has=(
        "decode encode spacial_compression_decode spacial_compression_encode temporal_compression_decode throw_exception_if_invalid vae_output_dtype")),
    Seam("comfy.taesd.taesd.Block", "decoders"),
    Seam("comfy.taesd.taesd.Clamp", "decoders"),
    Seam("comfy.taesd.taesd.DecoderFlux2", "decoders", optional=True),
    Seam("comfy.taesd.taesd.TAESD", "decoders"),
    Seam("comfy.utils.ProgressBar", "decode", call(1), has="update_absolute"),
    Seam("comfy.utils.ProgressBar.update_absolute", "decode", call(3)),
    Seam("comfy.utils.common_upscale", "canvas masks nodes prompts", call(5)),
    Seam("comfy.utils.repeat_to_batch_size", "canvas conditioning masks patches sampling_run prompts", call(2)),
    Seam("execution.PromptQueue.get_current_queue_volatile", "wiring", call(1)),
]


def decoder():
    return autoencoders.kl(4).first_stage_model.decoder


def thread_pool():
    """The host's pool without threads; None on a host without work on several devices."""
    return of_host("comfy.multigpu", "MultiGPUThreadPool") and comfy.multigpu.MultiGPUThreadPool([])


def area_of_cond():
    return comfy.samplers.get_area_and_mult({"area": (8, 8, 0, 0), "model_conds": {}, "uuid": None}, torch.zeros(1, 1, 16, 16), None)


# What is used of the host's objects: what the object is, how a test gets one, and by name of the attribute the files that use it.
OBJECTS = {
    "a loaded model's patcher": (lambda: load("flux_dev").patcher, {
        "get_additional_models_with_key": "loading", "injections": "foreign", "load_device": "loading", "model": "devices model_facts tiled_diffusion", "model_options": "model_facts tiled_diffusion",
        "object_patches": "foreign", "prepare_hook_patches_current_keyframe": "tiled_diffusion", "set_additional_models": "loading", "wrappers": "tiled_diffusion"}),
    "a model": (lambda: load("flux_dev").patcher.model, {
        "current_patcher": "model_facts tiled_diffusion", "diffusion_model": "conditioning model_facts", "latent_format": "masks model_facts sampling_run tiled_diffusion",
        "memory_required": "model_facts", "model_sampling": "layout", "process_latent_in": "outcome sampling_run"}),
    "FLUX's network": (lambda: load("flux_dev").patcher.model.diffusion_model, {"hidden_size": "model_facts", "patch_size": "model_facts"}),
    "SD3's network": (lambda: load("sd3").patcher.model.diffusion_model.x_embedder, {"patch_size": "model_facts"}),
    "LTX-Video's network": (lambda: load("ltxv").patcher.model.diffusion_model, {"patchifier": "model_facts", "vae_scale_factors": "conditioning"}),
    "a UNet": (lambda: load("sd15").patcher.model.diffusion_model, {
        "input_blocks": "network_work", "middle_block": "network_work", "model_channels": "model_facts", "output_blocks": "network_work"}),
    "Wan's network": (lambda: load("wan21_t2v").patcher.model.diffusion_model, {"dim": "model_facts", "patch_size": "model_facts"}),
    "Qwen-Image's network": (lambda: load("qwen_image").patcher.model.diffusion_model, {"inner_dim": "model_facts", "patch_size": "model_facts"}),
    "a ControlNet": (tiny_controls.sd15_controlnet, {
        "compression_ratio": "control", "cond_hint": "control", "cond_hint_original": "control", "extra_concat": "control", "extra_concat_orig": "control", "latent_format": "control",
        "preprocess_image": "control", "previous_controlnet": "control loading", "upscale_algorithm": "control", "vae": "control"}),
    "a T2I adapter": (tiny_controls.t2i_adapter, {"control_input": "control", "t2i_model": "control"}),
    "a T2I adapter's network": (lambda: tiny_controls.t2i_adapter().t2i_model, {"unshuffle_amount": "control"}),
    "a VAE": (lambda: autoencoders.kl(4), {
        "device": "decode", "disable_offload": "decode", "extra_1d_channel": "decode", "first_stage_model": "decode", "latent_channels": "decode", "latent_dim": "decode",
        "memory_used_decode": "decode", "output_channels": "decode", "output_device": "decode", "patcher": "decode", "process_output": "decode", "upscale_ratio": "decode", "vae_dtype": "decode"}),
    "an AutoencoderKL": (lambda: autoencoders.kl(4).first_stage_model, {"decode": "decoders", "decoder": "decoders", "post_quant_conv": "decoders"}),
    "an AutoencoderKL's decoder": (decoder, {
        "conv_in": "decoders", "conv_out": "decoders", "mid": "decoders", "norm_out": "decoders", "tanh_out": "decoders", "up": "decoders"}),
    "its level": (lambda: decoder().up[-1], {"attn": "decoders", "block": "decoders", "upsample": "decoders"}),
    "its enlargement": (lambda: decoder().up[-1].upsample, {"conv": "decoders", "with_conv": "decoders"}),
    "its attention": (lambda: autoencoders.kl(4).first_stage_model.decoder.mid.attn_1, {
        "in_channels": "decoders", "k": "decoders", "norm": "decoders", "optimized_attention": "decoders", "proj_out": "decoders", "q": "decoders", "v": "decoders"}),
    "its blocks": (lambda: autoencoders.kl(4).first_stage_model.decoder.mid.block_1, {
        "conv1": "decoders", "conv2": "decoders", "in_channels": "decoders", "norm1": "decoders", "norm2": "decoders", "out_channels": "decoders", "use_conv_shortcut": "decoders"}),
    "its block that changes channels": (lambda: next(block for level in decoder().up for block in level.block if block.in_channels != block.out_channels), {"nin_shortcut": "decoders"}),
    "a tiny autoencoder": (lambda: autoencoders.tiny(4).first_stage_model, {"taesd_decoder": "decoders", "vae_scale": "decoders", "vae_shift": "decoders"}),
    "Wan's VAE": (lambda: autoencoders.wan().first_stage_model, {"conv2": "decoders", "decoder": "decoders"}),
    "its decoder": (lambda: autoencoders.wan().first_stage_model.decoder, {"conv1": "decoders", "head": "decoders", "middle": "decoders", "upsamples": "decoders"}),
    "its attention, Wan's": (lambda: autoencoders.wan().first_stage_model.decoder.middle[1], {
        "dim": "decoders", "norm": "decoders", "optimized_attention": "decoders", "proj": "decoders", "to_qkv": "decoders"}),
    "its enlargement, Wan's": (lambda: next(layer for layer in autoencoders.wan().first_stage_model.decoder.upsamples if hasattr(layer, "resample")), {"resample": "decoders"}),
    "a conditioning's value": (lambda: comfy.conds.CONDRegular(torch.zeros(1)), {"cond": "conditioning layout model_facts", "size": "model_facts"}),
    "what becomes of a conditioning with an area": (area_of_cond, {"area": "conditioning", "mult": "conditioning"}),
    "a context window": (lambda: comfy.context_windows.IndexListContextWindow([0, 1], dim=2, total_frames=4), {"dim": "sampling_run", "get_tensor": "sampling_run"}),
    "a pool of threads": (thread_pool, {"devices": "devices", "get_result": "devices", "submit": "devices"}),
    "an executor of wrappers": (lambda: comfy.patcher_extension.WrapperExecutor.new_class_executor(len, object(), []), {"class_obj": "tiled_diffusion watch"}),
    "an injection": (lambda: comfy.patcher_extension.PatcherInjection(None, None), {"inject": "foreign"}),
    "a hook": (lambda: comfy.hooks.TransformerOptionsHook(), {"hook_type": "patches", "transformers_dict": "foreign"}),
    "a hook group": (comfy.hooks.HookGroup, {"hooks": "foreign patches"}),
}

# The wrappers that are put on a model: how many arguments they are given at least, the class that asks, what is used of that object.
WRAPPERS = {
    "OUTER_SAMPLE": (4, "CFGGuider", ("model_patcher", "model_options", "conds")),
    "PREPARE_SAMPLING": (3, None, ()),
    "SAMPLER_SAMPLE": (6, "KSAMPLER", ("sampler_function", "extra_options")),
    "CALC_COND_BATCH": (5, None, ()),
    "PREDICT_NOISE": (3, "CFGGuider", ()),
    "APPLY_MODEL": (2, "Flux", ()),
    "DIFFUSION_MODEL": (2, "Flux", ()),
}

# What lies in transformer_options when a batch of rows is evaluated.
OPTIONS = {"cond_or_uncond": "patches watch", "sample_sigmas": "patches", "sigmas": "patches", "uuids": "patches", "wrappers": "foreign patches tiled_diffusion watch"}

# Keys of conditionings, of options and of what is called with them, and attributes that only a line gives.
LINES = [
    Line("start_percent", "nodes.py", "prompts", r'"start_percent": start'),
    Line("end_percent", "nodes.py", "prompts", r'"end_percent": end'),
    Line("area", "comfy/samplers.py", "conditioning layout prompts reach", r"""conds(\.get\(|\[)["']area["']"""),
    Line("control", "comfy/samplers.py", "conditioning control layout loading", r"""conds(\.get\(|\[)["']control["']"""),
    Line("default", "comfy/samplers.py", "conditioning prompts", r"'default' in x"),
    Line("gligen", "comfy/samplers.py", "conditioning layout tiled_diffusion", r"""conds(\.get\(|\[)["']gligen["']"""),
    Line("hooks", "comfy/samplers.py", "conditioning foreign layout tiled_diffusion", r"""conds(\.get\(|\[)["']hooks["']"""),
    Line("mask", "comfy/samplers.py", "conditioning layout prompts reach", r"""conds(\.get\(|\[)["']mask["']"""),
    Line("mask_strength", "comfy/samplers.py", "conditioning prompts reach", r"""conds(\.get\(|\[)["']mask_strength["']"""),
    Line("model_conds", "comfy/samplers.py", "conditioning layout model_facts", r"""conds(\.get\(|\[)["']model_conds["']"""),
    Line("strength", "comfy/samplers.py", "conditioning prompts reach", r"""conds(\.get\(|\[)["']strength["']"""),
    Line("timestep_end", "comfy/samplers.py", "conditioning layout prompts", r"""conds(\.get\(|\[)["']timestep_end["']"""),
    Line("timestep_start", "comfy/samplers.py", "conditioning layout prompts", r"""conds(\.get\(|\[)["']timestep_start["']"""),
    Line("uuid", "comfy/samplers.py", "conditioning layout prompts", r"""conds(\.get\(|\[)["']uuid["']"""),
    Line("set_area_to_bounds", "comfy/samplers.py", "prompts"),
    Line("attention_mask", "comfy/model_base.py", "conditioning", r"""out\[["']attention_mask["']\] = """),
    Line("camera_conditions", "comfy/model_base.py", "conditioning", r"""out\[["']camera_conditions["']\] = """),
    Line("c_concat", "comfy/model_base.py", "conditioning", r"""out\[["']c_concat["']\] = """),
    Line("effnet", "comfy/model_base.py", "conditioning", r"""out\[["']effnet["']\] = """),
    Line("keyframe_idxs", "comfy/model_base.py", "conditioning", r"""out\[["']keyframe_idxs["']\] = """),
    Line("lq_latent", "comfy/model_base.py", "conditioning", r"""out\[["']lq_latent["']\] = """, since="0.30.0"),
    Line("pose_latents", "comfy/model_base.py", "conditioning", r"""out\[["']pose_latents["']\] = """),
    Line("ref_mask_latents", "comfy/model_base.py", "conditioning", r"""out\[["']ref_mask_latents["']\] = """, since="0.30.0"),
    Line("sam_latents", "comfy/model_base.py", "conditioning", r"""out\[["']sam_latents["']\] = """, since="0.30.0"),
    Line("context_latents", "comfy/model_base.py", "conditioning", r"""out\[["']context_latents["']\] = """, since="0.30.0"),
    Line("ref_latent", "comfy/model_base.py", "conditioning", r"""out\[["']ref_latent["']\] = """),
    Line("ref_latents", "comfy/model_base.py", "conditioning", r"""out\[["']ref_latents["']\] = """),
    Line("reference_latent", "comfy/model_base.py", "conditioning", r"""out\[["']reference_latent["']\] = """),
    Line("reference_motion", "comfy/model_base.py", "conditioning", r"""out\[["']reference_motion["']\] = """),
    Line("audio_embed", "comfy/model_base.py", "conditioning", r"""out\[["']audio_embed["']\] = """),
    Line("audio_codes", "comfy/model_base.py", "conditioning", r"""out\[["']audio_codes["']\] = """),
    Line("encoder_hidden_states_llama3", "comfy/model_base.py", "conditioning", r"""out\[["']encoder_hidden_states_llama3["']\] = """),
    Line("face_pixel_values", "comfy/model_base.py", "conditioning", r"""out\[["']face_pixel_values["']\] = """),
    Line("latent_shapes", "comfy/model_base.py", "conditioning", r"""out\[["']latent_shapes["']\] = """),
    Line("ref_audio", "comfy/model_base.py", "conditioning", r"""out\[["']ref_audio["']\] = """),
    Line("ref_contexts", "comfy/model_base.py", "conditioning", r"""out\[["']ref_contexts["']\] = """),
    Line("refer_audio", "comfy/model_base.py", "conditioning", r"""out\[["']refer_audio["']\] = """),
    Line("siglip_feats", "comfy/model_base.py", "conditioning", r"""out\[["']siglip_feats["']\] = """),
    Line("c_crossattn", "comfy/model_base.py", "model_facts", r"""out\[["']c_crossattn["']\] = """),
    Line("guide_attention_entries", "comfy/model_base.py", "conditioning layout", r"""out\[["']guide_attention_entries["']\] = """),
    Line("vinput_mask", "comfy/ldm/hidream_o1/conditioning.py", "conditioning layout", since="0.30.0"),
    Line("latent_shape", "comfy_extras/nodes_lt.py", "conditioning"),
    Line("pixel_mask", "comfy_extras/nodes_lt.py", "conditioning"),
    Line("pre_filter_count", "comfy_extras/nodes_lt.py", "conditioning"),
    Line("multigpu", "comfy/model_patcher.py", "loading", r"""get_additional_models_with_key\("multigpu"\)""", since="0.24.1"),
    Line("multigpu_clones", "comfy/sampler_helpers.py", "devices tiled_diffusion", r"""model_options\["multigpu_clones"\] = """, since="0.24.1"),
    Line("multigpu_options", "comfy/multigpu.py", "devices", r"model_options\['multigpu_options'\] = ", since="0.24.1"),
    Line("relative_speed", "comfy/multigpu.py", "devices", r""""relative_speed": self\.relative_speed""", since="0.24.1"),
    Line("multigpu_thread_device", "comfy/samplers.py", "patches", r"""transformer_options\["multigpu_thread_device"\] = """, since="0.24.1"),
    Line("multigpu_thread_pool", "comfy/samplers.py", "devices", r"""model_options\["multigpu_thread_pool"\] = """, since="0.24.1"),
    Line("context_window", "comfy/context_windows.py", "layout patches sampling_run", r"""\["transformer_options"\]\["context_window"\] = """),
    Line("easycache", "comfy_extras/nodes_easycache.py", "layout tiled_diffusion watch", r"""\["transformer_options"\]\["easycache"\] = """),
    Line("input", "comfy/samplers.py", "watch", r"""\{"input": input_x, """),
    Line("img", "comfy/ldm/qwen_image/model.py", "patches", r""""img": """),
    Line("latent_shapes", "comfy/samplers.py", "tiled_diffusion", r"executor\.execute\(noise, .*latent_shapes=latent_shapes\)"),
    Line("model_options", "comfy/samplers.py", "tiled_diffusion", r"""extra_args = \{"model_options": """),
    Line("model_function_wrapper", "comfy/model_patcher.py", "foreign watch", r"""model_options\["model_function_wrapper"\] = """),
    Line("optimized_attention_override", "comfy/ldm/modules/attention.py", "foreign", r"""transformer_options\["optimized_attention_override"\]\("""),
    Line("patches", "comfy/model_patcher.py", "foreign watch", r"""to\["patches"\]\[name\] = """),
    Line("patches_replace", "comfy/model_patcher.py", "foreign", r"""to\["patches_replace"\]\[name\]\[block\] = """),
    Line("callbacks", "comfy/samplers.py", "patches"),
    Line("sampler_post_cfg_function", "comfy/model_patcher.py", "refusals", r"""model_options\["sampler_post_cfg_function"\] = """),
    Line("SelfAttentionGuidance", "comfy_extras/nodes_sag.py", "refusals", r"class SelfAttentionGuidance\("),
    Line("torch_compile_kwargs", "comfy_api/torch_helpers/torch_compile.py", "model_facts watch"),
    Line("inner_model", "comfy/samplers.py", "sampling_run", r"self\.inner_model, self\.conds, self\.loaded_models = "),
    Line("is_nested", "comfy/nested_tensor.py", "decode", r"self\.is_nested = True"),
    Line("pool", "comfy/taesd/taesd.py", "decoders", r"self\.pool = ", since="0.24.1"),
    Line("encode_latent_cond", "comfy_extras/nodes_model_patch.py", "patches", r"def encode_latent_cond\("),
    Line("encode_render_video", "comfy_extras/nodes_model_patch.py", "patches", r"def encode_render_video\(", since="0.30.0"),
    Line("process_input_latent_image", "comfy_extras/nodes_model_patch.py", "patches", r"def process_input_latent_image\("),
    Line("encoded_image", "comfy_extras/nodes_model_patch.py", "patches", r"self\.encoded_image = "),
    Line("encoded_image_size", "comfy_extras/nodes_model_patch.py", "patches", r"self\.encoded_image_size = "),
    Line("image", "comfy_extras/nodes_model_patch.py", "patches", r"self\.image = "),
    Line("inpaint_image", "comfy_extras/nodes_model_patch.py", "patches", r"self\.inpaint_image = "),
    Line("model_patch", "comfy_extras/nodes_model_patch.py", "patches", r"self\.model_patch = "),
    Line("prepared_render", "comfy_extras/nodes_model_patch.py", "patches", r"self\.prepared_render = ", since="0.30.0"),
    Line("temp_data", "comfy_extras/nodes_model_patch.py", "patches", r"self\.temp_data = "),
    Line("vae", "comfy_extras/nodes_model_patch.py", "patches", r"self\.vae = "),
    Line("cached_features", "comfy/ldm/supir/supir_patch.py", "patches", r"self\.cached_features = "),
    Line("hint_latent", "comfy/ldm/supir/supir_patch.py", "patches", r"self\.hint_latent = "),
    Line("image", "comfy/ldm/anima/lllite.py", "patches", r"self\.image = ", since="0.30.0"),
    Line("mask", "comfy/ldm/anima/lllite.py", "patches", r"self\.mask = ", since="0.30.0"),
    Line("sigma_end", "comfy/ldm/anima/lllite.py", "patches", r"self\.sigma_end = ", since="0.30.0"),
    Line("sigma_start", "comfy/ldm/anima/lllite.py", "patches", r"self\.sigma_start = ", since="0.30.0"),
    Line("instance", "server.py", "preview", r"PromptServer\.instance = self"),
    Line("app", "server.py", "preview", r"self\.app = web\.Application\("),
    Line("routes", "server.py", "preview", r"self\.routes = routes"),
    Line("client_id", "server.py", "preview", r"self\.client_id = None"),
    Line("send_sync", "server.py", "preview", r"def send_sync\(self, event, data, sid=None\)"),
    Line("prompt_queue", "server.py", "wiring", r"self\.prompt_queue = "),
    # The graph is the third part of what is queued.
    Line("item", "server.py", "wiring", r"self\.prompt_queue\.put\(\(number, prompt_id, prompt, "),
]


def told(seam: str, what: str, files: str) -> str:
    """What has moved, in a sentence for whoever mends it."""
    return f"{seam}: {what} on this host, ComfyUI {__version__}. It is used by {', '.join(f'{name}.py' for name in files.split())}."


def resolved(name: str):
    """What a dotted name stands for: modules as far as there are any, then attributes. Raises AttributeError."""
    parts, found = name.split("."), None
    for count in range(1, len(parts) + 1):
        try:
            found, rest = importlib.import_module(".".join(parts[:count])), parts[count:]
        except ModuleNotFoundError:
            break
    for part in rest:
        found = getattr(found, part)
    return found


def problem_of(seam: Seam) -> str | None:
    """What is wrong with a seam of this host, in a sentence."""
    try:
        found = resolved(seam.name)
    except AttributeError:
        return None if seam.optional else told(seam.name, "expected to be there, but it is gone", seam.files)
    if getattr(found, "__isabstractmethod__", False):
        return told(seam.name, "expected to be there, but only its abstract form is", seam.files)
    missing = [name for name in seam.has.split() if not hasattr(found, name)]
    if missing:
        return told(seam.name, f"expected to have {', '.join(missing)}, but it has not", seam.files)
    if seam.takes is not None:
        positions, names = seam.takes
        try:
            inspect.signature(found).bind(*[None] * positions, **dict.fromkeys(names))
        except TypeError as error:
            shape = ", ".join([f"{positions} arguments", *names]) if names else f"{positions} arguments"
            return told(seam.name, f"expected to take {shape}, but it is {inspect.signature(found)} ({error})", seam.files)
    return None


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_the_host_has_what_the_pack_uses(seam):
    assert problem_of(seam) is None


@pytest.mark.parametrize("what", OBJECTS)
def test_the_hosts_objects_have_what_the_pack_uses(what):
    make, attributes = OBJECTS[what]
    made = make()
    if made is None:
        pytest.skip(f"this host, ComfyUI {__version__}, has none")
    missing = [told(f"{what} ({type(made).__name__})", f"expected to have {name}, but it has not", files) for name, files in attributes.items() if not hasattr(made, name)]
    assert missing == []


@pytest.fixture(scope="module")
def asked() -> dict[str, tuple]:
    """What each kind of wrapper was given in a run of the host's sampler: the object that asks, and the arguments."""
    model, found = load("flux_dev"), {}
    patcher = model.patcher.clone()
    for name in WRAPPERS:
        def record(executor, *args, name=name, **kwargs):
            owner = executor.class_obj
            found.setdefault(name, (type(owner).__name__ if owner is not None else None, owner if owner is None else set(dir(owner)), args, kwargs))
            return executor(*args, **kwargs)
        patcher.add_wrapper_with_key(getattr(comfy.patcher_extension.WrappersMP, name), "seams", record)
    sample(model, patcher, size=(64, 64), steps=2, cfg=4.0)
    return found


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_called_as_the_pack_takes_it(name, asked):
    least, owner, attributes = WRAPPERS[name]
    files = "tiled_diffusion patches watch"
    assert name in asked, told(f"WrappersMP.{name}", "expected to be called while sampling, but it is not", files)
    kind, has, args, _ = asked[name]
    assert len(args) >= least, told(f"WrappersMP.{name}", f"expected at least {least} arguments in order, but it is given {len(args)}", files)
    if owner is not None:
        assert kind == owner, told(f"WrappersMP.{name}", f"expected to be asked by a {owner}, but a {kind} asks", files)
    assert set(attributes) <= (has or set()), told(f"WrappersMP.{name}", f"expected the object that asks to have {attributes}", files)


def test_options_have_the_keys_that_the_pack_reads(asked):
    _, _, args, kwargs = asked["APPLY_MODEL"]
    options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "cond_or_uncond" in value)
    missing = [told(f"transformer_options[{key!r}]", "expected to be there when a batch is evaluated, but it is not", files) for key, files in OPTIONS.items() if key not in options]
    assert missing == []
    _, _, (model, conds, x, sigma, model_options), _ = asked["CALC_COND_BATCH"]
    assert {"model_conds", "uuid"} <= conds[0][0].keys() and tuple(sigma.shape) == (x.shape[0],) and "transformer_options" in model_options


def problem_of_line(line: Line, host: Path) -> str | None:
    """What is wrong with a line of a host, in a sentence."""
    if numbers(line.since) > numbers(__version__):
        return None
    file = host / line.file
    if file.is_file() and re.search(line.pattern, file.read_text("utf-8")):
        return None
    return told(f"{line.key!r} of {line.file}", f"expected a line like {line.pattern!r}, but there is none", line.files)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))[:3]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.key}-{line.file}")
def test_the_host_has_the_lines_that_the_pack_goes_by(line, comfyui_dir):
    assert problem_of_line(line, Path(comfyui_dir)) is None


def host_names(path: Path) -> dict[str, int]:
    """The host's names that a file uses, except those of its node API, and the line of each: imports and attributes of what is imported."""
    tree, known, found = ast.parse(path.read_text("utf-8")), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0] for alias in node.names if is_hosts(alias.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and is_hosts(node.module):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        name = full_name(node, known) if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in inner else None
        if name is None and isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and isinstance(node.args[1], ast.Constant):
            owner = full_name(node.args[0], known)
            name = owner and f"{owner}.{node.args[1].value}"
        if name is not None and not isinstance(safely(name), types.ModuleType):
            found.setdefault(name, node.lineno)
    return found


def is_hosts(module: str) -> bool:
    return module.partition(".")[0] in HOST_MODULES


def full_name(node: ast.AST, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, known)
        return owner and f"{owner}.{node.attr}"
    return known.get(node.id) if isinstance(node, ast.Name) else None


def safely(name: str):
    try:
        return resolved(name)
    except AttributeError:
        return None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_all_that_a_file_uses_of_the_host_is_in_the_table(path):
    listed = {name for seam in SEAMS if path.stem in seam.files.split() for name in (seam.name, *(f"{seam.name}.{part}" for part in seam.has.split()))}
    without = [
        f"{path.name}, line {line}: {name} is the host's, and not in the table of tests/test_host_seams.py for {path.stem}."
        for name, line in host_names(path).items() if name not in listed]
    assert without == []


def keys_of_options(path: Path) -> dict[str, int]:
    """The keys that a file reads of the host's dictionaries, and the line of each; those are known by what they are called here."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        owner = key = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
            owner, key = node.func.value, node.args[0]
        elif isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            owner, key = node.comparators[0], node.left
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and called(owner) in DICTIONARIES:
            found.setdefault(key.value, node.lineno)
    return found


def called(node: ast.AST) -> str:
    """What a dictionary is called where it is used: the name, or the key that gives it."""
    if isinstance(node, ast.Subscript):
        return called(node.slice)
    if isinstance(node, ast.Call):
        return called(node.args[0]) if node.args else ""
    return str(getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", ""))


DICTIONARIES = ("arguments", "conds", "entry", "guide", "kwargs", "model_conds", "model_options", "options", "transformer_options")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_all_keys_that_a_file_reads_of_the_host_are_in_the_table(path):
    listed = {line.key for line in LINES if path.stem in line.files.split()} | {key for key, files in OPTIONS.items() if path.stem in files.split()} | {"transformer_options"}
    without = [
        f"{path.name}, line {line}: {key!r} is a key of the host's, and not in the tables of tests/test_host_seams.py for {path.stem}."
        for key, line in keys_of_options(path).items() if key not in listed]
    assert without == []


def test_all_values_that_windows_have_rules_for_are_in_the_table():
    listed = {line.key for line in LINES if line.file == "comfy/model_base.py"}
    assert {*conditioning.RULES_OF_CONDS, *conditioning.WHOLE, *conditioning.REFERENCES} <= listed


def test_what_is_listed_is_used_by_the_files_that_are_named():
    texts = {path.stem: path.read_text("utf-8") for path in SHIPPED}
    named = [(seam.name, file) for seam in SEAMS for file in seam.files.split()]
    named += [(name, file) for _, attributes in OBJECTS.values() for name, files in attributes.items() for file in files.split()]
    named += [(name, file) for name, files in OPTIONS.items() for file in files.split()]
    named += [(line.key, file) for line in LINES for file in line.files.split()]
    assert [(name, file) for name, file in named if not re.search(rf"\b{name.rpartition('.')[2]}\b", texts[file])] == []


@pytest.mark.parametrize(
    "seam, sentence",
    [
        (Seam("comfy.utils.no_such_scale", "canvas"), "comfy.utils.no_such_scale: expected to be there, but it is gone on this host, ComfyUI {}. It is used by canvas.py."),
        (Seam("comfy.sd.VAE", "decode", has="decode levitate"), "comfy.sd.VAE: expected to have levitate, but it has not on this host, ComfyUI {}. It is used by decode.py."),
    ],
)
def test_what_is_gone_is_told_in_a_sentence(seam, sentence):
    assert problem_of(seam) == sentence.format(__version__)


def test_a_line_that_is_gone_is_told_unless_the_host_is_older_than_it(tmp_path):
    (tmp_path / "file.py").write_text("options['lazycache'] = 1\n")
    told = f"'easycache' of file.py: expected a line like 'easy', but there is none on this host, ComfyUI {__version__}. It is used by layout.py, watch.py."
    assert problem_of_line(Line("easycache", "file.py", "layout watch", "easy"), tmp_path) == told
    assert problem_of_line(Line("lazycache", "file.py", "layout watch"), tmp_path) is None
    assert problem_of_line(Line("easycache", "gone.py", "layout watch", "easy"), tmp_path).startswith("'easycache' of gone.py: expected a line")
    assert problem_of_line(Line("easycache", "file.py", "layout watch", "easy", since="99.0.0"), tmp_path) is None


def test_an_abstract_method_is_taken_for_gone():
    problem = problem_of(Seam("comfy.context_windows.ContextWindowABC.get_tensor", "sampling_run"))
    assert problem == f"comfy.context_windows.ContextWindowABC.get_tensor: expected to be there, but only its abstract form is on this host, ComfyUI {__version__}. It is used by sampling_run.py."


def test_keys_are_found_in_all_their_spellings(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("options.get('a')\nself.model_options['b']\n'c' in entry['model_conds']\nx.get('transformer_options', {}).get('d')\nother['e']\n")
    assert keys_of_options(file) == {"a": 1, "b": 2, "c": 3, "model_conds": 3, "d": 4}


def test_other_arguments_are_told_with_those_that_there_are():
    problem = problem_of(Seam("comfy.utils.repeat_to_batch_size", "canvas masks", call(2, "gently")))
    assert problem.startswith("comfy.utils.repeat_to_batch_size: expected to take 2 arguments, gently, but it is (")
    assert problem.endswith("It is used by canvas.py, masks.py.")


def test_what_a_file_would_use_is_found_in_all_its_spellings(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import comfy.utils\nimport comfy.taesd.taesd as tiny\nfrom comfy.patcher_extension import WrappersMP as Kinds\nfrom comfy_api.latest import io\n"
        "comfy.utils.lcm(tiny.Block, Kinds.APPLY_MODEL)\nio.Schema()\ngetattr(comfy.utils, 'vanished', None)\n")
    assert host_names(file) == {
        "comfy.utils.lcm": 5, "comfy.taesd.taesd.Block": 5, "comfy.patcher_extension.WrappersMP.APPLY_MODEL": 5, "comfy.utils.vanished": 7}

"""UNets with the goldens' weights, small UNets and transformers of the same classes, in ComfyUI's own model objects."""

from concurrent.futures import ThreadPoolExecutor

import comfy.cldm.cldm
import comfy.ldm.anima.model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from sampling import FAMILIES

from controlnext_core.unet_keys import diffusers_to_ldm

UNETS = {
    "sd15": (comfy.supported_models.SD15, dict(
        in_channels=4, out_channels=4, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4], context_dim=768,
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1, use_linear_in_transformer=False, adm_in_channels=None)),
    "sdxl": (comfy.supported_models.SDXL, dict(
        in_channels=4, out_channels=4, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], context_dim=2048,
        transformer_depth=[0, 0, 1, 1, 1, 1], transformer_depth_output=[0] * 3 + [1] * 6,
        transformer_depth_middle=1, use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential")),
    "svd": (comfy.supported_models.SVD_img2vid, dict(
        in_channels=8, out_channels=4, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4], context_dim=1024,
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1] * 9 + [0] * 3,
        transformer_depth_middle=1, use_linear_in_transformer=True, adm_in_channels=768, num_classes="sequential",
        use_temporal_attention=True, use_temporal_resblock=True, extra_ff_mix_layer=True, use_spatial_context=True,
        merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1])),
}
WIDTH = 64  # of the small UNets, a fifth of the released ones
SMALL = dict(model_channels=WIDTH, num_res_blocks=[1, 1], channel_mult=[1, 1], transformer_depth=[1, 0],
             transformer_depth_output=[1, 1, 0, 0], transformer_depth_middle=-1)
SD35_MEDIUM = dict(x_block_self_attn_layers=[0, 1], qk_norm="rms")
TRANSFORMERS = {  # with real heads
    "flux": (comfy.supported_models.Flux, dict(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=40, hidden_size=128,
        mlp_ratio=2.0, num_heads=1, depth=3, depth_single_blocks=1, axes_dim=[16, 56, 56], txt_ids_dims=[], theta=10000,
        patch_size=2, qkv_bias=True, guidance_embed=True)),
    "chroma": (comfy.supported_models.Chroma, dict(
        image_model="chroma", in_channels=64, out_channels=64, context_in_dim=40, hidden_size=128, mlp_ratio=2.0,
        num_heads=1, depth=3, depth_single_blocks=1, axes_dim=[16, 56, 56], txt_ids_dims=[], theta=10000, patch_size=2,
        qkv_bias=True, in_dim=64, out_dim=128, hidden_dim=64, n_layers=1, vec_in_dim=None)),
    "qwen_image": (comfy.supported_models.QwenImage, dict(
        image_model="qwen_image", in_channels=64, num_layers=3, num_attention_heads=1, joint_attention_dim=40)),
    "z_image": (comfy.supported_models.ZImage, dict(
        image_model="lumina2", patch_size=2, in_channels=16, cap_feat_dim=40, n_layers=3, n_refiner_layers=2, dim=256,
        n_heads=2, n_kv_heads=2, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], qk_norm=True, rope_theta=256.0,
        ffn_dim_multiplier=2.0, multiple_of=64, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32)),
    "wan": (comfy.supported_models.WAN21_T2V, dict(
        image_model="wan2.1", model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=128, ffn_dim=256, freq_dim=32,
        text_dim=40, out_dim=16, num_heads=1, num_layers=3)),
    "hunyuan_video15": (comfy.supported_models.HunyuanVideo15, dict(
        image_model="hunyuan_video", in_channels=65, out_channels=32, vec_in_dim=None, context_in_dim=40,
        hidden_size=128, mlp_ratio=2.0, num_heads=1, depth=3, depth_single_blocks=0, axes_dim=[16, 56, 56], theta=256,
        patch_size=[1, 1, 1], qkv_bias=True, guidance_embed=False, byt5=False, meanflow=False, meanflow_sum=False,
        use_cond_type_embedding=True, vision_in_dim=1152)),
    "auraflow": (comfy.supported_models.AuraFlow, dict(
        in_channels=4, out_channels=4, dim=128, n_layers=4, n_double_layers=3, n_heads=1, global_conddim=128,
        cond_seq_dim=40, max_seq=16 ** 2)),
    "ltxv": (comfy.supported_models.LTXV, dict(
        image_model="ltxv", in_channels=128, cross_attention_dim=128, attention_head_dim=128, num_attention_heads=1,
        caption_channels=40, num_layers=3)),
    "ltx2": (comfy.supported_models.LTXAV, dict(
        image_model="ltxav", in_channels=128, cross_attention_dim=128, audio_cross_attention_dim=64,
        attention_head_dim=128, num_attention_heads=1, audio_attention_head_dim=64, audio_num_attention_heads=1,
        caption_channels=40, num_layers=3, connector_attention_head_dim=40, connector_num_attention_heads=1,
        connector_num_layers=1, rope_type="split", use_middle_indices_grid=True, causal_temporal_positioning=True)),
    "flux2": (comfy.supported_models.Flux2, dict(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=40, hidden_size=128,
        mlp_ratio=2.0, num_heads=1, depth=3, depth_single_blocks=1, axes_dim=[32, 32, 32, 32], txt_ids_dims=[3],
        theta=2000, patch_size=1, qkv_bias=False, guidance_embed=True, global_modulation=True, mlp_silu_act=True,
        ops_bias=False, default_ref_method="index", ref_index_scale=10.0)),
}
NEWER = {  # those that control has no way into in older versions of ComfyUI
    "krea2": (getattr(comfy.supported_models, "Krea2", None), dict(
        image_model="krea2", features=128, tdim=64, txtdim=40, heads=1, kvheads=1, multiplier=2, layers=3, txtlayers=1,
        txtheads=1, txtkvheads=1, default_ref_method="index")),
    "anima": (comfy.supported_models.Anima, dict(
        image_model="anima", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
        patch_spatial=2, patch_temporal=1, model_channels=128, crossattn_emb_channels=40, num_blocks=3, num_heads=1,
        mlp_ratio=2.0, pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True, adaln_lora_dim=16,
        rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0)),
}
IS_NEWER = hasattr(comfy.supported_models, "Krea2")
TRANSFORMERS |= NEWER if IS_NEWER else {}
VARIANTS = {  # more of Wan
    "image to video": (comfy.supported_models.WAN21_I2V, TRANSFORMERS["wan"][1] | dict(model_type="i2v", in_dim=36)),
    "5B": (comfy.supported_models.WAN22_T2V, TRANSFORMERS["wan"][1] | dict(in_dim=48, out_dim=48)),
}
NO_BASES = {  # {ComfyUI's name: ...}
    "HunyuanVideo": (comfy.supported_models.HunyuanVideo, TRANSFORMERS["hunyuan_video15"][1]),
    "Kandinsky5": (comfy.supported_models.Kandinsky5, dict(
        image_model="kandinsky5", model_dim=128, time_dim=32, ff_dim=64, visual_embed_dim=132, axes_dims=(32, 48, 48),
        num_text_blocks=1, num_visual_blocks=1)),
    "Anima": NEWER["anima"],
}
NARROW = dict(stem_0=8, stem_1=8, width_0=16, width_1=16, width_2=32)  # of a module that is quick


def unet_model(base: str, dtype=torch.float32, device=None, kind=None, **changes) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of ComfyUI's class for ``base``, or of another ``kind`` that is built like it, its weights not filled."""
    model_class, config = UNETS[base]
    model_class = kind or model_class
    config = {"image_size": 32, "model_channels": 320, "use_spatial_transformer": True, "dtype": dtype, "legacy": False,
              **config, **changes}
    return _patcher(model_class(config), dtype, device)


def _patcher(model_config, dtype, device, loading: dict | None = None) -> comfy.model_patcher.ModelPatcher:
    # what 8 bits hold is computed in more
    model_config.set_inference_dtype(dtype, torch.float32 if dtype.itemsize == 1 else None)
    vars(model_config).update(loading or {})
    projection = {"cc_projection.weight": torch.zeros(768, 772), "cc_projection.bias": torch.zeros(768)}  # Zero123's
    with torch.no_grad():
        model = model_config.get_model(projection, device=device)
    return comfy.model_patcher.CoreModelPatcher(model, comfy.model_management.get_torch_device(),
                                                comfy.model_management.unet_offload_device())


def golden_unet(goldens, base: str) -> comfy.model_patcher.ModelPatcher:
    """The full UNet of ``base`` with the weights that the goldens were computed with."""
    patcher = unet_model(base)
    unet = patcher.model.diffusion_model
    names = diffusers_to_ldm(unet.state_dict())
    shapes = goldens.unet_shapes[base]

    def fill(key):
        return names[key], torch.from_numpy(goldens.weights.tensor(key, shapes[key], 11))

    with ThreadPoolExecutor(2) as threads:
        weights = dict(threads.map(fill, shapes))
    assert weights.keys() == unet.state_dict().keys()
    unet.load_state_dict(weights, assign=True)
    return patcher


def small_unet(base: str, dtype=torch.float32, seed: int = 0, **changes) -> comfy.model_patcher.ModelPatcher:
    """A UNet of ``base``'s class with few narrow blocks and seeded random weights, for what needs no golden."""
    return _filled(unet_model(base, dtype, **{**SMALL, **changes}), seed)


def known_unet(seed: int = 0, **changes) -> comfy.model_patcher.ModelPatcher:
    """A small UNet that ComfyUI's loaders know as an SD1.5, by its width."""
    return small_unet("sd15", seed=seed, model_channels=320, **changes)


def narrowed(state_dict: dict[str, torch.Tensor], width: int = WIDTH) -> dict[str, torch.Tensor]:
    """A module's weights, its last layer cut to the width of a small UNet."""
    return state_dict | {key: value[:width].contiguous() for key, value in state_dict.items()
                         if key.startswith("mid_convs.1.")}


def _filled(patcher, seed: int) -> comfy.model_patcher.ModelPatcher:
    generator = torch.Generator().manual_seed(seed)
    for parameter in patcher.model.diffusion_model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 50.0
        bias = 0.0 if parameter.ndim > 1 else 0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in ** 0.5 + bias)
    return patcher


def sd3_model(dtype=torch.float32, device=None, **changes) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of ComfyUI's class for SD3 with three blocks, 64 times as many wide, its weights not filled."""
    config = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 3, "input_size": None,
              "adm_in_channels": 2048, "num_patches": 16 ** 2, "pos_embed_max_size": 16,
              "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [], "dtype": dtype, **changes}
    width = 64 * config["depth"]
    config["context_embedder_config"] = {"target": "torch.nn.Linear",
                                         "params": {"in_features": 4096, "out_features": width}}
    return _patcher(comfy.supported_models.SD3(config), dtype, device)


def small_sd3(dtype=torch.float32, seed: int = 0, **changes) -> comfy.model_patcher.ModelPatcher:
    """The same with seeded random weights; ``SD35_MEDIUM`` as changes for the second attention of its blocks."""
    return _filled_sd3(sd3_model(dtype, **changes), seed)


def _filled_sd3(patcher, seed: int) -> comfy.model_patcher.ModelPatcher:
    transformer = _filled(patcher, seed).model.diffusion_model
    transformer.pos_embed.copy_(torch.randn(transformer.pos_embed.shape, generator=torch.Generator().manual_seed(seed)))
    return patcher


def two_block_sd3(**changes) -> comfy.model_patcher.ModelPatcher:
    """An SD3 as wide as the released ones of 2B, 1536, with its first and its last block alone."""
    patcher = sd3_model(depth=24, **changes)
    del patcher.model.diffusion_model.joint_blocks[1:-1]
    return _filled_sd3(patcher, 0)


def transformer_model(base: str, dtype=torch.float32, device=None, loading: dict | None = None,
                      **changes) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of ComfyUI's class for ``base`` with three blocks, its weights not filled.

    Args:
        loading: what ComfyUI's loader sets of the model's configuration for weights in a form of their own.
    """
    if base == "sd3":
        return sd3_model(dtype, device, **changes)
    model_class, config = {**TRANSFORMERS, **VARIANTS, **NO_BASES}[base]
    return _patcher(model_class({**config, "dtype": dtype, **changes}), dtype, device, loading)


def _with_small_adapter(base: str, patcher, dtype) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of Anima with what reads the prompt as narrow as the rest; its class makes it in the released width."""
    if base == "anima":
        patcher.model.diffusion_model.llm_adapter = comfy.ldm.anima.model.LLMAdapter(
            40, 40, 40, num_layers=1, num_heads=1, dtype=dtype, operations=comfy.ops.manual_cast)
    return patcher


def small_transformer(base: str, dtype=torch.float32, seed: int = 0, **changes) -> comfy.model_patcher.ModelPatcher:
    """The same with seeded random weights."""
    if base == "sd3":
        return small_sd3(dtype, seed, **changes)
    return _filled(_with_small_adapter(base, transformer_model(base, dtype, **changes), dtype), seed)


def small_quantised(base: str, loading: dict, weights: dict, **changes) -> comfy.model_patcher.ModelPatcher:
    """The same with weights in 8 or fewer bits, made as ComfyUI's loader makes one whose sizes it knows."""
    patcher = transformer_model(base, loading={"manual_cast_dtype": torch.float32, **loading}, **changes)
    patcher = _with_small_adapter(base, patcher, torch.float32)
    patcher.model.load_model_weights(dict(weights))
    return patcher


def small_unets(dtype=torch.float32) -> dict:
    """{family: a UNet of its base}, one for all families of a base."""
    unets = {base: small_unet(base, dtype) for base in UNETS}
    return {family: unets[base] for family, base in FAMILIES.items()}


def stock_controlnet(model) -> dict[str, torch.Tensor]:
    """A state dict of ComfyUI's own ControlNet for a MODEL's UNet, with seeded random weights."""
    config = {key: value for key, value in model.model.model_config.unet_config.items()
              if key not in ("out_channels", "transformer_depth_output", "dtype")}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init, **config)
    generator = torch.Generator().manual_seed(6)
    return {key: 0.5 * torch.randn(value.shape, generator=generator) / max(value[0].numel(), 100) ** 0.5
            for key, value in net.state_dict().items()}

"""Names of transformers' weights in diffusers and in ComfyUI, as tables; what they do not name is named alike in both.

A tensor of ComfyUI's may hold several of diffusers' below one another: query, key and value, in Flux's single blocks
the first layer of the feed-forward too.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .bases import bases_of

_QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Names:
    """The names of one kind of transformers, all without the final .weight or .bias.

    Attributes:
        top: {ComfyUI's: diffusers'} outside of the blocks.
        blocks: {ComfyUI's list of blocks: (diffusers', {ComfyUI's layer: diffusers' layers})}.
        exchanged: layers of ``top`` whose tensors have their halves the other way round.
        tables: {ComfyUI's: diffusers'} tensors of a block that are in none of its layers.
    """

    top: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = field(default_factory=dict)
    exchanged: tuple[str, ...] = ()
    tables: Mapping[str, str] = field(default_factory=dict)


def _joined(attention: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{attention}.{name}" for name in names)


def _under(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{layer}": f"{theirs}.{name}" for layer, name in names.items()}


def _all_under(ours: str, theirs: str, layers: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{layer}": _joined(theirs, names) for layer, names in layers.items()}


_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}
_FLUX_TOP = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **_under("time_in", "time_text_embed.timestep_embedder", _EMBEDDER),
    **_under("vector_in", "time_text_embed.text_embedder", _EMBEDDER),
    **_under("guidance_in", "time_text_embed.guidance_embedder", _EMBEDDER),
}
_FLUX_DOUBLE = {
    "img_attn.qkv": _joined("attn", _QKV), "img_attn.proj": ("attn.to_out.0",),
    "img_attn.norm.query_norm": ("attn.norm_q",), "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_mod.lin": ("norm1.linear",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_attn.qkv": _joined("attn", ("add_q_proj", "add_k_proj", "add_v_proj")), "txt_attn.proj": ("attn.to_add_out",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",), "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_mod.lin": ("norm1_context.linear",), "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_FLUX_SINGLE = {
    "linear1": (*_joined("attn", _QKV), "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",),
}
_Z_IMAGE_BLOCK = {
    "attention.qkv": _joined("attention", _QKV), "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",), "attention.k_norm": ("attention.norm_k",),
}
_SD3_ATTENTION = {"qkv": _QKV, "proj": ("to_out.0",), "ln_q": ("norm_q",), "ln_k": ("norm_k",)}
_WAN_ATTENTION = {
    "q": ("to_q",), "k": ("to_k",), "v": ("to_v",), "o": ("to_out.0",), "norm_q": ("norm_q",), "norm_k": ("norm_k",),
    "k_img": ("add_k_proj",), "v_img": ("add_v_proj",), "norm_k_img": ("norm_added_k",),
}
_ANIMA_ATTENTION = {
    "q_proj": ("to_q",), "k_proj": ("to_k",), "v_proj": ("to_v",), "output_proj": ("to_out.0",), "q_norm": ("norm_q",),
    "k_norm": ("norm_k",),
}
_ANIMA_MODULATION = {"1": ("linear_1",), "2": ("linear_2",)}
_AURAFLOW_MLP = {"c_fc1": ("linear_1",), "c_fc2": ("linear_2",), "c_proj": ("out_projection",)}
_KREA2_BLOCK = {
    "attn.wq": ("attn.to_q",), "attn.wk": ("attn.to_k",), "attn.wv": ("attn.to_v",), "attn.wo": ("attn.to_out.0",),
    "attn.gate": ("attn.to_gate",), "attn.qknorm.qnorm": ("attn.norm_q",), "attn.qknorm.knorm": ("attn.norm_k",),
    "mlp.gate": ("ff.gate",), "mlp.up": ("ff.up",), "mlp.down": ("ff.down",), "prenorm": ("norm1",),
    "postnorm": ("norm2",),
}
_LTX_TIME = {name: name for name in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")}
_LTX_NORMS = {"q_norm": ("norm_q",), "k_norm": ("norm_k",)}
_LTX = Names({
    "patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in",
    **_under("adaln_single", "time_embed", _LTX_TIME), **_under("audio_adaln_single", "audio_time_embed", _LTX_TIME),
    **_under("prompt_adaln_single", "prompt_adaln", _LTX_TIME),
    **_under("audio_prompt_adaln_single", "audio_prompt_adaln", _LTX_TIME),
    **_under("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift", _LTX_TIME),
    **_under("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift", _LTX_TIME),
    **_under("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate", _LTX_TIME),
    **_under("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate", _LTX_TIME),
}, {"transformer_blocks": ("transformer_blocks", {
    **_all_under("attn1", "attn1", _LTX_NORMS), **_all_under("audio_attn1", "audio_attn1", _LTX_NORMS),
    **_all_under("attn2", "attn2", _LTX_NORMS), **_all_under("audio_attn2", "audio_attn2", _LTX_NORMS),
    **_all_under("audio_to_video_attn", "audio_to_video_attn", _LTX_NORMS),
    **_all_under("video_to_audio_attn", "video_to_audio_attn", _LTX_NORMS),
})}, tables={"scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
             "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table"})
_FLUX = Names(_FLUX_TOP, {
    "double_blocks": ("transformer_blocks", _FLUX_DOUBLE),
    "single_blocks": ("single_transformer_blocks", _FLUX_SINGLE),
}, ("final_layer.adaLN_modulation.1",))
TRANSFORMERS = {
    "sd3": Names({
        "pos_embed": "pos_embed.pos_embed", "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
    }, {"joint_blocks": ("transformer_blocks", {
        "x_block.adaLN_modulation.1": ("norm1.linear",), "x_block.mlp.fc1": ("ff.net.0.proj",),
        "x_block.mlp.fc2": ("ff.net.2",),
        **_all_under("x_block.attn", "attn", _SD3_ATTENTION), **_all_under("x_block.attn2", "attn2", _SD3_ATTENTION),
        "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
        "context_block.attn.qkv": _joined("attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
        "context_block.attn.proj": ("attn.to_add_out",), "context_block.attn.ln_q": ("attn.norm_added_q",),
        "context_block.attn.ln_k": ("attn.norm_added_k",),
    })}, ("final_layer.adaLN_modulation.1",)),
    "flux": _FLUX,
    "chroma": _FLUX,
    "qwen_image": Names(),
    "flux2": Names(_FLUX_TOP, {
        "double_blocks": ("transformer_blocks", {
            **_FLUX_DOUBLE, "img_mlp.0": ("ff.linear_in",), "img_mlp.2": ("ff.linear_out",),
            "txt_mlp.0": ("ff_context.linear_in",), "txt_mlp.2": ("ff_context.linear_out",)}),
        "single_blocks": ("single_transformer_blocks", {
            **_FLUX_SINGLE, "linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}),
    }, ("final_layer.adaLN_modulation.1",)),
    "z_image": Names({
        "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }, {blocks: (blocks, _Z_IMAGE_BLOCK) for blocks in ("layers", "noise_refiner", "context_refiner")}),
    "wan": Names({
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
        **_under("img_emb.proj", "condition_embedder.image_embedder",
                 {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"}),
    }, {"blocks": ("blocks", {
        "ffn.0": ("ffn.net.0.proj",), "ffn.2": ("ffn.net.2",), "norm3": ("norm2",),
        **_all_under("self_attn", "attn1", _WAN_ATTENTION), **_all_under("cross_attn", "attn2", _WAN_ATTENTION),
    })}),
    "hunyuan_video15": Names({
        "img_in.proj": "x_embedder.proj", "cond_type_embedding": "cond_type_embed", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear", "txt_in.input_embedder": "context_embedder.proj_in",
        **_under("time_in", "time_embed.timestep_embedder", _EMBEDDER),
        **_under("time_r_in", "time_embed.timestep_embedder_r", _EMBEDDER),
        **_under("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", _EMBEDDER),
        **_under("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", _EMBEDDER),
        **_under("byt5_in", "context_embedder_2",
                 {"layernorm": "norm", "fc1": "linear_1", "fc2": "linear_2", "fc3": "linear_3"}),
        **_under("vision_in.proj", "image_embedder",
                 {"0": "norm_in", "1": "linear_1", "3": "linear_2", "4": "norm_out"}),
    }, {"double_blocks": ("transformer_blocks", _FLUX_DOUBLE),
        "txt_in.individual_token_refiner.blocks": ("context_embedder.token_refiner.refiner_blocks", {
            "self_attn.qkv": _joined("attn", _QKV), "self_attn.proj": ("attn.to_out.0",),
            "mlp.0": ("ff.net.0.proj",), "mlp.2": ("ff.net.2",), "adaLN_modulation.1": ("norm_out.linear",)}),
        }, ("final_layer.adaLN_modulation.1",)),
    "ltxv": _LTX,
    "krea2": Names({
        "first": "img_in", "tmlp.0": "time_embed.linear_1", "tmlp.2": "time_embed.linear_2", "tproj.1": "time_mod_proj",
        "txtfusion.projector": "text_fusion.projector",
        **_under("txtmlp", "txt_in", {"0": "norm", "1": "linear_1", "3": "linear_2"}),
        **_under("last", "final_layer", {"norm": "norm", "linear": "linear"}),
    }, {"blocks": ("transformer_blocks", _KREA2_BLOCK),
        "txtfusion.layerwise_blocks": ("text_fusion.layerwise_blocks", _KREA2_BLOCK),
        "txtfusion.refiner_blocks": ("text_fusion.refiner_blocks", _KREA2_BLOCK)}),
    "anima": Names({
        "x_embedder.proj.1": "patch_embed.proj", "t_embedding_norm": "time_embed.norm",
        "final_layer.linear": "proj_out",
        **_under("final_layer.adaln_modulation", "norm_out", {"1": "linear_1", "2": "linear_2"}),
        **_under("t_embedder.1", "time_embed.t_embedder", {"linear_1": "linear_1", "linear_2": "linear_2"}),
    }, {"blocks": ("transformer_blocks", {
        "mlp.layer1": ("ff.net.0.proj",), "mlp.layer2": ("ff.net.2",),
        **_all_under("self_attn", "attn1", _ANIMA_ATTENTION), **_all_under("cross_attn", "attn2", _ANIMA_ATTENTION),
        **_all_under("adaln_modulation_self_attn", "norm1", _ANIMA_MODULATION),
        **_all_under("adaln_modulation_cross_attn", "norm2", _ANIMA_MODULATION),
        **_all_under("adaln_modulation_mlp", "norm3", _ANIMA_MODULATION)})}),
    "auraflow": Names({
        "positional_encoding": "pos_embed.pos_embed", "init_x_linear": "pos_embed.proj", "final_linear": "proj_out",
        "cond_seq_linear": "context_embedder", "modF.1": "norm_out.linear",
        **_under("t_embedder.mlp", "time_step_proj", {"0": "linear_1", "2": "linear_2"}),
    }, {"double_layers": ("joint_transformer_blocks", {
        "modX.1": ("norm1.linear",), "modC.1": ("norm1_context.linear",),
        "attn.w2q": ("attn.to_q",), "attn.w2k": ("attn.to_k",), "attn.w2v": ("attn.to_v",),
        "attn.w2o": ("attn.to_out.0",), "attn.w1q": ("attn.add_q_proj",), "attn.w1k": ("attn.add_k_proj",),
        "attn.w1v": ("attn.add_v_proj",), "attn.w1o": ("attn.to_add_out",),
        **_all_under("mlpX", "ff", _AURAFLOW_MLP), **_all_under("mlpC", "ff_context", _AURAFLOW_MLP)}),
        "single_layers": ("single_transformer_blocks", {
            "modCX.1": ("norm1.linear",), "attn.w1q": ("attn.to_q",), "attn.w1k": ("attn.to_k",),
            "attn.w1v": ("attn.to_v",), "attn.w1o": ("attn.to_out.0",), **_all_under("mlp", "ff", _AURAFLOW_MLP)}),
        }, ("modF.1",)),
    "ltx2": _LTX,
}


def transformer_names(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str, tuple[int, int] | None, bool]]:
    """(diffusers name, ComfyUI's key, (first row, rows) or None for all of it, halves exchanged) of every tensor.

    One that the table does not name has ComfyUI's own name. A model that is none of TRANSFORMERS gives nothing.

    Args:
        shapes: {key: shape} of ComfyUI's model, without ``diffusion_model.``.
    """
    names = next((TRANSFORMERS[base] for base in bases_of(shapes) if base in TRANSFORMERS), None)

    for key, shape in shapes.items() if names else ():
        path, _, tensor = key.rpartition(".")
        end = "weight" if tensor == "scale" else names.tables.get(tensor, tensor)  # scale: in older versions of ComfyUI
        exchanged = path in names.exchanged
        theirs = [f"{names.top.get(path, path)}.{end}"] if path else [names.top.get(key, key)]

        match = re.fullmatch(r"([\w.]+?)\.(\d+)\.(.+)", path)
        if match and path not in names.top:
            ours, block, layer = match.groups()
            their_blocks, layers = names.blocks.get(ours, (ours, {}))
            theirs = [f"{their_blocks}.{block}.{name}.{end}" for name in layers.get(layer, (layer,))]
            # the text of SD3's last block goes nowhere, so it has no more than a scale and a shift
            exchanged = (layer == "context_block.adaLN_modulation.1"
                         and f"{ours}.{block}.context_block.mlp.fc1.{tensor}" not in shapes)

        if len(theirs) == 1:
            yield theirs[0], key, None, exchanged
            continue
        width = shapes[f"{path}.weight"][1]
        for index, name in enumerate(theirs):
            first = index * width
            yield name, key, (first, width if index < len(_QKV) else shape[0] - first), exchanged

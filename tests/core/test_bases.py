"""The table of bases: what tells them apart, and that every other table of bases has all of them."""

from collections import Counter

import pytest

from controlnext_core import bases
from controlnext_core.bases import BASES, bases_of
from controlnext_core.families import FAMILIES, family_for
from controlnext_core.transformer_keys import TRANSFORMERS

KEYS = (  # (bases, keys that can be of these)
    ("sd15", ["input_blocks.1.1.proj_in.weight"]),
    ("sdxl", ["label_emb.0.0.weight", "input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight"]),
    ("sdxl", ["add_embedding.linear_1.weight", "down_blocks.0.attentions.0.proj_in.weight"]),
    ("svd", ["label_emb.0.0.weight", "input_blocks.1.1.proj_in.weight", "input_blocks.1.1.time_mixer.mix_factor"]),
    ("sd3", ["joint_blocks.0.x_block.attn.qkv.weight"]),
    ("flux", ["vector_in.in_layer.weight", "double_blocks.0.img_mlp.0.weight"]),
    ("chroma", ["distilled_guidance_layer.norms.0.scale", "double_blocks.0.img_mlp.0.weight"]),
    ("qwen_image", ["txt_norm.weight", "transformer_blocks.1.attn.to_q.weight"]),
    ("flux2", ["double_stream_modulation_img.lin.weight", "time_text_embed.guidance_embedder.linear_1.weight",
               "transformer_blocks.0.attn.to_q.weight"]),
    ("z_image", ["layers.0.attention.qkv.weight"]),
    ("wan", ["blocks.0.self_attn.q.weight"]),
    ("hunyuan_video15", ["cond_type_embedding.weight", "double_blocks.0.img_mlp.0.weight"]),
    ("hunyuan_video15", ["cond_type_embed.weight", "transformer_blocks.0.attn.to_q.weight"]),
    ("ltxv", ["patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight"]),
    ("ltxv", ["caption_projection.linear_1.weight", "proj_in.weight", "transformer_blocks.0.attn1.to_q.weight"]),
    ("krea2", ["txtfusion.projector.weight", "blocks.0.attn.wq.weight"]),
    ("krea2", ["text_fusion.projector.weight", "transformer_blocks.0.attn.to_q.weight"]),
    ("anima", ["llm_adapter.blocks.0.self_attn.q_proj.weight", "blocks.0.self_attn.q_proj.weight"]),
    ("anima", ["transformer_blocks.0.norm1.linear_1.weight", "transformer_blocks.0.attn1.to_q.weight"]),
    ("auraflow", ["double_layers.0.attn.w2q.weight"]),
    ("auraflow", ["single_transformer_blocks.0.attn.to_q.weight", "joint_transformer_blocks.0.attn.to_q.weight"]),
    ("ltx2", ["patchify_proj.weight", "audio_patchify_proj.weight", "transformer_blocks.0.audio_attn1.to_q.weight"]),
    ("ltx2", ["caption_projection.linear_1.weight", "audio_proj_in.weight", "transformer_blocks.0.attn1.to_q.weight"]),
    ("flux chroma flux2 hunyuan_video15", ["double_blocks.0.img_mlp.0.weight"]),
    ("sd3 flux chroma qwen_image flux2 hunyuan_video15 krea2 auraflow", ["transformer_blocks.1.attn.to_q.weight"]),
    ("", ["conv_in.weight"]),
    ("", ["transformer_blocks.1.ff.net.0.proj.weight"]),
)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("expected, keys", KEYS)
def test_keys_tell_the_bases_that_they_can_be_of(expected, keys, prefix):
    assert bases_of(prefix + key for key in keys) == expected.split()


@pytest.mark.parametrize("expected, keys", KEYS)
def test_the_order_of_the_bases_does_not_change_what_keys_tell(monkeypatch, expected, keys):
    monkeypatch.setattr(bases, "BASES", dict(reversed(BASES.items())))
    assert set(bases_of(keys)) == set(expected.split())


def test_the_goldens_files_are_told_apart_by_their_keys(goldens):
    assert {base: bases_of(shapes) for base, shapes in goldens.unet_shapes.items()} == {
        "sd15": ["sd15"], "sdxl": ["sdxl"], "svd": ["svd"]}


def test_a_text_encoder_beside_a_denoiser_tells_nothing():
    text = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert bases_of(["model.diffusion_model.input_blocks.1.1.proj_in.weight", text]) == ["sd15"]


def test_a_mark_belongs_to_one_base_and_a_shared_one_to_several():
    belonging = Counter(mark for base in BASES.values() for mark in base.marks)
    known = belonging + Counter(mark for base in BASES.values() for mark in base.shared)
    assert set(belonging.values()) == {1}
    assert [mark for base in BASES.values() for mark in base.shared if known[mark] == 1] == []


def test_the_other_tables_have_every_base(goldens):
    assert all(name == base.name for name, base in BASES.items())
    assert {family.base for family in FAMILIES.values()} == BASES.keys()
    assert TRANSFORMERS.keys() | goldens.unet_shapes.keys() == BASES.keys()
    assert TRANSFORMERS.keys() & goldens.unet_shapes.keys() == set()


@pytest.mark.parametrize("base", BASES)
def test_a_new_control_has_a_family_of_its_base(base):
    assert family_for("light", BASES[base].new_variant, base).base == base

"""A text encoder that needs no training and no file: every token is a random direction of its own, drawn from a seed.

It has the names and shapes of Stable Diffusion 1.5's CLIP, so that the stock nodes take it. Its transformer layers are
zeros and let everything through, so a text is the bag of its tokens; the denoiser learns what they mean.
"""

from __future__ import annotations

import numpy as np
import torch

PREFIX = "cond_stage_model.transformer."
SHAPE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
         "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}


def text_encoder_weights() -> dict[str, torch.Tensor]:
    """The encoder's state dict in float16, as it stands in a checkpoint."""
    from comfy.clip_model import CLIPTextModel
    from comfy.ops import disable_weight_init
    names = CLIPTextModel(SHAPE, torch.float16, "meta", disable_weight_init).state_dict()
    weights = {PREFIX + name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in names.items()}
    for name, tensor in weights.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        if "token_embedding" in name:
            # RandomState's numbers are promised never to change
            numbers = np.random.RandomState(0).standard_normal(tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(numbers))
    return weights


def captions_to_contexts(captions: list[str]) -> torch.Tensor:
    """Encode texts as the stock CLIP Text Encode node does: (N, 77, 768), float16."""
    import comfy.sd
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in text_encoder_weights().items()}
    clip = comfy.sd.load_text_encoder_state_dicts([weights], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    return torch.cat([clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0][0].half().cpu()
                      for caption in captions])

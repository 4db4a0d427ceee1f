"""A text encoder that needs no training and no file: every token is a random direction of its own, drawn from a seed.

It has the names and shapes of Stable Diffusion 1.5's CLIP, which is one of SD3's, so that the stock nodes take it. Its
transformer layers are zeros and let everything through, so a text is the bag of its tokens; the denoiser learns what
they mean. SD3 gets the pooled text, too, and the text from the layer before the last: there the last gathers the words.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from demo_model.bases import Base

WIDTH = 768
SHAPE = {"num_hidden_layers": 12, "hidden_size": WIDTH, "num_attention_heads": 12, "intermediate_size": 3072,
         "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
POOLED_SHARE = 16.0  # weight of the words' mean in the pooled text, beside the end token, which is always the same


def text_encoder_weights(base: Base) -> dict[str, torch.Tensor]:
    """The encoder's state dict in float16, as it stands in a checkpoint."""
    from comfy.clip_model import CLIPTextModel
    from comfy.ops import disable_weight_init
    names = CLIPTextModel(SHAPE, torch.float16, "meta", disable_weight_init).state_dict()
    weights = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in names.items()}
    for name, tensor in weights.items():
        if "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        if "token_embedding" in name:
            # RandomState's numbers are promised never to change
            numbers = np.random.RandomState(0).standard_normal(tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(numbers))

    if base.pooled_words:  # all tokens get the same attention, and the end token sees those before it
        last = "text_model.encoder.layers.11.self_attn."
        weights[last + "v_proj.weight"].fill_diagonal_(1)
        weights[last + "out_proj.weight"].fill_diagonal_(POOLED_SHARE)
    return {base.text + name: tensor for name, tensor in weights.items()}


def encode_texts(captions: list[str], base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode texts as the stock CLIP Text Encode node does: (N, 77, WIDTH), and pooled (N, WIDTH), float16.

    Columns behind WIDTH, where a base's text is wider, are zeros and left out.
    """
    import comfy.sd
    weights = {name.removeprefix(base.text): tensor for name, tensor in text_encoder_weights(base).items()}
    clip = comfy.sd.load_text_encoder_state_dicts([weights], clip_type=comfy.sd.CLIPType[base.clip])
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0] for caption in captions]
    return (torch.cat([context[..., :WIDTH].half().cpu() for context, _ in encoded]),
            torch.cat([extra["pooled_output"][:, :WIDTH].half().cpu() for _, extra in encoded]))


class Texts:
    """Encoded texts, every token once, since all that a transformer without text positions sees is how often each is.

    Args:
        contexts: (N, 77, WIDTH), pooled: (N, WIDTH).
    """

    def __init__(self, contexts: torch.Tensor, pooled: torch.Tensor):
        distinct = [torch.unique(context, dim=0, return_counts=True) for context in contexts]
        most = max(len(tokens) for tokens, _ in distinct)
        self.tokens = torch.stack([F.pad(tokens, (0, 0, 0, most - len(tokens))) for tokens, _ in distinct])
        self.counts = torch.stack([F.pad(counts, (0, most - len(counts))) for _, counts in distinct])
        self.pooled = pooled

    def __len__(self) -> int:
        return len(self.pooled)

    def to(self, device: torch.device) -> Texts:
        """These texts, on a device."""
        self.tokens, self.counts, self.pooled = (part.to(device) for part in (self.tokens, self.counts, self.pooled))
        return self

    def __getitem__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens (N, most, WIDTH), how often each is there (N, most), pooled (N, WIDTH)), as far as any row has."""
        counts = self.counts[rows]
        most = (counts > 0).sum(dim=1).max()
        return self.tokens[rows, :most].float(), counts[:, :most].float(), self.pooled[rows].float()

"""A forward pass with few operations for models of Llama's shape; every other model goes through its own.

At small width the time of a decode step goes into starting operations: transformers starts about 70 a layer, this
starts 25. The weights and layers are the model's own, and a probe must agree with the model before it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from temper.rollout.cache import SlotCache, Writing
from temper.rollout.masks import Masks
from temper.rollout.products import tiny_products

AGREES = 1e-4  # of the largest hidden value: float32 sums in another order stay far below it
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = ATTENTION | {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class LeanDecoder:
    """The decoder of a model of Llama's shape (Llama, Qwen2, Qwen3, Mistral): embeddings to last hidden state."""

    def __init__(self, model: PreTrainedModel, masks: Masks) -> None:
        self.decoder: Any = model.get_decoder()
        self.masks = masks
        self.kinds: list[str] = getattr(model.config.get_text_config(), "layer_types", None) or []

    @classmethod
    def of(cls, model: PreTrainedModel, masks: Masks) -> LeanDecoder | None:
        """The lean decoder of `model` where it has the shape and the probe agrees; None elsewhere."""
        decoder: Any = model.get_decoder()
        weight = model.get_input_embeddings().weight
        if masks.implementation != "sdpa" or weight.device.type != "cpu" or weight.dtype is not torch.float32 or not _has_shape(decoder):
            return None  # on a GPU the model runs under autocast, and starting operations is not what takes the time
        lean = cls(model, masks)
        return lean if lean.agrees() else None

    def agrees(self) -> bool:
        """Whether a few tokens come out as the model itself has them."""
        device = next(self.decoder.parameters()).device
        ids_2_T = torch.arange(16, device=device).view(2, 8) % self.decoder.config.vocab_size
        positions_2_T = torch.arange(8, device=device).expand(2, 8)
        cache = SlotCache()
        cache.reserve(2, 8)
        with torch.no_grad():
            wanted = self.decoder(input_ids=ids_2_T, use_cache=False).last_hidden_state
            first = Writing(2, positions_2_T[:, :7], 7, torch.arange(2, device=device), fresh=True)
            found = [self(ids_2_T[:, :7], positions_2_T[:, :7], first, cache)]
            found.append(self(ids_2_T[:, 7:], positions_2_T[:, 7:], Writing(2, positions_2_T[:, 7:], 8), cache))
        error = (wanted - torch.cat(found, 1)).abs().max() / wanted.abs().max().clamp(min=1.0)
        return bool(error < AGREES)

    def __call__(self, ids_R_T: Tensor, positions_R_T: Tensor, writing: Writing, cache: SlotCache) -> Tensor:
        """The last hidden states [rows, positions, width]; keys and values go into the cache as `writing` says."""
        hidden = self.decoder.embed_tokens(ids_R_T)
        cos, sin = (part.unsqueeze(1) for part in self.decoder.rotary_emb(hidden, positions_R_T))
        half = cos.shape[-1] // 2
        turn = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # the sign of rotate_half, moved into the sines
        mask = self.masks(positions_R_T, writing.reach, fresh=writing.fresh, dtype=hidden.dtype)
        cache.writing = writing
        for number, layer in enumerate(self.decoder.layers):
            seen = mask[self.kinds[number]] if isinstance(mask, dict) else mask
            hidden = hidden + self.attend(layer.self_attn, rms(layer.input_layernorm, hidden), cos, turn, seen, number, cache)
            inner, mlp = rms(layer.post_attention_layernorm, hidden), layer.mlp
            hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)).mul_(mlp.up_proj(inner)))
        cache.writing = None
        return rms(self.decoder.norm, hidden)

    def attend(self, attention: Any, x: Tensor, cos: Tensor, turn: Tensor, mask: Tensor | None, number: int, cache: SlotCache) -> Tensor:
        """Grouped-query attention over the cache (Ainslie et al. 2023) with rotary positions (Su et al. 2021)."""
        rows, length, size = x.shape[0], x.shape[1], attention.head_dim
        query = attention.q_proj(x).view(rows, length, -1, size)
        key = attention.k_proj(x).view(rows, length, -1, size)
        if hasattr(attention, "q_norm"):
            query, key = rms(attention.q_norm, query), rms(attention.k_norm, key)
        heads = query.shape[2]
        both = torch.cat((query, key), 2).transpose(1, 2)
        half = size // 2
        both = both * cos + torch.cat((both[..., half:], both[..., :half]), -1).mul_(turn)
        value = attention.v_proj(x).view(rows, length, -1, size).transpose(1, 2)
        keys, values = cache.update(both[:, heads:], value, number)
        query = both[:, :heads]
        if length == 1:  # the queries of a group stand where positions do, so keys are not repeated
            query = query.reshape(rows, keys.shape[1], -1, size)
            with tiny_products():
                out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.scaling)
            return attention.o_proj(out.reshape(rows, 1, -1))
        how = {"attn_mask": mask, "is_causal": mask is None, "scale": attention.scaling, "enable_gqa": True}
        with tiny_products():
            out = F.scaled_dot_product_attention(query, keys, values, **how)
        return attention.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


def rms(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) in one operation."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _has_shape(decoder: Any) -> bool:
    """Whether the decoder is made of exactly the parts that the lean pass knows."""
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return False
    for layer in decoder.layers:
        if {name for name, _ in layer.named_children()} != PARTS:
            return False
        if {name for name, _ in layer.self_attn.named_children()} not in (ATTENTION, NORMS):
            return False
        if {name for name, _ in layer.mlp.named_children()} != MLP:
            return False
        norms = [layer.input_layernorm, layer.post_attention_layernorm, *(getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))]
        if not all(norm is None or hasattr(norm, "variance_epsilon") for norm in norms) or not hasattr(layer.self_attn, "scaling"):
            return False
    return isinstance(decoder.embed_tokens, nn.Embedding) and hasattr(decoder.norm, "variance_epsilon")

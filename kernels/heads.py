"""What a layer's attention is made with besides weights that are multiplied: the same for both fused steps."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module


class Heads(NamedTuple):
    """How queries and keys come from qkv, and scores from these, in a layer.

    bias: [(n_head + 2 n_kv) head_dim] or None; q_gain, k_gain: [head_dim], of a norm of each head, or None.
    inv_freq: [head_dim / 2], float32, of adjacent pairs; 0 rotates nothing.
    factor: of the cosines and sines of pairs that are rotated.
    sliding_window: how many keys a query sees, itself included; None: all.
    """

    bias: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    eps: float
    inv_freq: Tensor
    factor: float
    softmax_scale: float
    sliding_window: int | None


def heads_of(model: Module) -> list[Heads]:
    """Of each layer of a Transformer."""
    config, factor = model.config, (model.config.rope_scaling or {}).get("attention_factor", 1.0)

    def padded(inv_freq: Tensor) -> Tensor:
        return F.pad(inv_freq, (0, config.head_dim // 2 - len(inv_freq)))

    scaled, unrotated = (padded(model.inv_freq), factor), (padded(model.inv_freq[:0]), 1.0)
    local = scaled if model.local_inv_freq is None else (padded(model.local_inv_freq), 1.0)
    layers = []
    for i, attention in enumerate(block.attention for block in model.layers):
        windowed = i in config.windowed_layers
        rotation = unrotated if i in config.unrotated_layers else local if windowed else scaled
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        gains = (norm and norm.weight for norm in norms)
        scale, window = config.attention_scale or config.head_dim**-0.5, config.sliding_window if windowed else None
        layers.append(Heads(attention.wqkv.bias, *gains, config.norm_eps, *rotation, scale, window))
    return layers

"""The rotary embedding: its frequencies with every kind of scaling, and the rotation.

Dynamic NTK and longrope take other frequencies for texts beyond the context that a model was trained on. As in
llama.cpp the length that a run is set up for decides, so that a key never has to be rotated again.
"""

import math

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cosines and sines [T, rotary_dim / 2], float32


def by_length(scaling: dict | None) -> bool:
    """Whether the frequencies depend on the length of the text."""
    return scaling is not None and scaling["rope_type"] in ("dynamic", "longrope")


def inverse_frequencies(base: float, rotary_dim: int, scaling: dict | None = None, length: int = 0) -> Tensor:
    """Inverse frequencies [rotary_dim / 2], float32. length: positions of the text, or of the cache that holds it."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / max(1, rotary_dim)
    kind = scaling["rope_type"] if scaling else "default"
    beyond = by_length(scaling) and length > scaling["original_max_position_embeddings"]
    if kind == "dynamic" and beyond:  # NTK: the base grows with the text
        stretch = scaling["factor"] * length / scaling["original_max_position_embeddings"] - (scaling["factor"] - 1)
        base = base * stretch ** (rotary_dim / (rotary_dim - 2))
    freqs = 1.0 / base**exponents
    if kind in ("default", "dynamic"):
        return freqs
    if kind == "linear":
        return freqs / scaling["factor"]
    if kind in ("factors", "longrope"):
        divisors = scaling["factors"] if kind == "factors" else scaling["long_factor" if beyond else "short_factor"]
        return freqs / torch.tensor(divisors, dtype=torch.float32)

    # long wavelengths are stretched by `factor`, short ones kept, those between blended
    if kind == "llama3":  # by their turns in the original context
        turns = float(scaling["original_max_position_embeddings"]) * freqs / (2 * math.pi)
        kept = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    else:  # yarn: by the channels that turn beta_fast and beta_slow times there
        log_length = math.log(scaling["original_max_position_embeddings"] / (2 * math.pi))
        betas = scaling["beta_fast"], scaling["beta_slow"]
        bounds = [rotary_dim * (log_length - math.log(beta)) / (2 * math.log(base)) for beta in betas]
        first, last = (math.floor(bounds[0]), math.ceil(bounds[1])) if scaling["truncate"] else bounds
        first, last = max(first, 0), min(last, rotary_dim - 1)
        pairs = torch.arange(rotary_dim // 2, dtype=torch.float32)
        kept = 1 - (pairs - first) / (last - first if last != first else 0.001)
    kept = kept.clamp(0, 1)
    return freqs * (kept + (1 - kept) / scaling["factor"])


def cosines_and_sines(positions: Tensor, inv_freq: Tensor, scaling: dict | None) -> Rope:
    """Of positions [T], int64. YaRN and longrope multiply both by their attention factor."""
    angles = positions[:, None] * inv_freq
    factor = scaling.get("attention_factor", 1.0) if scaling else 1.0
    return (angles.cos(), angles.sin()) if factor == 1.0 else (angles.cos() * factor, angles.sin() * factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs of the first channels, and passes the others. x: [B, T, H, D]; cos, sin: `Rope`."""
    width = 2 * cos.shape[-1]
    even, odd = x[..., :width].float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), -1)

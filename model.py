"""The dense Transformer of the Llama family: Llama 1/2/3/3.1/3.2, Mistral, Qwen2/2.5, SmolLM2.

One class, static shapes, GPT-Fast's parameter names. Projections that share an input are fused when a checkpoint is
loaded (q|k|v into `wqkv`, gate|up into `w13`). Subclasses choose what a projection is through `projection_class`.

To add a family: what is new goes into the block and gets a field in ModelArgs, the family gets a row of FAMILIES, and
new tensors get their names in HF_NAMES of formats/huggingface.py and GGUF_NAMES of formats/gguf_file.py.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from formats.checkpoint import Shapes, check_layers, checkpoint_folder, is_own_head, load_weights
from formats.config import checked, config_fields, known_architecture
from formats.files import read_json, shown
from kernels.quantized import Form, dequantize, fill_random, transposed

# architecture of config.json -> the fields of ModelArgs that it switches on
FAMILIES: dict[str, dict] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
}
Rope = tuple[Tensor, Tensor]  # cosines and sines [T, head_dim / 2], float32
FUSED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}  # projections that a checkpoint may hold apart, in order


@dataclass
class ModelArgs:
    """Shape of a model. Widths that follow from others may be left at 0."""

    block_size: int = 2048  # positions of the context
    vocab_size: int = 32000
    n_layer: int = 32
    n_head: int = 32
    dim: int = 4096
    intermediate_size: int = 0
    n_local_heads: int = 0  # key/value heads
    head_dim: int = 0
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    # {"rope_type": "linear" | "llama3" | "factors", ...} with the keys of Hugging Face's config.json. "factors" is a
    # list of head_dim / 2 divisors of the inverse frequencies, as GGUF stores them.
    rope_scaling: dict | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    sliding_window: int | None = None  # w: query i sees keys j with i - w < j <= i, in the layers of windowed_layers
    windowed_layers: list[int] = field(default_factory=list)  # empty: all, if there is a window
    # "none", "int8" (projections and lm_head) or "int4" (o, gate, up and down; the rest is int8), see
    # kernels.quantized.Form. A quantised lm_head is a tensor of its own, never tied.
    quant: str = "none"
    groupsize: int = 64
    name: str = ""

    def __post_init__(self):
        self.tie_embeddings = self.tie_embeddings and self.quant == "none"
        self.n_local_heads = self.n_local_heads or self.n_head
        self.head_dim = self.head_dim or self.dim // self.n_head
        if not self.intermediate_size:  # Llama 1's rule: two thirds of 4 dim, rounded up to 256
            self.intermediate_size = -(-(8 * self.dim // 3) // 256) * 256
        if self.sliding_window and not self.windowed_layers:
            self.windowed_layers = list(range(self.n_layer))

    @property
    def sensitive_quant(self) -> str:
        """`quant` of wqkv and lm_head, where 4 bits would cost the most quality: int4 has int8 there."""
        return "int8" if self.quant == "int4" else self.quant

    @classmethod
    def from_config(cls, config: dict, name: str = "") -> "ModelArgs":
        """Reads a Hugging Face config.json; `name` is that of a model whose config has none.

        Raises ValueError for an architecture or a feature that this model does not have, and as `config_fields` does.
        """
        found = known_architecture(config, FAMILIES)
        for key in ("mlp_bias", "attention_bias"):
            if checked(config, key, bool, False) and not FAMILIES[found].get("qkv_bias"):
                raise ValueError(f"config.json sets {key}, which this model does not have")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"config.json has hidden_act {shown(config['hidden_act'])}; only 'silu' is supported")
        return cls(**config_fields(config, name) | FAMILIES[found])

    @classmethod
    def from_name(cls, name: str) -> "ModelArgs":
        """The named config whose key is the longest one contained in `name` (GPT-Fast's rule, case ignored).

        "-int8" or "-int4" at the end asks for such weights. Raises ValueError if no key fits.
        """
        matches = [key for key in transformer_configs if key.lower() in name.lower()]
        if not matches:
            raise ValueError(f"no config is named like {name!r}; known: {', '.join(sorted(transformer_configs))}")
        quant = name[-4:].lower() if name.lower().endswith(("-int8", "-int4")) else "none"
        return cls(**transformer_configs[max(matches, key=len)], quant=quant, name=name)


_LLAMA31_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA31_ROPE |= {"original_max_position_embeddings": 8192}
_LLAMA2 = {"block_size": 4096}
_LLAMA3 = {"block_size": 8192, "vocab_size": 128256, "rope_base": 500000.0}
_LLAMA31 = _LLAMA3 | {"block_size": 131072, "rope_scaling": _LLAMA31_ROPE}
_LLAMA32 = _LLAMA31 | {"rope_scaling": _LLAMA31_ROPE | {"factor": 32.0}, "tie_embeddings": True}
_QWEN25 = {"block_size": 32768, "rope_base": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
_SMOLLM2 = {"block_size": 8192, "vocab_size": 49152, "rope_base": 1e5, "tie_embeddings": True}


def _named(n_layer: int, n_head: int, n_local_heads: int, dim: int, intermediate_size: int = 0, **others) -> dict:
    shape = {"n_layer": n_layer, "n_head": n_head, "n_local_heads": n_local_heads, "dim": dim}
    return shape | {"intermediate_size": intermediate_size} | others


transformer_configs = {  # layers, heads, key/value heads, width, hidden width; keyword arguments of ModelArgs
    "7B": _named(32, 32, 32, 4096),
    "13B": _named(40, 40, 40, 5120),
    "stories15M": _named(6, 6, 6, 288),
    "stories110M": _named(12, 12, 12, 768),
    "CodeLlama-7b-Python-hf": _named(32, 32, 32, 4096, block_size=16384, rope_base=1e6),
    "llama-2-7b": _named(32, 32, 32, 4096, **_LLAMA2),
    "llama-2-13b": _named(40, 40, 40, 5120, **_LLAMA2),
    "llama-2-70b": _named(80, 64, 8, 8192, 28672, **_LLAMA2),
    "llama-3-8b": _named(32, 32, 8, 4096, 14336, **_LLAMA3),
    "llama-3-70b": _named(80, 64, 8, 8192, 28672, **_LLAMA3),
    "llama-3.1-8b": _named(32, 32, 8, 4096, 14336, **_LLAMA31),
    "llama-3.2-1b": _named(16, 32, 8, 2048, 8192, **_LLAMA32),
    "llama-3.2-3b": _named(28, 24, 8, 3072, 8192, **_LLAMA32),
    "Mistral-7B": _named(32, 32, 8, 4096, 14336, block_size=32768, sliding_window=4096),
    "qwen2.5-0.5b": _named(24, 14, 2, 896, 4864, vocab_size=151936, tie_embeddings=True, **_QWEN25),
    "qwen2.5-7b": _named(28, 28, 4, 3584, 18944, vocab_size=152064, **_QWEN25),
    "smollm2-135m": _named(30, 9, 3, 576, 1536, **_SMOLLM2),
}


class UncastBuffers(nn.Module):
    """A module whose own buffers (frequencies, thresholds, scales, counters) keep their dtype when a model is cast."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class Projection(UncastBuffers, nn.Linear):
    """A linear layer [in] -> [sum of segments]; `segments` maps each fused projection's name to its width.

    A quantised one holds the weight and scale of its `kernels.quantized.Form`, both `transposed`; else scale is None.
    """

    def __init__(
        self, n_in: int, segments: dict[str, int], bias=False, device=None, dtype=None, quant="none", groupsize=0
    ):
        super().__init__(n_in, sum(segments.values()), bias, device, dtype)
        self.segments = segments
        self.register_buffer("scale", None)
        if quant != "none":
            form = Form.named(quant, dtype, groupsize)
            weight, self.scale = form.empty(n_in, segments, device, out_first=True)
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.scale is not None:
            weight = dequantize(*transposed(weight, self.scale), x.dtype).t()
        return F.linear(x, weight, self.bias)

    def reset_parameters(self):
        """Leaves the weights as they are: a checkpoint or `init_weights` fills them."""


class Embedding(nn.Embedding):
    reset_parameters = Projection.reset_parameters


def _fuse_on_load(fused: str):
    """A load_state_dict pre-hook that stacks the tensors of a fused projection, where they come apart."""

    def hook(module, state_dict, prefix, *_):
        for kind in ("weight", "bias", "scale"):
            keys = [f"{prefix}{part}.{kind}" for part in FUSED[fused]]
            if all(key in state_dict for key in keys):
                state_dict[f"{prefix}{fused}.{kind}"] = torch.cat([state_dict.pop(key) for key in keys])

    return hook


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class KVCache(nn.Module):
    """Keys and values [rows, H, positions, D] of a layer; row [1], int64: where a pass of batch 1 writes."""

    def __init__(self, shape: tuple[int, ...], device=None, dtype=None, row: Tensor | None = None):
        super().__init__()
        self.row = row
        self.register_buffer("k_cache", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if len(k) == len(self.k_cache):
            self.k_cache[:, :, input_pos] = k  # k, v: [B, H, T, D]
            self.v_cache[:, :, input_pos] = v
        else:  # the indexed dimensions come first
            self.k_cache[self.row[:, None], :, input_pos] = k.transpose(1, 2)
            self.v_cache[self.row[:, None], :, input_pos] = v.transpose(1, 2)
        return self.k_cache, self.v_cache


def rope_inverse_frequencies(config: ModelArgs) -> Tensor:
    """Inverse frequencies [head_dim / 2], float32, with the config's linear, llama3 or per-frequency scaling."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    freqs = 1.0 / config.rope_base ** (half / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling["rope_type"] == "linear":
        return freqs / scaling["factor"]
    if scaling["rope_type"] == "factors":
        return freqs / torch.tensor(scaling["factors"])

    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / scaling["factor"])


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs. x: [B, T, H, D]; cos, sin: [T, D / 2], float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal attention, grouped or not, with rotary embedding and, after `setup_caches`, a KV cache."""

    def __init__(self, config: ModelArgs, projection: type, device=None, dtype=None):
        super().__init__()
        self.n_head, self.n_local_heads, self.head_dim = config.n_head, config.n_local_heads, config.head_dim
        q, kv = config.n_head * config.head_dim, config.n_local_heads * config.head_dim
        segments = {"q": q, "k": kv, "v": kv}
        self.wqkv = projection(config.dim, segments, config.qkv_bias, device, dtype, config.sensitive_quant)
        self.wo = projection(q, {"o": config.dim}, False, device, dtype, config.quant, config.groupsize)
        self.kv_cache: KVCache | None = None
        self.register_load_state_dict_pre_hook(_fuse_on_load("wqkv"))

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        # project the input to queries, keys and values; queries and keys know their position
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, heads, D]
        qk, v = qkv.split([self.n_head + self.n_local_heads, self.n_local_heads], dim=2)
        q, k = apply_rope(qk, *rope).split([self.n_head, self.n_local_heads], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D]

        # attend: to the cache, or inside x alone
        if input_pos is not None:
            cached = self.kv_cache.update(input_pos, k, v)
            if mask is not None and mask.shape[1] > x.shape[1]:
                k, v = cached
        grouped = self.n_head != self.n_local_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The gated MLP: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelArgs, projection: type, device=None, dtype=None):
        super().__init__()
        hidden = config.intermediate_size
        form = (device, dtype, config.quant, config.groupsize)
        self.w13 = projection(config.dim, {"gate": hidden, "up": hidden}, False, *form)
        self.w2 = projection(hidden, {"down": config.dim}, False, *form)
        self.register_load_state_dict_pre_hook(_fuse_on_load("w13"))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelArgs, projection: type, device=None, dtype=None):
        super().__init__()
        self.attention = Attention(config, projection, device, dtype)
        self.feed_forward = FeedForward(config, projection, device, dtype)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, device, dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, device, dtype)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), rope, mask, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))


@dataclass
class LayerPass:
    """One layer of `Transformer.walk`: its number, and what its block takes."""

    index: int
    block: TransformerBlock
    inputs: list[Tensor]  # [B, T, dim] of each batch
    arguments: tuple[Rope, Tensor | None, Tensor | None]  # rope, mask [T, T] or None, positions [T] or None

    @cached_property
    def outputs(self) -> list[Tensor]:
        """[B, T, dim] of each batch. The block runs when they are first asked for, and only then."""
        return [self.block(x, *self.arguments) for x in self.inputs]

    def arguments_at(self, part: slice) -> tuple[Rope, Tensor, Tensor]:
        """`arguments` for the positions of `part` alone; of a cached walk, whose mask and positions are tensors."""
        (cos, sin), mask, positions = self.arguments
        return (cos[part], sin[part]), mask[part], positions[part]


class Transformer(UncastBuffers):
    """A Llama-family decoder. Parameters are left unset: use `from_checkpoint` or `random_init`."""

    projection_class: type = Projection

    def __init__(self, config: ModelArgs, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, device=device, dtype=dtype)
        blocks = [TransformerBlock(config, self.projection_class, device, dtype) for _ in range(config.n_layer)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, config.norm_eps, device, dtype)
        self.output = None
        if not config.tie_embeddings:
            segments = {"output": config.vocab_size}
            self.output = Projection(config.dim, segments, False, device, dtype, config.sensitive_quant)
        self.register_buffer("inv_freq", rope_inverse_frequencies(config).to(device), persistent=False)

    @property
    def output_weight(self) -> Tensor:
        """The lm_head [vocab, dim], the embedding's own where they are tied."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    @property
    def sites(self) -> list[nn.Module]:
        """The modules whose inputs can be cut: wqkv, wo, w13, w2 of every layer, in order."""
        blocks = ((b.attention.wqkv, b.attention.wo, b.feed_forward.w13, b.feed_forward.w2) for b in self.layers)
        return [module for block in blocks for module in block]

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and unquantised weights."""
        return self.norm.weight.dtype

    def bytes_per_step(self) -> int:
        """Bytes of weights that one step reads: projections, lm_head, scales, norms, biases (no KV cache)."""
        small = sum(p.nbytes for p in self.parameters() if p.dim() == 1)
        small += sum(buffer.nbytes for name, buffer in self.named_buffers() if name.endswith(".scale"))
        return sum(module.weight.nbytes for module in self.sites) + self.output_weight.nbytes + small

    def setup_caches(self, batch_size: int, seq_length: int) -> None:
        """Gives every layer a static KV cache [batch_size, n_local_heads, seq_length, head_dim], unless it has that.

        All share the tensor `row`, by which a pass from_start of batch 1 can be each row's in turn.
        Raises ValueError if seq_length is beyond the model's context.
        """
        if seq_length > self.config.block_size:
            raise ValueError(f"{seq_length} positions do not fit the model's context of {self.config.block_size}")
        shape = (batch_size, self.config.n_local_heads, seq_length, self.config.head_dim)
        row = torch.zeros(1, dtype=torch.int64, device=self.device) if batch_size > 1 else None
        for attention in (block.attention for block in self.layers):
            if attention.kv_cache is None or attention.kv_cache.k_cache.shape != shape:
                attention.kv_cache = KVCache(shape, self.device, self.dtype, row)

    def forward(
        self, idx: Tensor, input_pos: Tensor | None = None, num_logits: int = 0, from_start: bool = False
    ) -> Tensor:
        """Logits [B, num_logits or T, vocab] of the next token, in the model's dtype.

        Args:
            idx: token ids [B, T], int64.
            input_pos: their positions [T], int64, to go through the KV cache; None attends inside `idx` alone,
                from position 0, and leaves the cache untouched.
            num_logits: how many of the last positions get logits; 0 is all.
            from_start: input_pos starts at 0, so that nothing in the cache before idx is attended to. The result then
                does not depend on the cache's length.
        """
        positions = torch.arange(idx.shape[1], device=idx.device) if input_pos is None else input_pos
        inside = input_pos is None or from_start
        keys = None if inside else self.layers[0].attention.kv_cache.k_cache.shape[2]
        rope, masks = self.rope_and_masks(positions, keys)

        x = self.tok_embeddings(idx)
        for i, block in enumerate(self.layers):
            x = block(x, rope, masks[i], input_pos)
        x = self.norm(x[:, -num_logits:])
        return F.linear(x, self.tok_embeddings.weight) if self.output is None else self.output(x)

    def rope_and_masks(self, positions: Tensor, cache_length: int | None = None) -> tuple[Rope, list[Tensor | None]]:
        """What the blocks need besides their input at `positions` [T], int64.

        Queries attend to a KV cache of `cache_length` positions, or for None to each other, where `positions` are from
        0 on. A layer's mask [T, keys] is True where a query may look; None is plain causal attention.
        """
        angles = positions[:, None] * self.inv_freq
        keys = positions if cache_length is None else torch.arange(cache_length, device=positions.device)
        causal = keys[None, :] <= positions[:, None]

        window = self.config.sliding_window
        windowed = causal & (keys[None, :] > positions[:, None] - window) if window else None
        full = None if cache_length is None else causal
        masks = [windowed if i in self.config.windowed_layers else full for i in range(self.config.n_layer)]
        return (angles.cos(), angles.sin()), masks

    def walk(self, batches: Sequence[Tensor], cached: bool = False) -> Iterator[LayerPass]:
        """Goes layer by layer through the model with batches of token ids [B, T] (int64, one T for all).

        Yields each layer before its block has run. The caller looks at the layer's `inputs`, sets hooks and asks for
        its `outputs`, which are the next layer's inputs. Memory holds the inputs and outputs of one layer at a time.
        cached (of one batch only): each block has a KV cache of T positions while the walk is at it; else no cache is
        read or written. `forward` has a loop of its own, since torch.compile does not take every generator.
        """
        assert not cached or len(batches) == 1
        rows, length = batches[0].shape if len(batches) else (0, 0)
        positions = torch.arange(length, device=self.device)
        rope, masks = self.rope_and_masks(positions, length if cached else None)
        shape = (rows, self.config.n_local_heads, length, self.config.head_dim)
        cache = KVCache(shape, self.device, self.dtype) if cached else None
        states = [self.tok_embeddings(batch.to(self.device)) for batch in batches]

        for i, (block, mask) in enumerate(zip(self.layers, masks, strict=True)):
            if cached:
                block.attention.kv_cache = cache
            layer = LayerPass(i, block, states, (rope, mask, positions if cached else None))
            yield layer
            states = layer.outputs
            if cached:
                block.attention.kv_cache = None

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Fills every matrix from a normal distribution (quantised ones likewise); norms are 1, biases 0."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 2:
                    fill_random(parameter, getattr(module, "scale", None), std, generator)
                else:
                    parameter.fill_(0.0 if name == "bias" else 1.0)

    @classmethod
    def random_init(cls, name: str, device="cpu", dtype=torch.bfloat16, seed: int = 0) -> "Transformer":
        """A model of a named config (ModelArgs.from_name) with random weights, for latency work."""
        model = cls(ModelArgs.from_name(name), device=device, dtype=dtype)
        model.init_weights(seed)
        return model.requires_grad_(False).eval()

    @classmethod
    def from_checkpoint(cls, path: str | Path, device="cpu", dtype=torch.bfloat16) -> "Transformer":
        """Loads a converted checkpoint, or GPT-Fast's own model.pth, onto `device` in `dtype`.

        Tensors are memory-mapped, so memory stays near one copy of the model. Raises ValueError for nothing there, a
        missing, truncated or foreign file, or weights that do not fit config.json.
        """
        folder = checkpoint_folder(path)
        state_dict = load_weights(folder)
        if "model.embed_tokens.weight" in state_dict:
            how = f"python convert_hf_checkpoint.py --checkpoint_dir {folder} --output_dir DIR"
            raise ValueError(f"{folder} holds a Hugging Face checkpoint; convert it first: {how}")

        # what does not fit is found before memory is taken
        config = read_config(folder)
        check_layers(state_dict, config.n_layer)
        embedding = state_dict.get("tok_embeddings.weight")
        if config.tie_embeddings and "output.weight" in state_dict:
            config.tie_embeddings = not is_own_head(state_dict["output.weight"], embedding)
        check_tensors(state_dict, config, folder)

        model = cls(config, device=device, dtype=dtype)
        if model.output is None:
            state_dict.pop("output.weight", None)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:400]
            raise ValueError(f"the weights in {folder} do not fit its config: {reason}") from None
        return model.requires_grad_(False).eval()


def read_config(folder: Path) -> ModelArgs:
    """The config of a checkpoint: its config.json, or the named one that its folder is called like.

    Raises ValueError as `ModelArgs.from_config` and `ModelArgs.from_name` do.
    """
    path = folder / "config.json"
    if not path.exists():
        return ModelArgs.from_name(folder.name)
    return ModelArgs.from_config(read_json(path), folder.name)


def check_tensors(tensors: dict[str, Tensor], config: ModelArgs, folder: Path) -> None:
    """Raises ValueError for a tensor of another shape or kind than in a model of the config, which takes no memory."""
    one_layer = replace(config, n_layer=1, windowed_layers=[])
    expected = expected_tensors(one_layer) | Transformer(one_layer, device="meta").state_dict()
    for name, tensor in tensors.items():
        due = expected.get(re.sub(r"^layers\.\d+\.", "layers.0.", name), tensor)  # load_state_dict finds foreign names
        exact = name.endswith(".scale") or not due.is_floating_point()
        if tensor.shape != due.shape or not (tensor.dtype == due.dtype or (tensor.is_floating_point() and not exact)):
            found, asked = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (tensor, due))
            reason = f"{name} is {found}, config.json asks for {asked}"
            raise ValueError(f"the weights in {folder} do not fit its config: {reason}")


def expected_shapes(config: ModelArgs) -> Shapes:
    """Names and shapes of a checkpoint's tensors; see `expected_tensors`."""
    return {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}


def expected_tensors(config: ModelArgs) -> dict[str, Tensor]:
    """A checkpoint's tensors, without memory: those of the model, with fused projections taken apart."""
    model = Transformer(config, device="meta")
    tensors = {}
    for name, tensor in model.state_dict().items():
        path, kind = name.rsplit(".", 1)
        owner, _, last = path.rpartition(".")
        if last in FUSED:
            widths = model.get_submodule(path).segments.values()
            packed = sum(widths) // len(tensor)  # outputs in one row: 2 of int4's
            for part, rows in zip(FUSED[last], tensor.split([width // packed for width in widths]), strict=True):
                tensors[f"{owner}.{part}.{kind}"] = rows
        else:
            tensors[name] = tensor
    return tensors

"""The dense Transformer: one block, whose switches make it Llama's, Qwen's, Phi's, Gemma's, OLMo's, Pythia's or OPT's.

One class, static shapes, GPT-Fast's parameter names. Projections that share an input are fused when a checkpoint is
loaded (q|k|v into `wqkv`, gate|up into `w13`). Subclasses choose what a projection is through `projection_class`.

To add a family: what is new goes into the block and gets a field in ModelArgs, the family gets a row of FAMILIES in
formats/config.py, new tensors get names in HF_NAMES of formats/huggingface.py and GGUF_NAMES of formats/gguf_file.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from formats import checkpoint
from formats.checkpoint import check_tensors, fuse_on_load, is_own_head, load_weights
from formats.config import config_fields
from formats.files import read_json
from formats.named_configs import named_config
from kernels.quantized import Form, dense_weight, fill_module, table_on_load
from rope import Rope, apply_rope, by_length, cosines_and_sines, inverse_frequencies

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


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
    # norms, attention and feed-forward
    norm: str = "rms"  # its gain is the weight; "rms_plus_one": 1 + the weight; "layer": LayerNorm, with bias
    norm_eps: float = 1e-5
    pre_norm: bool = True  # of what each branch reads
    post_norm: bool = False  # of what each branch adds
    qk_norm: str = ""  # norms of q and k before they are rotated: of each "head", or of the "whole" projection
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"  # or another of ACTIVATIONS
    gated: bool = True  # down(activation(gate x) * up x), else down(activation(up x))
    parallel_residual: bool = False  # the feed-forward reads what attention reads, not what it left
    attention_scale: float = 0.0  # of the scores; 0: head_dim^-0.5
    attention_softcap: float = 0.0  # c: scores become c tanh(scores / c), if it is not 0
    # positions
    rope_base: float = 10000.0
    # {"rope_type": "linear" | "llama3" | "dynamic" | "yarn" | "longrope" | "factors", ...} with the keys of Hugging
    # Face's config.json, all filled in. "factors" is a list of rotary_dim / 2 divisors of the inverse frequencies, as
    # GGUF stores them.
    rope_scaling: dict | None = None
    rotary_share: float = 1.0  # of each head's channels, the first ones
    unrotated_layers: list[int] = field(default_factory=list)
    local_rope_base: float = 0.0  # of the windowed layers, unscaled; 0: they rotate as the others
    learned_positions: bool = False  # a vector per position is added to the embedding
    sliding_window: int | None = None  # w: query i sees keys j with i - w < j <= i, in the layers of windowed_layers
    windowed_layers: list[int] = field(default_factory=list)  # empty: all, if there is a window
    # ends of the model
    tie_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what each branch adds
    logits_scaling: float = 1.0  # logits are divided by it
    logit_softcap: float = 0.0  # as attention_softcap
    # "none", "packed", "int8" (projections and lm_head) or "int4" (o, gate, up and down; the rest is int8), see
    # kernels.quantized.Form. An lm_head that is not "none" is a tensor of its own, never tied.
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
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_dim * self.rotary_share)

    @property
    def sensitive_quant(self) -> str:
        """`quant` of wqkv and lm_head, where 4 bits would cost the most quality: int4 has int8 there."""
        return "int8" if self.quant == "int4" else self.quant

    @classmethod
    def from_config(cls, config: dict, name: str = "") -> "ModelArgs":
        """Reads a Hugging Face config.json; `name` is that of a model whose config has none. Raises as that does."""
        return cls(**config_fields(config, name))

    @classmethod
    def from_name(cls, name: str) -> "ModelArgs":
        """See `formats.named_configs.named_config`."""
        return cls(**named_config(name))


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
        self.register_load_state_dict_pre_hook(table_on_load)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.scale is None else dense_weight(self, x.dtype)
        return F.linear(x, weight, self.bias)

    def reset_parameters(self):
        """Leaves the weights as they are: a checkpoint or `init_weights` fills them."""


class Embedding(nn.Embedding):
    reset_parameters = Projection.reset_parameters


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, device=None, dtype=None, plus_one=False):
        super().__init__()
        self.eps, self.plus_one = eps, plus_one
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.plus_one:  # Gemma's: in float32 up to the product, as 1 + weight is not exact in 16 bits
            return (normed * (1 + self.weight.float())).type_as(x)
        return normed.type_as(x) * self.weight


def make_norm(config: ModelArgs, dim: int, device=None, dtype=None) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(dim, config.norm_eps, device=device, dtype=dtype)
    return RMSNorm(dim, config.norm_eps, device, dtype, plus_one=config.norm == "rms_plus_one")


def softcapped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


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


def rope_inverse_frequencies(config: ModelArgs, length: int = 0) -> Tensor:
    """`rope.inverse_frequencies` of a model's scaled rotary embedding, [rotary_dim / 2]."""
    return inverse_frequencies(config.rope_base, config.rotary_dim, config.rope_scaling, length)


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attention with soft-capped scores. q: [B, H, T, D]; k, v: [B, kv heads, keys, D]; mask [T, keys]."""
    grouped = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2)
    scores = softcapped(grouped * scale, cap).masked_fill(~mask, -float("inf"))
    return (scores.softmax(-1, dtype=torch.float32).type_as(v) @ v[:, :, None]).flatten(1, 2)


class Attention(nn.Module):
    """Causal attention, grouped or not, with rotary embedding and, after `setup_caches`, a KV cache."""

    def __init__(self, config: ModelArgs, projection: type, device=None, dtype=None):
        super().__init__()
        self.heads, self.head_dim = [config.n_head, config.n_local_heads, config.n_local_heads], config.head_dim
        self.scale, self.softcap = config.attention_scale or None, config.attention_softcap
        widths = [heads * config.head_dim for heads in self.heads]
        segments = dict(zip("qkv", widths, strict=True))
        self.wqkv = projection(config.dim, segments, config.qkv_bias, device, dtype, config.sensitive_quant)
        self.wo = projection(widths[0], {"o": config.dim}, config.o_bias, device, dtype, config.quant, config.groupsize)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            q, k = widths[:2] if self.qk_norm == "whole" else [config.head_dim] * 2
            self.q_norm, self.k_norm = (make_norm(config, width, device, dtype) for width in (q, k))
        self.kv_cache: KVCache | None = None
        self.register_load_state_dict_pre_hook(fuse_on_load("wqkv"))

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        # project the input to queries, keys and values; queries and keys know their position
        q, k, v = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # [B, T, heads, D]
        if self.qk_norm == "whole":
            q, k = (norm(t.flatten(2)).view_as(t) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        elif self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D]

        # attend: to the cache, or inside x alone
        if input_pos is not None:
            cached = self.kv_cache.update(input_pos, k, v)
            if mask is not None and mask.shape[1] > x.shape[1]:
                k, v = cached
        if self.softcap:
            y = softcapped_attention(q, k, v, mask, self.scale or self.head_dim**-0.5, self.softcap)
        else:
            grouped, causal = self.heads[0] != self.heads[1], mask is None
            y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=self.scale, enable_gqa=grouped)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The MLP: down(silu(gate x) * up x), or with another activation, or without a gate."""

    def __init__(self, config: ModelArgs, projection: type, device=None, dtype=None):
        super().__init__()
        hidden, self.activation = config.intermediate_size, ACTIVATIONS[config.activation]
        form = (config.mlp_bias, device, dtype, config.quant, config.groupsize)
        self.w13 = projection(config.dim, dict.fromkeys(("gate", "up")[not config.gated :], hidden), *form)
        self.w2 = projection(hidden, {"down": config.dim}, *form)
        self.register_load_state_dict_pre_hook(fuse_on_load("w13"))

    def forward(self, x: Tensor) -> Tensor:
        first, *up = self.w13(x).chunk(len(self.w13.segments), dim=-1)
        hidden = self.activation(first)
        return self.w2(hidden * up[0] if up else hidden)


class TransformerBlock(nn.Module):
    """Attention and the MLP, each a branch that adds to the residual stream."""

    def __init__(self, config: ModelArgs, projection: type, device=None, dtype=None):
        super().__init__()
        self.attention = Attention(config, projection, device, dtype)
        self.feed_forward = FeedForward(config, projection, device, dtype)
        norms = {"attention_norm": config.pre_norm, "ffn_norm": config.pre_norm}
        norms |= {"post_attention_norm": config.post_norm, "post_ffn_norm": config.post_norm}
        for name, there in norms.items():
            setattr(self, name, make_norm(config, config.dim, device, dtype) if there else nn.Identity())
        self.parallel, self.multiplier = config.parallel_residual, config.residual_multiplier

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        attended = self.post_attention_norm(self.attention(self.attention_norm(x), rope, mask, input_pos))
        h = self._added(x, attended)
        read = x if self.parallel else h
        return self._added(h, self.post_ffn_norm(self.feed_forward(self.ffn_norm(read))))

    def _added(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + (branch if self.multiplier == 1 else branch * self.multiplier)


@dataclass
class LayerPass:
    """One layer of `Transformer.walk`: its number, and what its block takes."""

    index: int
    block: TransformerBlock
    inputs: list[Tensor]  # [B, T, dim] of each batch
    arguments: tuple[Rope | None, Tensor | None, Tensor | None]  # rope, mask [T, T] or None, positions [T] or None

    @cached_property
    def outputs(self) -> list[Tensor]:
        """[B, T, dim] of each batch. The block runs when they are first asked for, and only then."""
        return [self.block(x, *self.arguments) for x in self.inputs]

    def arguments_at(self, part: slice) -> tuple[Rope | None, Tensor, Tensor]:
        """`arguments` for the positions of `part` alone; of a cached walk, whose mask and positions are tensors."""
        rope, mask, positions = self.arguments
        return rope and (rope[0][part], rope[1][part]), mask[part], positions[part]


class Transformer(UncastBuffers):
    """A decoder. Parameters are left unset: use `from_checkpoint` or `random_init`."""

    projection_class: type = Projection

    def __init__(self, config: ModelArgs, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, device=device, dtype=dtype)
        self.pos_embeddings = None
        if config.learned_positions:
            self.pos_embeddings = Embedding(config.block_size, config.dim, device=device, dtype=dtype)
        blocks = [TransformerBlock(config, self.projection_class, device, dtype) for _ in range(config.n_layer)]
        self.layers = nn.ModuleList(blocks)
        self.norm = make_norm(config, config.dim, device, dtype)
        self.output = None
        if not config.tie_embeddings:
            form = (False, device, dtype, config.sensitive_quant)
            self.output = Projection(config.dim, {"output": config.vocab_size}, *form)
        self.register_buffer("inv_freq", rope_inverse_frequencies(config).to(device), persistent=False)
        local = inverse_frequencies(config.local_rope_base, config.rotary_dim) if config.local_rope_base else None
        self.register_buffer("local_inv_freq", local if local is None else local.to(device), persistent=False)

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

    def setup_caches(self, batch_size: int, seq_length: int, spare: int = 0) -> None:
        """Gives every layer a static KV cache [batch_size, n_local_heads, positions, head_dim], unless it has that.

        positions: seq_length of a text, and `spare` ones for tokens that may turn out not to be of it.
        All share the tensor `row`, by which a pass from_start of batch 1 can be each row's in turn. The frequencies
        become those of texts of that length, see `rope`. Raises ValueError beyond the model's context.
        """
        positions = seq_length + spare
        if positions > self.config.block_size:
            raise ValueError(f"{positions} positions do not fit the model's context of {self.config.block_size}")
        shape = (batch_size, self.config.n_local_heads, positions, self.config.head_dim)
        row = torch.zeros(1, dtype=torch.int64, device=self.device) if batch_size > 1 else None
        for attention in (block.attention for block in self.layers):
            if attention.kv_cache is None or attention.kv_cache.k_cache.shape != shape:
                attention.kv_cache = KVCache(shape, self.device, self.dtype, row)
        if by_length(self.config.rope_scaling):
            self.inv_freq.copy_(rope_inverse_frequencies(self.config, seq_length))

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads, [B, T, dim], of tokens [B, T] at positions [T]."""
        x = self.tok_embeddings(idx)
        if self.pos_embeddings is not None:
            x = x + self.pos_embeddings(positions)
        multiplier = self.config.embedding_multiplier  # Gemma rounds its own to the model's dtype
        return x if multiplier == 1 else x * torch.full((), multiplier, dtype=x.dtype, device=x.device)

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocab] of the last norm's output [..., dim]."""
        x = F.linear(x, self.output_weight) if self.output is None else self.output(x)
        scaling = self.config.logits_scaling
        return softcapped(x if scaling == 1 else x / scaling, self.config.logit_softcap)

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
        keys = None if input_pos is None or from_start else self.layers[0].attention.kv_cache.k_cache.shape[2]
        ropes, masks = self.rope_and_masks(positions, keys, idx.shape[1] if input_pos is None else None)

        x = self.embed(idx, positions)
        for block, rope, mask in zip(self.layers, ropes, masks, strict=True):
            x = block(x, rope, mask, input_pos)
        return self.head(self.norm(x[:, -num_logits:]))

    def rope_and_masks(
        self, positions: Tensor, cache_length: int | None = None, length: int | None = None
    ) -> tuple[list[Rope | None], list[Tensor | None]]:
        """What each block needs besides its input at `positions` [T], int64.

        Queries attend to a KV cache of `cache_length` positions, or for None to each other, where `positions` are from
        0 on. A layer's mask [T, keys] is True where a query may look; None is plain causal attention. A rope of None
        rotates nothing. `length`: of a text that goes through no cache; None: the cache's decides on frequencies.
        """
        config, inv_freq = self.config, self.inv_freq
        if length is not None and by_length(config.rope_scaling):
            inv_freq = rope_inverse_frequencies(config, length).to(positions.device)
        rope = local = cosines_and_sines(positions, inv_freq, config.rope_scaling) if config.rotary_dim else None
        if self.local_inv_freq is not None:
            local = cosines_and_sines(positions, self.local_inv_freq, None)
        layers = range(config.n_layer)
        ropes = [local if i in config.windowed_layers else rope for i in layers]
        ropes = [None if i in config.unrotated_layers else ropes[i] for i in layers]

        keys = positions if cache_length is None else torch.arange(cache_length, device=positions.device)
        causal = keys[None, :] <= positions[:, None]

        window = config.sliding_window
        windowed = causal & (keys[None, :] > positions[:, None] - window) if window else None
        full = None if cache_length is None and not config.attention_softcap else causal
        return ropes, [windowed if i in config.windowed_layers else full for i in layers]

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
        ropes, masks = self.rope_and_masks(positions, length if cached else None, length)
        shape = (rows, self.config.n_local_heads, length, self.config.head_dim)
        cache = KVCache(shape, self.device, self.dtype) if cached else None
        states = [self.embed(batch.to(self.device), positions) for batch in batches]

        for i, (block, rope, mask) in enumerate(zip(self.layers, ropes, masks, strict=True)):
            if cached:
                block.attention.kv_cache = cache
            layer = LayerPass(i, block, states, (rope, mask, positions if cached else None))
            yield layer
            states = layer.outputs
            if cached:
                block.attention.kv_cache = None

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Fills every matrix from a normal distribution (quantised ones likewise); gains are 1, biases 0."""
        init_modules(self, torch.Generator(self.device).manual_seed(seed), std)

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
        folder = checkpoint.checkpoint_folder(path)
        state_dict = load_weights(folder)
        if "model.embed_tokens.weight" in state_dict:
            how = f"python convert_hf_checkpoint.py --checkpoint_dir {folder} --output_dir DIR"
            raise ValueError(f"{folder} holds a Hugging Face checkpoint; convert it first: {how}")

        # what does not fit is found before memory is taken
        config = read_config(folder)
        checkpoint.check_layers(state_dict, config.n_layer)
        embedding = state_dict.get("tok_embeddings.weight")
        if config.tie_embeddings and "output.weight" in state_dict:
            config.tie_embeddings = not is_own_head(state_dict["output.weight"], embedding)
        check_tensors(state_dict, Transformer(replace(config, n_layer=1, windowed_layers=[]), device="meta"), folder)

        model = cls(config, device=device, dtype=dtype)
        if model.output is None:
            state_dict.pop("output.weight", None)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:400]
            raise ValueError(f"the weights in {folder} do not fit its config: {reason}") from None
        return model.requires_grad_(False).eval()


def init_modules(root: nn.Module, generator: torch.Generator, std: float) -> None:
    # see `Transformer.init_weights`
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2:
                fill_module(module, std, generator)
            else:
                parameter.fill_(0.0 if name == "bias" or getattr(module, "plus_one", False) else 1.0)


def read_config(folder: Path) -> ModelArgs:
    """The config of a checkpoint: its config.json, or the named one that its folder is called like.

    Raises ValueError as `ModelArgs.from_config` and `ModelArgs.from_name` do.
    """
    path = folder / "config.json"
    if not path.exists():
        return ModelArgs(**named_config(folder.name, ".*?"))  # its other words do not count: the weights must fit
    return ModelArgs.from_config(read_json(path), folder.name)

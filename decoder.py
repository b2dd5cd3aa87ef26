"""Decoding: a token to the next one, sampling included, in four forms, and the loop around them.

    form       what runs a step                                     serves
    eager      the model's forward, op by op                        every run
    compiled   the same through torch.compile (CUDA graphs)         every run
    fused      five launches per layer in one CUDA graph, on a GPU  where `why_unfused` has no reason against it
    fused      one call of C++, on a CPU                            the same

Why a fused step on a GPU records its own CUDA graph: README, "How it works".
"""

import ctypes
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise

import torch
from torch import Tensor

from kernels import cpu
from kernels.grids import set_site_grids
from kernels.heads import heads_of
from kernels.plan import is_small
from model import ModelArgs, Projection, Transformer, TransformerBlock
from sparse_model import SITES, SparseProjection, SparseTransformer

MAX_ROWS = 8  # of a fused step
MAX_TOP_K = 1024  # that the fused sampling on a GPU sorts in one program
LEAST_TEMPERATURE = 1e-20  # below it logits over the temperature leave float32: it is greedy
# The fields of ModelArgs that both fused steps implement, whatever their value.
FUSED_FIELDS = set(
    "name block_size vocab_size n_layer n_head n_local_heads dim head_dim intermediate_size tie_embeddings norm_eps "
    "qkv_bias o_bias mlp_bias attention_scale rope_base rope_scaling rotary_share unrotated_layers local_rope_base "
    "sliding_window windowed_layers embedding_multiplier residual_multiplier logits_scaling quant groupsize".split()
)
FUSED_VALUES = {"qk_norm": ("", "head"), "activation": cpu.Model.ACTIVATIONS}  # of other fields
# The weights of a block that they read, and those that have a bias, too.
FUSED_WEIGHTS = {f"{name}.weight" for name in ("attention_norm", "ffn_norm", "attention.q_norm", "attention.k_norm")}
FUSED_WEIGHTS |= {f"{site.module}.{part}" for site in SITES.values() for part in ("weight", "bias")}


def unknown_parts(config: ModelArgs) -> list[str]:
    """What the fused steps do not implement: fields that differ from their default, else weights of a model's block."""
    default = vars(type(config)())
    others = {k: v for k, v in vars(config).items() if k not in FUSED_FIELDS and v != default[k]}
    fields = [f"{k} = {v!r}" for k, v in others.items() if v not in FUSED_VALUES.get(k, ())]
    block = TransformerBlock(config, Projection, device="meta")
    return fields or [name for name, _ in block.named_parameters() if name not in FUSED_WEIGHTS]


def fusable(config: ModelArgs) -> bool:
    """Whether the fused steps implement a model. So a new switch or weight is never silently ignored."""
    return not unknown_parts(config)


def why_unfused(config: ModelArgs, device: torch.device, batch_size: int, top_k: int) -> str | None:
    """Why a run's steps are not fused, in a few words; None: they can be."""
    if batch_size > MAX_ROWS:
        return f"a fused step serves at most {MAX_ROWS} rows"
    if device.type == "cpu" and cpu.library() is None:
        return "a fused step needs a C++ compiler"
    if device.type == "cuda" and top_k > MAX_TOP_K:
        return f"a fused step takes a --top_k of at most {MAX_TOP_K}"
    return None if fusable(config) else f"a fused step does not implement {', '.join(unknown_parts(config))}"


class FusedGpuStep:
    """Decode steps of 1 to 8 rows on a GPU, through the fused kernels and one CUDA graph.

    `replay` a step as often as wanted, then read `tokens`: it leaves nothing for the host to do. Models of 16 bits give
    a row the same tokens every time, in a cache of any length, beside any rows, while `left_grid` is False.

    model: with its cache set up, and its cuts set: a later change needs a new step.
    temperature, top_k: of the sampling; temperature 0 is greedy.
    dense: nothing is cut, by the same kernels with the test compiled out; so it is where a model's `sparsity` is 0.
    drafts: this many rows, which share the cache's only row and stand at positions of one text, in ascending order.
        Each sees the keys of those before it: its logits are those of a step of one row there. 0: every row of the
        cache is a text of its own.
    tokens: [rows, positions of the cache + 1], int64; those from `start` on are valid.
    logits: [rows, vocab], float32, of the last step.
    """

    marks_not_finite = False  # by a token of -1

    def __init__(self, model: SparseTransformer, temperature: float, top_k: int, dense: bool = False, drafts: int = 0):
        from kernels import few_rows, fused_step, grids, products, triton_gemv

        self.kernels, self.launch_product, self.model = fused_step, products.launch_product, model
        self.launch_prepare = few_rows.launch_prepare
        self.sparsity = 0.0 if dense else model.sparsity
        config, device = model.config, model.device
        self.sampling = temperature, min(top_k, config.vocab_size)
        self.pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.graph: torch.cuda.CUDAGraph | None = None

        def buffer(*shape: int, dtype=torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        # what one launch of a step leaves to the next. Each layer has a y of its own: all words of a step have one tag,
        # and o guesses by its last input
        cache_rows, _, cache_length, _ = model.layers[0].attention.kv_cache.k_cache.shape
        self.drafts, rows, rstd_buffer = drafts, drafts or cache_rows, triton_gemv.RSTD_BUFFER
        q, kv = config.n_head * config.head_dim, config.n_local_heads * config.head_dim
        self.residual = fused_step.Residual(buffer(rows, config.dim))
        half = model.dtype != torch.float32
        if half:
            fineness = grids.fineness(grids.residual_bound(model))
            self.residual = self.residual._replace(fineness=fineness, beyond=buffer(1, dtype=torch.int32))
        self.qkv = buffer(rows, q + 2 * kv + rstd_buffer)
        self.gate_up = buffer(rows, 2 * config.intermediate_size + rstd_buffer)
        self.y = buffer(config.n_layer, rows, q, dtype=torch.int32 if half else model.dtype)  # half: tagged
        self.chunks = fused_step.new_chunks(rows, config.n_local_heads, config.n_head, q, cache_length, half, device)
        self.x, self.logits = buffer(rows, config.dim, dtype=model.dtype), buffer(rows, config.vocab_size)
        most = max(len(m.widths) * (-(-len(m.weight) // 128) * 128) for m in model.sites)  # inputs of all segments
        made = buffer((rows + 3) // 4 * 4 * most, dtype=model.dtype)
        kept, down = buffer(rows * most // 32, dtype=torch.int32), buffer(rows * most // 32)
        self.prepared = few_rows.Prepared(made, kept, down)

        # the sampling's room, and what goes from step to step
        self.top = buffer(rows, -(-config.vocab_size // fused_step.GROUP))
        self.groups = buffer(rows, 1 << (self.sampling[1] + 31).bit_length(), dtype=torch.int32)
        self.seed, self.position, self.token = (buffer(rows, dtype=torch.int64) for _ in range(3))
        self.tokens = buffer(rows, cache_length + 1, dtype=torch.int64)

        # what o and down add to, and what the lm_head writes: parts, where ranks share a step (tp.py)
        self.added, self.head_out = self.residual.h, (self.logits, self.top)

        # what the launches multiply and normalise with
        self.last_rstds = buffer(2 * config.n_layer, 1)
        norms = [norm for block in model.layers for norm in (block.attention_norm, block.ffn_norm)]
        self.norms = [triton_gemv.Norm(norms[i].weight, norms[i].eps, rstd) for i, rstd in enumerate(self.last_rstds)]
        self.head_norm = triton_gemv.Norm(model.norm.weight, model.norm.eps)
        gains = [gain for norm in norms for gain in (norm.weight, None)]
        self.head_operation = triton_gemv.operation_of("norm", config.dim, model.dtype)
        self.heads = heads_of(model)
        options = self.sparsity, self.residual.fineness, config.residual_multiplier
        sites = zip(model.sites, gains, strict=True)
        self.products = {site: fused_step.product_of(site, gain, *options) for site, gain in sites}
        for site, product in self.products.items():
            site.reads_all = is_small(*product.shape, product.form, self.pdl)

    @property
    def left_grid(self) -> bool:
        """Whether the residual stream ever was where sums may depend on their order; waits for the device."""
        h, fineness, beyond = self.residual
        return beyond is not None and bool(beyond.item() or (h.abs() * fineness > self.kernels.BEYOND.value).any())

    def start(self, tokens: Tensor, positions: list[int], seeds: list[int]) -> None:
        """Sets each row's token to feed next, its position, and the seed of its draws."""
        self.token.copy_(tokens.view(-1))
        self.position.copy_(torch.tensor(positions))
        self.seed.copy_(torch.tensor(seeds))
        self.tokens.scatter_(1, self.position[:, None], self.token[:, None])

    def replay(self, steps: int = 1) -> None:
        """One step, or several; the first call records it."""
        if self.graph is None:
            self.graph = self.kernels.record_graph(self.step, self.token, self.position)
        for _ in range(steps):
            self.graph.replay()

    def step(self) -> None:
        """Launches the kernels of one step."""
        kernels, model, products, h, pdl = self.kernels, self.model, self.products, self.residual.h, self.pdl
        config, embedding = model.config, model.tok_embeddings.weight
        shared_room = self.prepared if len(h) > 1 else None
        multiply = partial(self.launch_product, prepared=shared_room, dtype=model.dtype, pdl=pdl)
        kernels.launch_embed(self.token, embedding, config.embedding_multiplier, self.residual, pdl)

        for i, block in enumerate(model.layers):
            attention, feed_forward, y = block.attention, block.feed_forward, self.y[i]
            attention_norm, ffn_norm = self.norms[2 * i : 2 * i + 2]
            gate_up, shared = products[feed_forward.w13], self.drafts > 0
            read, ahead = (self.qkv, self.heads[i], attention.kv_cache, self.position), (ffn_norm, gate_up)

            multiply("norm", h, products[attention.wqkv], self.qkv, norm=attention_norm, zero=self.gate_up)
            if shared:
                kernels.launch_cache(*read, config.n_head, pdl)
            kernels.launch_attention(*read, self.chunks, y, self.residual, ahead, pdl, shared)
            multiply("given", y, products[attention.wo], self.added, tag=self.chunks.tag)
            self.sum_parts()
            multiply("norm", h, gate_up, self.gate_up, norm=ffn_norm, zero=self.qkv)
            multiply(config.activation, self.gate_up, products[feed_forward.w2], self.added)
            self.sum_parts()

        scale, prepared = model.output and model.output.scale, self.prepared._replace(made=self.x)
        self.launch_prepare(h, self.head_operation, None, prepared, norm=self.head_norm, pdl=pdl)
        kernels.launch_head(self.x, model.output_weight, scale, config.logits_scaling, *self.head_out, pdl)
        self.join_logits()
        state = self.seed, self.position, self.token, self.tokens, self.chunks.tag
        kernels.launch_sample(self.logits, self.top, self.groups, *state, *self.sampling, pdl)

    # where ranks share a step, see tp.py: add all their parts of `added` to the residual stream; gather their logits
    sum_parts = join_logits = staticmethod(lambda: None)


class FusedCpuStep:
    """Decode steps of 1 to 8 rows on a CPU, each one call of the compiled library.

    In bfloat16 and float16 a row's tokens depend neither on other rows nor on the number of threads. A step takes at
    most torch's: fewer while those are quicker, beside other work. Float32 (and a CPU without fused multiply-adds) adds
    in another order with other rows or threads, so it takes all. It reads the model's tensors where they lie, so they
    must stay there. Arguments are those of `FusedGpuStep`. Logits are rounded to the model's dtype. A row whose logits
    are not finite draws the token -1.
    """

    adaptive = True  # False, set before one is made: each step takes torch's number of threads
    marks_not_finite = True

    def __init__(self, model: SparseTransformer, temperature: float, top_k: int, dense: bool = False, drafts: int = 0):
        config, cache = model.config, model.layers[0].attention.kv_cache.k_cache
        rows = drafts or len(cache)
        assert rows <= MAX_ROWS and (not drafts or len(cache) == 1)
        self._decode = cpu.kernel("decode", cache.dtype, model.layers[0].attention.wo.form)
        self._decode.argtypes = [cpu.POINTER, cpu.INTEGER, cpu.POINTER, cpu.POINTER, ctypes.c_int, cpu.INTEGER]
        self._dtype = cache.dtype
        self._tensors = []  # those that only the structures point to
        self.logits = torch.zeros(rows, config.vocab_size)
        self.tokens = torch.zeros(rows, cache.shape[2] + 1, dtype=torch.int64)
        self.numbers = self.tokens.numpy()  # the same: Python reads and writes them sooner

        # the layers
        layers = (cpu.Layer * config.n_layer)()
        for i, (block, heads) in enumerate(zip(model.layers, heads_of(model), strict=True)):
            gains = block.attention_norm.weight, block.ffn_norm.weight, heads.q_gain, heads.k_gain
            projections = [self._projection(module) for module in model.sites[4 * i : 4 * i + 4]]
            others = map(self._pointer, (*block.attention.kv_cache.buffers(), heads.inv_freq))
            window = heads.sliding_window or cache.shape[2]
            layers[i] = cpu.Layer(*map(self._pointer, gains), *projections, *others, heads.factor, window)

        # the model: its shape, its other weights, room for values between the phases of a step, and the sampling
        q, kv = config.n_head * config.head_dim, config.n_local_heads * config.head_dim
        numbers = {name: getattr(config, name) for name in f"{cpu.Model.SHAPE} {cpu.Model.FACTORS}".split()}
        tensors = {"embedding": model.tok_embeddings.weight, "norm": model.norm.weight, "output": model.output_weight}
        tensors |= {"output_scale": model.output and model.output.scale}
        room = {"h": config.dim, "qkv": q + 2 * kv, "y": q, "act": config.intermediate_size}
        room["tops"] = -(-config.vocab_size // cpu.GROUP)
        tensors |= {name: torch.zeros(rows, n) for name, n in room.items()}
        tensors |= {"logits": self.logits, "tokens": self.tokens}
        self._model = cpu.Model(
            **numbers,
            **{name: self._pointer(tensor) for name, tensor in tensors.items()},
            cache_length=cache.shape[2],
            layers=layers,
            cut=not dense and model.sparsity > 0,
            shared=drafts > 0,
            activation=cpu.Model.ACTIVATIONS.index(config.activation),
            eps=config.norm_eps,
            softmax_scale=config.attention_scale or config.head_dim**-0.5,
            temperature=temperature,
            top_k=min(top_k, config.vocab_size),
            pace=self._pointer(torch.zeros(cpu.PACE_DOUBLES, dtype=torch.float64)) if self.adaptive else None,
        )
        for parameter in model.parameters():
            cpu.library().use_huge_pages(ctypes.c_void_p(parameter.data_ptr()), ctypes.c_int64(parameter.nbytes))

    def _pointer(self, tensor: Tensor | None) -> int | None:
        """Where a tensor lies, which is kept there as long as this step; None: a null pointer."""
        if tensor is None:
            return None
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _projection(self, module: SparseProjection) -> cpu.Projection:
        tensors = {name: self._pointer(getattr(module, name)) for name in cpu.Projection.TENSORS.split()}
        norms = cpu.column_norms(module.weight, module.scale, self._dtype)
        return cpu.Projection(**tensors, log_norms=self._pointer(norms), group=module.form.groupsize)

    def start(self, tokens: Tensor, positions: list[int], seeds: list[int]) -> None:
        """Sets the token [rows] to feed next of each row, its position and the seed of its draws; rows may be fewer."""
        self.positions = (ctypes.c_int64 * len(positions))(*positions)
        self.seeds = (ctypes.c_uint32 * len(seeds))(*seeds)
        self.tokens[range(len(positions)), positions] = tokens
        self._threads = torch.get_num_threads()

    def feed(self, tokens: list[int], position: int) -> None:
        """Sets the rows' tokens to feed next, at positions from this one on; the rest is as `start` left it."""
        for row, token in enumerate(tokens):
            self.numbers[row, position + row] = token
            self.positions[row] = position + row

    def replay(self, steps: int = 1) -> None:
        """One step, or several. Raises MemoryError: too little for it; the positions are those of the steps made."""
        # little happens here: what a step read has swept Python's own data out of the caches
        at = self.positions
        assert max(at) + steps <= self._model.cache_length
        if self._decode(ctypes.addressof(self._model), len(at), at, self.seeds, self._threads, steps):
            raise MemoryError(f"no memory for a decode step at position {max(at)} on the CPU")


def not_finite(dtype: torch.dtype, what: str = "the model's output") -> ValueError:
    """The error of a model of this dtype in which `what` is not finite."""
    other = {torch.float16: "--precision bfloat16 or float32", torch.bfloat16: "--precision float32"}.get(dtype)
    advice = f"choose {other}; if it is the same there" if other else "if its cuts are not to blame"
    name = str(dtype).removeprefix("torch.")
    return ValueError(f"{what} in {name} is not finite; {advice}, its weights are damaged: get them again")


def check_finite(logits: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if in a row of logits [..., V], of a model of this dtype, the largest is not a number."""
    if not logits.amax(-1).isfinite().all():
        raise not_finite(dtype)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x21F0AAAD & 0xFFFFFFFF
    return x ^ (x >> 15)


def random_bits(seed: Tensor, position: int | Tensor, token: Tensor) -> Tensor:
    """32 random bits by hashing seed, position and token, int64, one after the other; no product reaches 2^63."""
    return _mixed(_mixed(_mixed(seed & 0xFFFFFFFF) + position & 0xFFFFFFFF) + token & 0xFFFFFFFF)


def sample(logits: Tensor, seeds: Tensor, position: int | Tensor, temperature: float, top_k: int) -> Tensor:
    """Draws a token for each row. logits: [B, V]; returns [B, 1], int64. Temperature 0 takes the likeliest.

    seeds: [B, 1], int64; position: where the tokens will stand. A row whose largest logit is not finite has no token:
    its is -1, so that a loop can look when it is over.
    """
    peak = logits.amax(dim=-1, keepdim=True)
    return torch.where(peak.isfinite(), _draw(logits, seeds, position, temperature, top_k), -1)


def _draw(logits: Tensor, seeds: Tensor, position: int | Tensor, temperature: float, top_k: int) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    kth = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]

    # the argmax of logits + Gumbel noise is a draw from their softmax
    bits = random_bits(seeds, position, torch.arange(logits.shape[-1], device=logits.device))
    noise = -torch.log(-torch.log(((bits >> 9).float() + 0.5) * 2.0**-23))
    return torch.where(logits < kth, -float("inf"), logits + noise).argmax(dim=-1, keepdim=True)


def decode_one_token(
    model: Transformer, token: Tensor, input_pos: Tensor, seeds: Tensor, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """The next token [B, 1] and its position [1], from a token [B, 1] at input_pos [1]; seeds: see `sample`."""
    logits = model(token.clamp_min(0), input_pos)
    return sample(logits[:, -1], seeds, input_pos + 1, temperature, top_k), input_pos + 1


def prefill(model: Transformer, prompt: Tensor, seeds: Tensor, temperature: float, top_k: int) -> Tensor:
    """The first new token [B, 1] after a prompt [B, P], which is dense in a sparse model too; seeds: see `sample`."""
    length = prompt.shape[1]
    single = length == 1 and isinstance(model, SparseTransformer)  # would be cut
    options = {"dense_prefix": 1} if single else {}
    positions = torch.arange(length, device=prompt.device)
    logits = model(prompt, positions, num_logits=1, from_start=True, **options)
    return sample(logits[:, -1], seeds, length, temperature, top_k)


class GraphedPrefill:
    """`prefill`, compiled or not, recorded as a CUDA graph for prompts of its first call's length, others as ever."""

    # For 6 tokens of llama-3-8b's shape the launches alone took an H100's host 21 ms, where the graph takes 9.

    def __init__(self, run: Callable[..., Tensor]):
        self.run, self.graph = run, None

    def __call__(self, model: Transformer, prompt: Tensor, *sampling) -> Tensor:
        if self.graph is None:
            self.prompt = prompt.clone()
            self.run(model, self.prompt, *sampling)  # warms up what must not happen while recording
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.token = self.run(model, self.prompt, *sampling)
        if prompt.shape != self.prompt.shape:
            return self.run(model, prompt, *sampling)
        self.prompt.copy_(prompt)
        self.graph.replay()
        return self.token


class UnfusedStep:
    """Decode steps by `decode_one_token`, compiled or not, in the form of `FusedGpuStep`; its rows share a position.

    tokens: [rows, positions of the cache + 1], int64; -1 where a row's logits were not finite.
    """

    marks_not_finite = True

    def __init__(self, model: Transformer, run: Callable[..., tuple[Tensor, Tensor]], temperature: float, top_k: int):
        self.model, self.run, self.sampling = model, run, (temperature, top_k)
        rows, _, positions, _ = model.layers[0].attention.kv_cache.k_cache.shape
        self.tokens = torch.zeros(rows, positions + 1, device=model.device, dtype=torch.int64)

    def start(self, tokens: Tensor, positions: list[int], seeds: list[int]) -> None:
        """Sets the token to feed next, its position, and the seed of the draws, of each row."""
        self.token, self.at = tokens[:, None], positions[0]
        self.position = torch.tensor(positions[:1], device=tokens.device)
        self.seeds = torch.tensor(seeds, device=tokens.device)[:, None]
        self.tokens[:, self.at] = tokens

    def replay(self) -> None:
        """One step."""
        step = self.run(self.model, self.token, self.position, self.seeds, *self.sampling)
        self.token, self.position = (tensor.clone() for tensor in step)  # a CUDA graph writes the next ones there
        self.at += 1
        self.tokens[:, self.at] = self.token[:, 0]


@dataclass
class Generation:
    """Prompts, one [P] per row, and their new tokens [B, N].

    total_s, decode_s: wall time of the call and, of that, of the N - 1 steps after the first tokens were on the host.
    rounds: of drafts, see speculate.py: how many were guessed and how many of them accepted.
    """

    prompts: list[Tensor]
    new: Tensor
    total_s: float
    decode_s: float
    rounds: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> Tensor:
        """Prompts and new tokens [B, P + N], of prompts of one length."""
        return torch.cat((torch.stack(self.prompts), self.new), dim=1)


@dataclass(eq=False)
class Generator:
    """A model with its cache and one form of its decode step.

    model: on its device; its cache is made here. Generators of one size may share a model; one of another size takes it
        from those before.
    batch_size, max_length: rows and positions of the cache.
    temperature, top_k: of the sampling; temperature 0 is greedy.
    step: "fused", "compiled" (torch.compile, with CUDA graphs on a GPU) or "eager"; `why_unfused` tells which can run.
    compile_prefill: torch.compile of the prompt's pass.
    dense: a fused step with nothing cut, whatever the model's cuts.
    static_prompt: prompts keep their length, so that beside a fused step the prompt's pass is a CUDA graph too. Else
        a compiled pass serves every length from 2 on.
    seed: of the draws, modulo 2^32; row r of a batch draws with seed + r.
    spare: positions of the cache behind max_length, for drafts of a Generator that shares the model.
    """

    model: Transformer
    batch_size: int
    max_length: int
    temperature: float = 0.8
    top_k: int = 200
    step: str = "eager"
    compile_prefill: bool = False
    dense: bool = False
    static_prompt: bool = True
    seed: int = 0
    spare: int = 0

    def __post_init__(self):
        model, self.device = self.model, self.model.device
        self.temperature = self.temperature if self.temperature > LEAST_TEMPERATURE else 0.0
        model.setup_caches(self.batch_size, self.max_length, self.spare)
        self._cache = model.layers[0].attention.kv_cache
        self._seeds = [(self.seed + row) % 2**32 for row in range(self.batch_size)]
        self._rounds: list[tuple[int, int]] = []

        # the prompt's pass, and the seed that it draws with
        self._prefill, self._row_seed = prefill, torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        if self.compile_prefill:
            self._prefill = torch.compile(prefill, fullgraph=True, dynamic=False)
        if self.step == "fused" and self.static_prompt and self.device.type == "cuda":
            self._prefill = GraphedPrefill(self._prefill)

        # the step, in the form that was asked for
        if self.step == "fused":
            fused_class = getattr(model, "fused_class", FusedCpuStep if self.device.type == "cpu" else FusedGpuStep)
            self._step = fused_class(model, self.temperature, self.top_k, self.dense)
        else:
            run, mode = decode_one_token, "reduce-overhead" if self.device.type == "cuda" else "default"
            if self.device.type == "cuda" and isinstance(model, SparseTransformer) and model.dtype != torch.float32:
                set_site_grids(model)
            if self.step == "compiled":
                run = torch.compile(decode_one_token, mode=mode, fullgraph=True)
            self._step = UnfusedStep(model, run, self.temperature, self.top_k)

    @torch.inference_mode()
    def __call__(
        self, prompts: Iterable[Tensor], max_new_tokens: int, on_token: Callable | None = None, eos_ids: Collection = ()
    ) -> Generation:
        """Generates after the prompts: [B, P], or a [P] of its own for each row, which fused steps alone take.

        on_token: sees the new tokens [B, 1] of every step, on the host, and returns True to stop early. On a GPU the
            next step runs meanwhile.
        eos_ids: stops when each row has had one of them; a row goes on until all have.
        Raises ValueError: the tokens do not fit the cache or the form of the step, the model has a cache of another
        size by now, or its output is not finite (on a GPU that shows at the end, where nobody looks at every step).
        """
        prompts = list(prompts)
        lengths = [len(prompt) for prompt in prompts]
        rows, positions = self.batch_size, self.max_length
        if len(prompts) != rows or max(lengths) + max_new_tokens > positions:
            raise ValueError(
                f"{len(prompts)} rows of {max(lengths)} tokens and {max_new_tokens} new ones do not fit this "
                f"Generator's cache of {rows} rows and {positions} positions"
            )
        if self.model.layers[0].attention.kv_cache is not self._cache:
            raise ValueError("the model's cache was replaced by a Generator of another size; make this one anew")
        if self.step != "fused" and len(set(lengths)) > 1:
            various = f"{min(lengths)} to {max(lengths)} tokens"
            raise ValueError(f"prompts of {various} need fused steps, not {self.step} ones")

        start = self._now()
        first = torch.cat([self._first_token(row, prompt) for row, prompt in enumerate(prompts)])
        self._check(first)
        prefilled = self._now()
        count = self._decode(first, lengths, max_new_tokens, on_token, eos_ids)
        end = self._now()

        new = torch.stack([row[n : n + count] for row, n in zip(self._step.tokens, lengths, strict=True)])
        self._check(new)
        return Generation(prompts, new, end - start, end - prefilled, self._rounds)

    def _first_token(self, row: int, prompt: Tensor) -> Tensor:
        """The first new token [1, 1] after a prompt [P]: a pass of its own, that depends on that prompt alone."""
        if self._cache.row is not None:
            self._cache.row.fill_(row)
        self._row_seed.fill_(self._seeds[row])
        prompt = prompt[None]
        if self.compile_prefill and not self.static_prompt and prompt.shape[1] > 1:
            torch._dynamo.mark_dynamic(prompt, 1)
        return self._prefill(self.model, prompt, self._row_seed, self.temperature, self.top_k).clone()

    def _check(self, tokens: Tensor, peaks: Tensor | None = None) -> None:
        """Raises ValueError if a row has no token, or the largest of its logits is not a number."""
        if (tokens < 0).any() or (peaks is not None and not peaks.isfinite().all()):
            raise not_finite(self.model.dtype)

    def _decode(
        self, first: Tensor, lengths: list[int], count: int, on_token: Callable | None, eos_ids: Collection[int]
    ) -> int:
        """Takes `count` - 1 steps after the first tokens [B, 1], or fewer; how many tokens a row has then."""
        step, ended = self._step, set()
        step.start(first.flatten(), lengths, self._seeds)

        # nobody looks: the host only launches the steps
        if self.device.type == "cuda" and not on_token and not eos_ids:
            for _ in range(count - 1):
                step.replay()
            if count > 1:
                self._check(first, self._peaks())
            return count

        # else each step is looked at, on a GPU when the next one has been launched
        looks = self._looks(first, lengths, count)
        if self.device.type == "cuda":
            looks = (look for look, _ in pairwise(chain(looks, [None])))
        for seen, (tokens, peaks, arrived) in enumerate(looks, 1):
            if arrived:
                arrived.synchronize()
            self._check(tokens, peaks)
            ended.update(row for row, token in enumerate(tokens.flatten().tolist()) if token in eos_ids)
            if (on_token and on_token(tokens)) or len(ended) == len(lengths):
                return seen
        return count

    def _looks(self, first: Tensor, lengths: list[int], count: int) -> Iterator[tuple]:
        """Takes a step when the next tokens [B, 1] are asked for; with `_peaks` and, on a GPU, the event of arrival."""
        yield first.cpu(), None, None
        at = torch.tensor(lengths, device=self.device)[:, None]
        for i in range(1, count):
            self._step.replay()
            tokens, peaks = self._step.tokens.gather(1, at + i), self._peaks()
            tokens, peaks = (t if t is None else t.to("cpu", non_blocking=True) for t in (tokens, peaks))
            arrived = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
            yield tokens, peaks, arrived

    def _peaks(self) -> Tensor | None:
        """Each row's largest logit [B] of the last step. None: a token of -1 says that it is not finite."""
        if self._step.marks_not_finite:
            return None
        return self._step.logits[:, : self.model.config.vocab_size].amax(-1)

    @property
    def left_grid(self) -> bool:
        """Whether a fused step on a GPU ever had sums that may depend on their order, see `kernels.grids`."""
        return isinstance(self._step, FusedGpuStep) and self._step.left_grid

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

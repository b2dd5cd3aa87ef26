"""One decode step, fused: a token to the next one, sampling included, on a GPU or on a CPU, at batch 1.

Which models the fused steps serve stands beside them, in `unfusable`.
"""

import ctypes
from dataclasses import MISSING, fields

import torch
from torch import Tensor

from kernels import cpu
from model import ModelArgs
from sparse_model import SparseProjection, SparseTransformer

# The fields of ModelArgs that both fused steps implement, whatever their value.
FUSED_FIELDS = set(
    "name block_size vocab_size n_layer n_head n_local_heads dim head_dim intermediate_size tie_embeddings norm_eps "
    "rope_base rope_scaling qkv_bias sliding_window windowed_layers quant groupsize".split()
)


def unfusable(config: ModelArgs) -> str | None:
    """Why the fused steps do not serve a model, in one line; None: they do.

    A field of ModelArgs that they do not know must have its default, so that no switch is silently ignored.
    """
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in FUSED_FIELDS and value != default:
            return f"the fused steps do not implement {field.name} = {value!r}"
    return None


class FusedGpuStep:
    """Decode steps at batch 1 on a GPU, through the fused kernels and one CUDA graph.

    `replay` a step as often as wanted, then read `tokens`: it leaves nothing for the host to do.

    Args:
        model: with its cache set up for one row, and its cuts set: a later change needs a new step.
        temperature, top_k: of the sampling; temperature 0 is greedy.
        dense: runs the weights with nothing cut, by the same kernels with the test compiled out. So does a model whose
            `sparsity` is 0.

    Attributes:
        tokens: [positions of the cache + 1], int64; those from `start` on are valid.
        logits: [vocab and room for a norm's rstd], float32, of the last step.
    """

    def __init__(self, model: SparseTransformer, temperature: float, top_k: int, dense: bool = False):
        from kernels import fused_step, plan, triton_gemv

        self.kernels, self.launch_gemv = fused_step, triton_gemv.launch_gemv
        self.model, self.sparsity = model, 0.0 if dense else model.sparsity
        config, device = model.config, model.device
        self.sampling = temperature, min(top_k, config.vocab_size)
        self.pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

        def buffer(*shape: int, dtype=torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        # What one launch of a step leaves to the next. y is kept per layer: o guesses by its last input.
        cache_length, rstd_buffer = model.layers[0].attention.kv_cache.k_cache.shape[2], triton_gemv.RSTD_BUFFER
        q, kv = config.n_head * config.head_dim, config.n_local_heads * config.head_dim
        splits = plan.attention_splits(cache_length, config.n_local_heads)
        self.h = buffer(config.dim)
        self.qkv = buffer(q + 2 * kv + rstd_buffer)
        self.gate_up = buffer(2 * config.intermediate_size + rstd_buffer)
        self.y = buffer(config.n_layer, q, dtype=model.dtype)
        self.chunks = fused_step.Chunks(
            buffer(splits, q), buffer(splits, config.n_head), buffer(config.n_local_heads, dtype=torch.int32)
        )
        self.logits = buffer(config.vocab_size + rstd_buffer)

        # The sampling's room, and what goes from step to step.
        self.top = buffer(-(-config.vocab_size // fused_step.HEAD_ROWS))
        self.groups = buffer(1 << (self.sampling[1] + 31).bit_length(), dtype=torch.int32)
        self.seed, self.position, self.token = (buffer(1, dtype=torch.int64) for _ in range(3))
        self.tokens = buffer(cache_length + 1, dtype=torch.int64)
        self.state = self.seed, self.position, self.token, self.tokens

        # What the launches multiply and normalise with.
        self.last_rstds = buffer(2 * config.n_layer, 1)
        norms = [norm for block in model.layers for norm in (block.attention_norm, block.ffn_norm)]
        self.norms = [
            triton_gemv.Norm(norm.weight, norm.eps, last_rstd)
            for norm, last_rstd in zip(norms, self.last_rstds, strict=True)
        ]
        self.head_norm = triton_gemv.Norm(model.norm.weight, model.norm.eps)
        self.products = {module: self._product(triton_gemv.Product, module) for module in model.projections}
        self.graph: torch.cuda.CUDAGraph | None = None

    def _product(self, make: type, module: SparseProjection) -> tuple:
        """The module's `kernels.triton_gemv.Product`, thresholds and shifts side by side if there are shifts."""
        threshold, offset = module.threshold, None
        if self.sparsity and module.shift is not None:
            threshold = torch.stack((threshold, module.shift.expand_as(threshold)), dim=2)
            offset = module.offset
        return make(module.weight, threshold, module.widths, self.sparsity, module.scale, offset)

    def start(self, token: Tensor, position: int, seed: int) -> None:
        """Sets the token to feed next, its position, and the seed of the draws."""
        self.token.copy_(token.view(1))
        self.tokens[position] = token.view(())
        self.position.fill_(position)
        self.seed.fill_(seed)

    def replay(self) -> None:
        """One step; the first call records it."""
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Compiles the kernels and records the graph.

        The one step that it runs is undone, but for the cache at its position, which the first replay writes again.
        """
        token, position = self.token.clone(), self.position.clone()
        stream = torch.cuda.Stream(self.h.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.token.copy_(token)
        self.position.copy_(position)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def step(self) -> None:
        """Launches the kernels of one step."""
        kernels, model, products, pdl = self.kernels, self.model, self.products, self.pdl
        options = {"dtype": model.dtype, "pdl": pdl}
        kernels.launch_embed(self.token, model.tok_embeddings.weight, self.h, self.logits, pdl)

        for i, block in enumerate(model.layers):
            attention, feed_forward = block.attention, block.feed_forward
            wqkv, wo, w13, w2 = attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2
            attention_norm, ffn_norm = self.norms[2 * i : 2 * i + 2]
            window = model.config.sliding_window if i in model.config.windowed_layers else None
            cache, ahead = attention.kv_cache, (self.h, ffn_norm, products[w13])

            self.launch_gemv(
                "norm", self.h, products[wqkv], self.qkv, norm=attention_norm, zero=self.gate_up, **options
            )
            kernels.launch_attention(
                self.qkv, wqkv.bias, cache, self.position, model.inv_freq, self.chunks, self.y[i], window, ahead, pdl
            )
            self.launch_gemv("given", self.y[i : i + 1], products[wo], self.h[None], **options)
            self.launch_gemv("norm", self.h, products[w13], self.gate_up, norm=ffn_norm, zero=self.qkv, **options)
            self.launch_gemv("silu", self.gate_up, products[w2], self.h, **options)

        head_scale = None if model.output is None else model.output.scale
        kernels.launch_head(self.h, self.head_norm, model.output_weight, head_scale, self.logits, self.top, pdl)
        kernels.launch_sample(self.logits, self.top, self.groups, *self.state, *self.sampling, pdl)


class FusedCpuStep:
    """Decode steps at batch 1 on a CPU, each one call of the compiled library.

    A step runs with torch's number of threads, which sets the order of sums. It reads the model's tensors where they
    lie, so they must stay there. Arguments and attributes are those of `FusedGpuStep`; logits are [vocab], rounded to
    the model's dtype.
    """

    def __init__(self, model: SparseTransformer, temperature: float, top_k: int, dense: bool = False):
        config, cache = model.config, model.layers[0].attention.kv_cache.k_cache
        self._decode = cpu.kernel("decode", cache.dtype, model.layers[0].attention.wo.form)
        self._decode.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int]
        self._tensors = []  # those that only the structures point to
        self.logits = torch.zeros(config.vocab_size)
        self.tokens = torch.zeros(cache.shape[2] + 1, dtype=torch.int64)

        # the weights, layer by layer
        layers = (cpu.Layer * config.n_layer)()
        for i, block in enumerate(model.layers):
            attention, feed_forward = block.attention, block.feed_forward
            layers[i] = cpu.Layer(
                attention_norm=self._pointer(block.attention_norm.weight),
                ffn_norm=self._pointer(block.ffn_norm.weight),
                wqkv=self._projection(attention.wqkv),
                wo=self._projection(attention.wo),
                w13=self._projection(feed_forward.w13),
                w2=self._projection(feed_forward.w2),
                k_cache=self._pointer(attention.kv_cache.k_cache),
                v_cache=self._pointer(attention.kv_cache.v_cache),
                window=config.sliding_window if i in config.windowed_layers else cache.shape[2],
            )

        # the model: its shape, its other weights, room for values between the phases of a step, and the sampling
        q, kv = config.n_head * config.head_dim, config.n_local_heads * config.head_dim
        self._model = cpu.Model(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_local_heads=config.n_local_heads,
            head_dim=config.head_dim,
            dim=config.dim,
            hidden=config.intermediate_size,
            vocab=config.vocab_size,
            cache_length=cache.shape[2],
            layers=layers,
            # weights
            embedding=self._pointer(model.tok_embeddings.weight),
            norm=self._pointer(model.norm.weight),
            output=self._pointer(model.output_weight),
            output_scale=self._pointer(None if model.output is None else model.output.scale),
            inv_freq=self._pointer(model.inv_freq),
            # room
            h=self._pointer(torch.zeros(config.dim)),
            qkv=self._pointer(torch.zeros(q + 2 * kv)),
            y=self._pointer(torch.zeros(q)),
            act=self._pointer(torch.zeros(config.intermediate_size)),
            logits=self._pointer(self.logits),
            tops=self._pointer(torch.zeros(-(-config.vocab_size // cpu.GROUP))),
            tokens=self._pointer(self.tokens),
            # how it runs
            cut=not dense and model.sparsity > 0,
            eps=config.norm_eps,
            temperature=temperature,
            top_k=min(top_k, config.vocab_size),
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
        tensors = {name: self._pointer(getattr(module, name)) for name in cpu.Projection.TENSORS}
        return cpu.Projection(**tensors, group=module.form.groupsize)

    def start(self, token: Tensor, position: int, seed: int) -> None:
        """Sets the token to feed next, its position, and the seed of the draws."""
        self.position, self.seed, self._threads = position, seed, torch.get_num_threads()
        self.tokens[position] = token.item()

    def replay(self) -> None:
        """One step. Little happens here: what a step read has swept Python's own data out of the caches.

        Raises:
            MemoryError: too little for the step; the position is the same then.
        """
        assert self.position < self._model.cache_length
        if self._decode(ctypes.addressof(self._model), self.position, self.seed, self._threads):
            raise MemoryError(f"no memory for a decode step at position {self.position} on the CPU")
        self.position += 1

"""Tensor parallelism: a model over the GPUs of one host, or processes of its CPU, each a rank; torchrun starts them.

    torchrun --nproc_per_node 2 generate.py --random_init llama-3-70b --sparsity 0.5 --compile

    weight     each rank holds                              and then
    qkv        its heads' outputs (key/value heads repeat
               where there are more ranks)                  attends with these heads
    o          its heads' inputs                            ranks add up their parts of the output
    gate|up    its hidden units' outputs                    activates these
    down       its hidden units' inputs                     ranks add up their parts of the output
    lm_head    its tokens' rows                             every rank gets all logits and draws the same token

Embedding and norms are on every rank. From equal caches, a fused step of any number of ranks gives the same bits: what
is added lies on grids, and these are made of whole weights. On a CPU the threads of all ranks are one team with common
memory. On GPUs ranks write their parts into each other's memory (`kernels.exchange`), or NCCL adds them.
"""

import ctypes
import math
import os
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, permutations, starmap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cli import rank_count
from decoder import FusedCpuStep, FusedGpuStep
from kernels import cpu
from model import LayerPass, ModelArgs, Projection, TransformerBlock, init_modules
from sparse_model import SITES, SparseProjection, SparseTransformer
from thresholds import Cuts

UNIT = 64  # hidden units, and tokens of the lm_head, that stay together: a program's inputs, and cpu.GROUP
reduction = "peer"  # how ranks add up in a GPU's step: by "peer" memory, or "nccl"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: str | None, how: str = "peer") -> None:
    """Joins the ranks that torchrun has started, if it has, on a GPU of its own or, for "cpu" or without GPUs, the CPU.

    how: the `reduction`; "peer" becomes "nccl", with a warning, where a GPU cannot write to another.
    Raises ValueError: ranks of several hosts, a device that is no kind, too few GPUs.
    """
    global reduction
    ranks = rank_count()
    if ranks == 1 or dist.is_initialized():
        return
    reduction = how
    if ranks != int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):
        raise ValueError(f"{ranks} ranks on several hosts: ranks share one host's memory")
    own = None
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {kind}: each rank has a device of its own; give cpu or cuda")
    if kind == "cuda":
        if (found := torch.cuda.device_count()) < ranks:
            raise ValueError(f"{ranks} ranks need {ranks} GPUs, there are {found}: lower --nproc_per_node")
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        if how == "peer" and not all(starmap(torch.cuda.can_device_access_peer, permutations(range(ranks), 2))):
            warnings.warn("a GPU cannot write to another's memory: NCCL adds (--reduce nccl)", stacklevel=2)
            reduction = "nccl"
    os.environ |= {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=own)


def total(value: float, device: torch.device) -> float:
    """The sum of a number of each rank."""
    numbers = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return numbers.item()


def add_up(x: Tensor) -> Tensor:
    """The sum of all ranks' x, taken in float32."""
    x32 = x.float().contiguous()
    dist.all_reduce(x32)
    return x32.to(x.dtype)


# ---- which part of a model a rank has


def edges(n: int, unit: int, ranks: int) -> list[int]:
    """Where each rank's part of n begins, in multiples of unit, and the last one's end."""
    return [min(n, -(-n // unit) * r // ranks * unit) for r in range(ranks + 1)]


class Part(NamedTuple):
    """A rank's part of a model: its config, and by projection which outputs it has, of o and down which inputs."""

    config: ModelArgs
    spans: dict[str, tuple[int, int]]
    tokens: tuple[int, int]  # of the lm_head


def part_of(config: ModelArgs, r: int, ranks: int) -> Part:
    """The part of rank r. Raises ValueError if a model cannot be split over so many."""
    heads, kv = config.n_head, config.n_local_heads
    units = math.lcm(UNIT, config.groupsize if config.quant == "int4" else 1)
    model = f"{config.name or 'the model'} over {ranks} ranks"
    if heads % ranks or (kv % ranks and ranks % kv):
        raise ValueError(f"{model}: they do not divide its {heads} heads and {kv} key/value heads")
    if min(config.intermediate_size // units, config.vocab_size // UNIT) < ranks:
        raise ValueError(f"{model}: its {config.intermediate_size} hidden units are too few, {units} stay together")
    if config.qk_norm == "whole":
        raise ValueError(f"{model}: it normalises queries over all heads, which is not implemented for ranks")

    heads, kv_heads = heads // ranks, max(1, kv // ranks)
    hidden = edges(config.intermediate_size, units, ranks)[r : r + 2]
    shape = {"n_head": heads, "n_local_heads": kv_heads, "intermediate_size": hidden[1] - hidden[0]}
    first_kv = r * kv // ranks
    q = r * heads * config.head_dim, (r + 1) * heads * config.head_dim
    k = first_kv * config.head_dim, (first_kv + kv_heads) * config.head_dim
    spans = {"q": q, "k": k, "v": k, "o": q} | dict.fromkeys(("gate", "up", "down"), tuple(hidden))
    return Part(replace(config, **shape), spans, tuple(edges(config.vocab_size, UNIT, ranks)[r : r + 2]))


def _pairs(whole: Tensor, part: Tensor, dim: int, widths: list[int], spans: list) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of what a part has of each segment: in the whole tensor, and in the part's."""
    packed, start, at = sum(widths) // whole.shape[dim], 0, 0  # outputs of an element: int4's 2, or of a scale a group
    for width, (first, end) in zip(widths, spans, strict=True):
        size = (end - first) // packed
        yield whole.narrow(dim, (start + first) // packed, size), part.narrow(dim, at, size)
        start, at = start + width, at + size


def _shared_tensors(whole: nn.Module, part: nn.Module, spans: dict) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views that are alike in a whole block and in a rank's."""
    sites = {}
    for site in SITES.values():
        a, b = (block.get_submodule(site.module) for block in (whole, part))
        sites |= {id(p): 0 for p in (a.weight, a.bias) if p is not None}
        by_inputs = "o" in a.segments or "down" in a.segments
        own = [spans[name] for name in a.segments]
        for name in ("weight", "scale", "bias"):
            x, y = getattr(a, name), getattr(b, name)
            if x is None:
                continue
            if not by_inputs:
                yield from _pairs(x, y, min(1, x.dim() - 1), a.widths, own)
            elif x.dim() > 1:
                yield from _pairs(x, y, 0, [len(x)], own)
            else:
                yield x, y
    others = ((p, n) for n, p in whole.named_parameters() if id(p) not in sites)
    yield from ((p, part.get_parameter(name)) for p, name in others)


class Whole(NamedTuple):
    """Of o or down: where this rank's inputs begin, and what a CPU's step needs of all ranks' inputs."""

    first: int
    bias: Tensor | None = None
    log_norms: Tensor | None = None  # see `cpu.column_norms`
    threshold: Tensor | None = None  # [1, in]
    shift: Tensor | None = None
    offset: Tensor | None = None


class RankTransformer(SparseTransformer):
    """A rank's part of a SparseTransformer, with the whole one's logits. `config` is that of the part.

    A pass over several tokens adds up parts rounded to the model's dtype: to the bit it differs from that of one rank.
    """

    def __init__(self, config: ModelArgs, device=None, dtype=None):
        part = part_of(config, rank(), count())
        super().__init__(part.config, device, dtype)
        self.whole_config, self.part = config, part
        if self.output is not None:
            tokens = part.tokens[1] - part.tokens[0]
            self.output = Projection(config.dim, {"output": tokens}, False, device, dtype, config.sensitive_quant)
        for block in self.layers:
            for module, name in ((block.attention.wo, "o"), (block.feed_forward.w2, "down")):
                module.whole = Whole(part.spans[name][0])
                module.register_forward_hook(lambda _module, _inputs, y: add_up(y))

    @property
    def fused_class(self) -> type:
        return RankCpuStep if self.device.type == "cpu" else RankGpuStep

    @property
    def output_weight(self) -> Tensor:
        """The rows of the lm_head that this rank has."""
        return self.tok_embeddings.weight[slice(*self.part.tokens)] if self.output is None else self.output.weight

    def head(self, x: Tensor) -> Tensor:
        own = super().head(x)
        logits = own.new_zeros(*own.shape[:-1], self.config.vocab_size)
        logits[..., slice(*self.part.tokens)] = own
        return add_up(logits)

    def achieved_sparsity(self) -> float:
        return total(super().achieved_sparsity(), self.device) / count()

    def bytes_per_step(self) -> int:
        """Of all ranks; norms count on each."""
        return round(total(super().bytes_per_step(), self.device))

    # ---- weights come whole, a layer at a time

    def _block(self, config: ModelArgs) -> TransformerBlock:
        return TransformerBlock(config, SparseProjection, self.device, self.dtype).requires_grad_(False)

    @torch.no_grad()
    def _take(self, block: TransformerBlock, whole: TransformerBlock) -> None:
        """Fills this rank's block from a whole one. A bias of o and down is added by the first rank alone."""
        for x, y in _shared_tensors(whole, block, self.part.spans):
            y.copy_(x)
        for path in (SITES["o"].module, SITES["down"].module):
            module, source, norms = block.get_submodule(path), whole.get_submodule(path), None
            if self.device.type == "cpu" and cpu.library() is not None:
                norms = cpu.column_norms(source.weight, source.scale, self.dtype)
            module.whole = module.whole._replace(bias=source.bias, log_norms=norms)
            if module.bias is not None and rank() > 0:
                module.bias.zero_()

    @torch.no_grad()
    def whole_block(self, i: int) -> TransformerBlock:
        """A copy of layer i's whole block, on every rank."""
        whole = self._block(self.whole_config)
        for r in reversed(range(count())):  # the first rank's biases come last
            part = part_of(self.whole_config, r, count())
            block = self.layers[i] if r == rank() else self._block(part.config)
            for x, y in _shared_tensors(whole, block, part.spans):
                sent = y.detach().contiguous()
                dist.broadcast(sent.view(torch.uint8), r)
                x.copy_(sent)
        return whole

    def load_state_dict(self, state_dict: dict[str, Tensor], *_) -> None:
        """Takes this rank's part of a whole model's weights. Raises RuntimeError for missing or foreign ones."""
        layers, rest = defaultdict(dict), {}
        for name, tensor in state_dict.items():
            if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
                layers[int(match[1])][match[2]] = tensor
            else:
                rest[name] = tensor[slice(*self.part.tokens)] if name.startswith("output.") else tensor
        found = super().load_state_dict(rest, strict=False)
        if wrong := [*(n for n in found.missing_keys if not n.startswith("layers.")), *found.unexpected_keys]:
            raise RuntimeError(f"missing or foreign: {', '.join(wrong)}")
        for i, block in enumerate(self.layers):
            whole = self._block(self.whole_config)
            whole.load_state_dict(layers[i])
            self._take(block, whole)

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Takes this rank's part of what a whole model gets of this seed."""
        generator, config = torch.Generator(self.device).manual_seed(seed), self.whole_config
        for name, child in self.named_children():
            if name == "layers":
                for block in child:
                    whole = self._block(config)
                    init_modules(whole, generator, std)
                    self._take(block, whole)
            elif name == "output":
                shape = config.dim, {name: config.vocab_size}, False, self.device, self.dtype, config.sensitive_quant
                whole = Projection(*shape).requires_grad_(False)
                init_modules(whole, generator, std)
                for kind, tensor in whole.state_dict().items():
                    getattr(child, kind).copy_(tensor[slice(*self.part.tokens)])
            else:
                init_modules(child, generator, std)

    # ---- and where numbers must be those of one rank, they go whole through a layer

    def walk(self, batches: Sequence[Tensor], cached: bool = False) -> Iterator[LayerPass]:
        """See `Transformer.walk`. Each block is the whole one while the walk is at it: every rank computes the same."""
        assert not cached
        for layer in super().walk(batches):
            own, layer.block = layer.block, self.whole_block(layer.index)
            yield layer
            assert layer.outputs
            layer.block = own

    @torch.no_grad()
    def set_cuts(self, cuts: Cuts) -> None:
        """Sets this rank's part of a whole model's cuts; see `SparseTransformer.set_cuts`."""
        inputs = {"o": self.whole_config.n_head * self.whole_config.head_dim}
        inputs["down"] = self.whole_config.intermediate_size
        parts: list[tuple] = []
        for module, threshold, shift in zip(self.sites, cuts.thresholds, cuts.shifts, strict=False):
            if n_in := inputs.get(next(iter(module.segments))):
                if threshold.shape != (1, 1) and threshold.shape != (1, n_in):
                    parts = []  # of another model, as the check will say
                    break
                module.whole = module.whole._replace(threshold=threshold.expand(1, n_in).float().contiguous())
                own = slice(module.whole.first, module.whole.first + len(module.weight))
                threshold, shift = module.whole.threshold[:, own], None if shift is None else shift[own]
            parts.append((threshold, shift))
        thresholds, shifts = ([part[i] for part in parts] for i in (0, 1))
        super().set_cuts(Cuts(cuts.sparsity, thresholds, shifts))

        # offsets are sums over all inputs
        for i, block in enumerate(self.layers):
            if all(shift is None for shift in cuts.shifts[4 * i : 4 * i + 4]):
                continue
            whole = self.whole_block(i)
            for j, site in enumerate(SITES.values()):
                module, source = block.get_submodule(site.module), whole.get_submodule(site.module)
                source.set_cut(cuts.thresholds[4 * i + j], cuts.shifts[4 * i + j])
                if hasattr(module, "whole"):
                    module.whole = module.whole._replace(shift=source.shift, offset=source.offset)
                    module.offset = source.offset if rank() == 0 else None
                else:
                    spans = [self.part.spans[name] for name in module.segments]
                    for x, y in _pairs(source.offset, module.offset, 0, source.widths, spans):
                        y.copy_(x)


# ---- the fused steps


def common_memory(n_bytes: int) -> Tensor:
    """Zeros, uint8, in memory that the processes of all ranks share."""
    names, folder = [""], "/dev/shm" if Path("/dev/shm").is_dir() else None
    if rank() == 0:
        handle, names[0] = tempfile.mkstemp(dir=folder)
        os.truncate(handle, n_bytes)
        os.close(handle)
    dist.broadcast_object_list(names)
    memory = torch.from_file(names[0], shared=True, size=n_bytes, dtype=torch.uint8)
    dist.barrier()
    if rank() == 0:
        os.unlink(names[0])
    return memory


class RankCpuStep(FusedCpuStep):
    """A rank's part of a step on a CPU: its threads are some of the team's, as many as every other rank's."""

    adaptive = False

    def __init__(self, model: RankTransformer, temperature: float, top_k: int, dense: bool = False, drafts: int = 0):
        super().__init__(model, temperature, top_k, dense, drafts)
        config, own, ranks = model.whole_config, self._model, count()
        threads = torch.tensor(torch.get_num_threads())
        dist.all_reduce(threads, dist.ReduceOp.MIN)
        self._team = threads.item()

        # what the threads of all ranks read and write
        rows, q = len(self.tokens), config.n_head * config.head_dim
        width = (own.n_head + 2 * own.n_local_heads) * own.head_dim
        room = 2 * ranks * self._team * rows * max(config.dim, 2 * config.intermediate_size, width)
        sizes = {"barrier": 32, "pids": 2 * ranks, "partials": room, "h": rows * config.dim, "y": rows * q}
        sizes |= {"act": rows * config.intermediate_size, "logits": self.logits.numel()}
        sizes["tops"] = rows * -(-config.vocab_size // cpu.GROUP)
        parts = common_memory(4 * sum(-(-n // 32) * 32 for n in sizes.values())).view(torch.float32)
        parts = dict(zip(sizes, parts.split([-(-n // 32) * 32 for n in sizes.values()]), strict=True))
        for name in ("h", "y", "act", "logits", "tops"):
            setattr(own, name, self._pointer(parts[name]))
        self.logits = parts["logits"][: self.logits.numel()].view_as(self.logits)
        parts["pids"].view(torch.int64)[rank()] = os.getpid()
        dist.barrier()

        # this rank among them, and its rows of the lm_head
        pointers = {name: self._pointer(parts[name]) for name in ("partials", "barrier", "pids")}
        first, _ = model.part.spans["down"]
        self._ranks = cpu.Ranks(rank(), ranks, config.intermediate_size, first, **pointers)
        own.ranks, own.pace = ctypes.addressof(self._ranks), None
        own.output -= model.part.tokens[0] * model.output_weight[0].nbytes
        if own.output_scale:
            own.output_scale -= 4 * model.part.tokens[0]
        self._run, self._decode = self._decode, self._checked

    def _projection(self, module: SparseProjection) -> cpu.Projection:
        """Of o and down: what belongs to all inputs, and where the weights of the first one would be."""
        projection, whole = super()._projection(module), getattr(module, "whole", None)
        if whole is not None:
            for name in ("threshold", "shift", "offset", "bias", "log_norms"):
                setattr(projection, name, self._pointer(getattr(whole, name)))
            projection.weight -= whole.first * module.weight[0].nbytes
            if module.scale is not None and module.scale.dim() > 1:
                projection.scale -= whole.first * module.scale[0].nbytes
        return projection

    def start(self, *arguments) -> None:
        super().start(*arguments)
        self._threads = self._team

    def _checked(self, *arguments) -> int:
        if (failed := self._run(*arguments)) == 2:
            raise ValueError("another rank has ended")
        return failed


class RankGpuStep(FusedGpuStep):
    """A rank's part of a step on a GPU, whose launches are those of one rank, with two sums per layer between."""

    def __init__(self, model: RankTransformer, temperature: float, top_k: int, dense: bool = False, drafts: int = 0):
        super().__init__(model, temperature, top_k, dense, drafts)
        from kernels.exchange import Inboxes
        from kernels.triton_gemv import RSTD_BUFFER

        # the sums of a product are those of the whole one
        whole = TransformerBlock(model.whole_config, SparseProjection, device="meta")
        sites = [whole.get_submodule(site.module) for site in SITES.values()]
        for i, module in enumerate(model.sites):
            shape = len(sites[i % 4].weight), sites[i % 4].widths
            self.products[module] = self.products[module]._replace(whole=shape)

        # what o, down and the lm_head leave to be exchanged
        h, (first, end), vocab = self.residual.h, model.part.tokens, model.config.vocab_size
        most, own = max(b - a for a, b in pairwise(edges(vocab, UNIT, count()))), end - first
        self.added = torch.zeros_like(h)
        self.own_logits = h.new_zeros(len(h), most + RSTD_BUFFER)[:, : own + RSTD_BUFFER]
        self.own_top = h.new_zeros(len(h), -(-own // self.kernels.HEAD_ROWS))
        self.inboxes = None
        if reduction == "peer":
            room = max(h.numel(), len(h) * (most + RSTD_BUFFER))
            pointers, self._memory = peer_memory(2 * count() * room, h.device)
            self.inboxes = Inboxes(pointers, rank(), room, 2 * model.config.n_layer + 1, self.pdl)

    def step(self) -> None:
        if self.inboxes:
            self.inboxes.begin_step()
        super().step()

    def sum_parts(self) -> None:
        if self.inboxes:
            self.inboxes.add(self.added, self.residual.h)
            return
        dist.all_reduce(self.added)
        self.residual.h.add_(self.added)
        self.added.zero_()

    def join_logits(self) -> None:
        (first, end), vocab = self.model.part.tokens, self.model.config.vocab_size
        if self.inboxes:
            self.inboxes.gather(self.own_logits, self.logits, self.top, vocab, UNIT)
            return
        self.logits.zero_()
        self.logits[:, first:end] = self.own_logits[:, : end - first]
        dist.all_reduce(self.logits)
        group = self.kernels.HEAD_ROWS
        padded = nn.functional.pad(self.logits[:, :vocab], (0, -vocab % group), value=-math.inf)
        torch.amax(padded.unflatten(1, (-1, group)), 2, out=self.top)


def peer_memory(words: int, device: torch.device) -> tuple[Tensor, object]:
    """Where each rank's memory of so many words of 64 bits lies, zeroed, [ranks] int64; and what must be kept."""
    if device.type == "cpu":
        memory = common_memory(8 * words * count())
        pointers, kept = [memory.data_ptr() + 8 * words * r for r in range(count())], memory
    else:
        import torch.distributed._symmetric_memory as symmetric

        memory = symmetric.empty(words, dtype=torch.int64, device=device).zero_()
        handle = symmetric.rendezvous(memory, dist.group.WORLD)
        pointers = [handle.get_buffer(r, memory.shape, memory.dtype).data_ptr() for r in range(count())]
        kept = memory, handle
        torch.cuda.synchronize(device)
    dist.barrier()
    return torch.tensor(pointers, dtype=torch.int64, device=device), kept

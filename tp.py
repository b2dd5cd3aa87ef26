"""Tensor parallelism: a model over the GPUs of one host, or processes of its CPU, each a rank; torchrun starts them.

    torchrun --nproc_per_node 2 generate.py --random_init llama-3-70b --sparsity 0.5 --compile

    weight     a rank holds                        and then
    qkv        the outputs of its heads            attends with them; key/value heads repeat where they are fewer
    o          the inputs of its heads             ranks add up their parts of the output
    gate|up    the outputs of its hidden units     activates them
    down       the inputs of its hidden units      ranks add up their parts of the output
    lm_head    the rows of its tokens              every rank gets all logits and draws the same token

Embedding and norms are on every rank. From equal caches, fused steps of any number of ranks give the same bits: what is
added lies on grids, which are made of whole weights. On a CPU the threads of all ranks are one team with common memory.
GPUs write their parts into each other's memory (`kernels.exchange`), or NCCL adds them.
"""

import ctypes
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations, starmap
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

UNIT = 64  # hidden units, and tokens, that stay together: the most inputs of a sum before its grid, and cpu.GROUP
INTEGER_UNIT = 128  # of integers, see `kernels.integer_mma`
BY_INPUTS = ("o", "down")
# The dimension along which a site's tensors are split; others are on every rank. Of int8 the scale is one per output.
OUTPUT_DIMS = {"weight": 1, "scale": 1, "bias": 0, "offset": 0}
INPUT_DIMS = {"weight": 0, "scale": 0, "threshold": 1, "shift": 0}
reduction = "peer"  # how the ranks of a GPU's step add up: by "peer" memory, or "nccl"


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
    ranks, own = rank_count(), None
    if ranks == 1 or dist.is_initialized():
        return
    if ranks != int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):
        raise ValueError(f"{ranks} ranks on several hosts: all must be on one")
    kind, reduction = device or ("cuda" if torch.cuda.is_available() else "cpu"), how
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {kind}: each rank has a device of its own; give cpu or cuda")
    if kind == "cuda":
        if (found := torch.cuda.device_count()) < ranks:
            raise ValueError(f"{ranks} ranks need {ranks} GPUs, there are {found}: lower --nproc_per_node")
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        if how == "peer" and not all(starmap(torch.cuda.can_device_access_peer, permutations(range(ranks), 2))):
            warnings.warn("a GPU cannot write to another's memory, so NCCL adds, as with --reduce nccl", stacklevel=2)
            reduction = "nccl"
    os.environ |= {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
    dist.init_process_group("nccl" if own else "gloo", device_id=own)


def total(value: float, device: torch.device) -> float:
    """The sum of a number of each rank."""
    return add_up(torch.tensor([value], dtype=torch.float64, device=device), torch.float64).item()


def add_up(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of all ranks' x, taken in this dtype."""
    wide = x.to(dtype).contiguous()
    dist.all_reduce(wide)
    return wide.to(x.dtype)


# ---- which part of a model a rank has


def edges(n: int, unit: int, ranks: int) -> list[int]:
    """Where each rank's part of n begins, in multiples of unit, and the last one's end."""
    return [min(n, -(-n // unit) * r // ranks * unit) for r in range(ranks + 1)]


class Part(NamedTuple):
    """A rank's part of a model."""

    config: ModelArgs
    spans: dict[str, tuple[int, int]]  # which outputs of each projection, of o and down which inputs
    tokens: slice  # whose logits


def part_of(config: ModelArgs, r: int, ranks: int) -> Part:
    """The part of rank r. Raises ValueError if a model cannot be split over so many."""
    heads, kv, hidden = config.n_head, config.n_local_heads, config.intermediate_size
    unit = UNIT if config.quant == "none" else INTEGER_UNIT
    unit = math.lcm(unit, config.groupsize) if config.quant == "int4" else unit
    name = config.name or "the model"
    if config.quant == "packed":
        raise ValueError(f"{name} has packed weights, which run on one rank; give the checkpoint that it was made from")
    if heads % ranks or (kv % ranks and ranks % kv) or config.qk_norm == "whole":
        norm = ", and a norm over all heads" * (config.qk_norm == "whole")
        raise ValueError(f"{name} has {heads} heads, {kv} key/value heads{norm}: {ranks} ranks cannot share them")
    if min(-(-hidden // unit), -(-config.vocab_size // UNIT)) < ranks:
        raise ValueError(f"{name} has {hidden} hidden units, of which {unit} stay together, too few for {ranks} ranks")

    size, n, n_kv, first_kv = config.head_dim, heads // ranks, max(1, kv // ranks), r * kv // ranks
    units, tokens = (edges(n, u, ranks)[r : r + 2] for n, u in ((hidden, unit), (config.vocab_size, UNIT)))
    q, k = (r * n * size, (r + 1) * n * size), (first_kv * size, (first_kv + n_kv) * size)
    spans = {"q": q, "k": k, "v": k, "o": q} | dict.fromkeys(("gate", "up", "down"), tuple(units))
    own = replace(config, n_head=n, n_local_heads=n_kv, intermediate_size=units[1] - units[0])
    return Part(own, spans, slice(*tokens))


def _site_views(whole: SparseProjection, part: SparseProjection, spans: dict, names: str) -> Iterator[tuple]:
    """Pairs of views, of a whole site's tensors and of a rank's part, that hold the same numbers."""
    by_inputs = next(iter(whole.segments)) in BY_INPUTS
    widths, own = [whole.threshold.shape[1]] if by_inputs else whole.widths, [spans[name] for name in whole.segments]
    for name in names.split():
        x, y, dim = getattr(whole, name), getattr(part, name), (INPUT_DIMS if by_inputs else OUTPUT_DIMS).get(name)
        if name == "scale" and x is not None and x.dim() == 1:  # int8's
            dim = None if by_inputs else 0
        if x is not None and dim is None:
            yield x, y
        elif x is not None:
            per_element = sum(widths) // x.shape[dim]  # numbers of an element: int4's 2, or a group of a scale
            pieces = x.split([width // per_element for width in widths], dim)
            own_pieces = y.split([(end - first) // per_element for first, end in own], dim)
            for piece, own_piece, (first, _) in zip(pieces, own_pieces, own, strict=True):
                yield piece.narrow(dim, first // per_element, own_piece.shape[dim]), own_piece


def _block_views(whole: TransformerBlock, part: TransformerBlock, spans: dict) -> Iterator[tuple]:
    # of all that a checkpoint holds of a block
    for site in SITES.values():
        yield from _site_views(*(b.get_submodule(site.module) for b in (whole, part)), spans, "weight scale bias")
    sites = tuple(site.module for site in SITES.values())
    yield from ((x, part.get_parameter(n)) for n, x in whole.named_parameters() if not n.startswith(sites))


class RankTransformer(SparseTransformer):
    """A rank's part of a SparseTransformer, with the logits of all ranks. `config` is that of the part.

    A pass over several tokens adds up parts rounded to the model's dtype: to the bit it differs from that of one rank.
    """

    def __init__(self, config: ModelArgs, device=None, dtype=None):
        part = part_of(config, rank(), count())
        super().__init__(part.config, device, dtype)
        self.whole_config, self.part = config, part
        self.fused_class = RankCpuStep if self.device.type == "cpu" else RankGpuStep
        if self.output is not None:
            self.output = self._head(part.tokens.stop - part.tokens.start)
        for module in self.sites:
            if next(iter(module.segments)) in BY_INPUTS:
                module.whole = {}  # of all ranks' inputs, what a CPU's step needs
                module.register_forward_hook(lambda _module, _inputs, y: add_up(y))

    def _head(self, n: int) -> Projection:
        return Projection(self.config.dim, {"output": n}, False, self.device, self.dtype, self.config.sensitive_quant)

    def _block(self, config: ModelArgs) -> TransformerBlock:
        return TransformerBlock(config, SparseProjection, self.device, self.dtype).requires_grad_(False)

    @property
    def output_weight(self) -> Tensor:
        """The rows of the lm_head that this rank has."""
        return self.tok_embeddings.weight[self.part.tokens] if self.output is None else self.output.weight

    def head(self, x: Tensor) -> Tensor:
        own = super().head(x)
        logits = own.new_zeros(*own.shape[:-1], self.config.vocab_size)
        logits[..., self.part.tokens] = own
        return add_up(logits)

    def achieved_sparsity(self) -> float:
        return total(super().achieved_sparsity(), self.device) / count()

    def bytes_per_step(self) -> int:
        """Of all ranks; norms count on each."""
        return round(total(super().bytes_per_step(), self.device))

    # ---- weights come whole, a layer at a time

    @torch.no_grad()
    def _whole_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """A whole model's modules to be filled, with the prefix of their names; takes this rank's part of each then."""
        for name, child in self.named_children():
            if name == "layers":
                for i, block in enumerate(child):
                    whole = self._block(self.whole_config)
                    yield f"layers.{i}.", whole
                    self._take(block, whole)
            elif name == "output":
                whole = self._head(self.config.vocab_size)
                yield "output.", whole
                for x, y in zip(whole.state_dict().values(), child.state_dict().values(), strict=True):
                    y.copy_(x[self.part.tokens])
            else:
                yield f"{name}.", child

    def load_state_dict(self, state_dict: dict[str, Tensor], *_) -> None:
        """Takes this rank's part of a whole model's weights. Raises RuntimeError for missing or foreign ones."""
        left, wrong = dict(state_dict), []
        for prefix, module in self._whole_modules():
            own = {name.removeprefix(prefix): left.pop(name) for name in [*left] if name.startswith(prefix)}
            wrong += [prefix + name for names in module.load_state_dict(own, strict=False) for name in names]
        if wrong := [*wrong, *left]:
            raise RuntimeError(f"missing or foreign: {', '.join(wrong)}")

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Takes this rank's part of what a whole model gets of this seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for _, module in self._whole_modules():
            init_modules(module, generator, std)

    def _take(self, block: TransformerBlock, whole: TransformerBlock) -> None:
        # the first rank alone adds a bias of o and down
        for x, y in _block_views(whole, block, self.part.spans):
            y.copy_(x)
        for path in ("attention.wo", "feed_forward.w2"):
            module, source = block.get_submodule(path), whole.get_submodule(path)
            module.whole["bias"] = source.bias
            if self.device.type == "cpu" and cpu.library() is not None:
                module.whole["log_norms"] = cpu.column_norms(source.weight, source.scale, self.dtype)
            if module.bias is not None and rank() > 0:
                module.bias.zero_()

    # ---- and go whole where the numbers must be those of one rank

    @torch.no_grad()
    def whole_block(self, i: int) -> TransformerBlock:
        """A copy of layer i's whole block, on every rank."""
        whole = self._block(self.whole_config)
        for r in reversed(range(count())):  # the first rank's biases come last
            part = part_of(self.whole_config, r, count())
            block = self.layers[i] if r == rank() else self._block(part.config)
            for x, y in _block_views(whole, block, part.spans):
                sent = y.detach().contiguous()
                dist.broadcast(sent.view(torch.uint8), r)
                x.copy_(sent)
        return whole

    def walk(self, batches: Sequence[Tensor], cached: bool = False) -> Iterator[LayerPass]:
        """See `Transformer.walk`. A block is whole while the walk is at it, and all ranks compute the same."""
        assert not cached
        for layer in super().walk(batches):
            own, layer.block = layer.block, self.whole_block(layer.index)
            yield layer
            assert layer.outputs
            layer.block = own

    @torch.no_grad()
    def set_cuts(self, cuts: Cuts) -> None:
        """Sets this rank's part of a whole model's cuts. Raises as `SparseTransformer.set_cuts`."""
        SparseTransformer(self.whole_config, "meta", self.dtype).set_cuts(cuts)
        for i, block in enumerate(self.layers):
            here = slice(len(SITES) * i, len(SITES) * (i + 1))
            shifted = any(shift is not None for shift in cuts.shifts[here])
            whole = self.whole_block(i) if shifted else self._block(self.whole_config)  # offsets are products
            for site, threshold, shift in zip(SITES.values(), cuts.thresholds[here], cuts.shifts[here], strict=True):
                module, source = block.get_submodule(site.module), whole.get_submodule(site.module)
                source.set_cut(threshold, shift)
                for name, n in (("shift", module.threshold.shape[1]), ("offset", sum(module.widths))):
                    setattr(module, name, None if shift is None else source.shift.new_empty(n))
                for x, y in _site_views(source, module, self.part.spans, "threshold shift offset"):
                    y.copy_(x)
                if next(iter(module.segments)) in BY_INPUTS:
                    module.whole |= {name: getattr(source, name) for name in ("threshold", "shift", "offset")}
                    module.offset = module.offset if rank() == 0 else None
        self.sparsity = cuts.sparsity


# ---- the fused steps


def common_memory(n_bytes: int) -> Tensor:
    """Zeros, uint8, in memory that the processes of all ranks share."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        names = [file.name]
        dist.broadcast_object_list(names)  # the first rank's
        memory = torch.from_file(names[0], shared=True, size=n_bytes, dtype=torch.uint8)
        dist.barrier()
    return memory


class RankCpuStep(FusedCpuStep):
    """A rank's part of a step on a CPU: its threads are part of a team, as many as every other rank's."""

    adaptive = False

    def __init__(self, model: RankTransformer, temperature: float, top_k: int, dense: bool = False, drafts: int = 0):
        self._part = model.part
        super().__init__(model, temperature, top_k, dense, drafts)
        config, own, ranks, rows = model.whole_config, self._model, count(), len(self.tokens)
        threads = torch.tensor(torch.get_num_threads())
        dist.all_reduce(threads, dist.ReduceOp.MIN)
        self._team = threads.item()

        # what the threads of all ranks read and write, in float32, each from a cache line on
        hidden, q = config.intermediate_size, config.n_head * config.head_dim
        widest = max(config.dim, 2 * hidden, (own.n_head + 2 * own.n_local_heads) * own.head_dim)
        sizes = {"barrier": 32, "pids": 2 * ranks, "partials": 2 * ranks * self._team * rows * widest}
        sizes |= {"h": rows * config.dim, "y": rows * q, "act": rows * hidden, "logits": self.logits.numel()}
        sizes["tops"] = rows * -(-config.vocab_size // cpu.GROUP)
        room = [-(-n // 32) * 32 for n in sizes.values()]
        parts = dict(zip(sizes, common_memory(4 * sum(room)).view(torch.float32).split(room), strict=True))
        self.logits = parts["logits"][: self.logits.numel()].view_as(self.logits)
        parts["pids"].view(torch.int64)[rank()] = os.getpid()
        dist.barrier()

        # this rank among them, and its rows of the lm_head
        pointers = {name: self._pointer(tensor) for name, tensor in parts.items()}
        for name in ("h", "y", "act", "logits", "tops"):
            setattr(own, name, pointers.pop(name))
        self._ranks = cpu.Ranks(rank(), ranks, hidden, self._part.spans["down"][0], **pointers)
        own.ranks, own.pace = ctypes.addressof(self._ranks), None
        own.output -= self._part.tokens.start * model.output_weight[0].nbytes
        if own.output_scale:
            own.output_scale -= 4 * self._part.tokens.start
        self._run, self._decode = self._decode, self._checked

    def _projection(self, module: SparseProjection) -> cpu.Projection:
        # of o and down: what belongs to all inputs, and where the weights of the first one would be
        projection, name = super()._projection(module), next(iter(module.segments))
        if name in BY_INPUTS:
            for kind, tensor in module.whole.items():
                setattr(projection, kind, self._pointer(tensor))
            projection.weight -= self._part.spans[name][0] * module.weight[0].nbytes
            if module.scale is not None and module.scale.dim() > 1:
                projection.scale -= self._part.spans[name][0] * module.scale[0].nbytes
        return projection

    def start(self, *arguments) -> None:
        super().start(*arguments)
        self._threads = self._team

    def _checked(self, *arguments) -> int:
        if (failed := self._run(*arguments)) == 2:
            raise ValueError("another rank has ended")
        return failed


class RankGpuStep(FusedGpuStep):
    """A rank's part of a step on a GPU: the launches of one rank, with two sums per layer and the logits between."""

    def __init__(self, model: RankTransformer, temperature: float, top_k: int, dense: bool = False, drafts: int = 0):
        super().__init__(model, temperature, top_k, dense, drafts)
        from kernels.exchange import Exchanges

        # a product adds up as the whole one does
        block = TransformerBlock(model.whole_config, SparseProjection, device="meta")
        sites = [block.get_submodule(site.module) for site in SITES.values()] * len(model.layers)
        for module, whole in zip(model.sites, sites, strict=True):
            self.products[module] = self.products[module]._replace(whole=(len(whole.weight), whole.widths))

        # what o and down leave, and the lm_head, whose other tokens stay 0: logits and each group's largest
        h, tokens, group, n = self.residual.h, model.part.tokens, self.kernels.GROUP, self.logits.numel()
        self.added, (self.own, self.joined) = torch.zeros_like(h), h.new_zeros(2, n + self.top.numel())
        own_logits, own_top = self.own[:n].view_as(self.logits), self.own[n:].view_as(self.top)
        self.own_top = own_top[:, tokens.start // group : -(-tokens.stop // group)]
        self.head_out = own_logits[:, tokens], self.own_top.clone(memory_format=torch.contiguous_format)
        self.logits, self.top = self.joined[:n].view_as(self.logits), self.joined[n:].view_as(self.top)

        self.exchanges = None
        if reduction == "peer":
            room = max(h.numel(), len(self.own))
            inboxes, self._memory = peer_memory(2 * count() * room, h.device)
            self.exchanges = Exchanges(inboxes, rank(), room, 2 * model.config.n_layer + 1, self.pdl)

    def _add(self, part: Tensor, total: Tensor) -> None:
        # total += the sum of all ranks' parts; the part becomes 0
        if self.exchanges:
            self.exchanges.add(part, total)
        else:
            dist.all_reduce(part)
            total.add_(part)
            part.zero_()

    def sum_parts(self) -> None:
        self._add(self.added, self.residual.h)

    def join_logits(self) -> None:
        self.own_top.copy_(self.head_out[1])
        self._add(self.own, self.joined.zero_())
        if self.exchanges:
            self.exchanges.next_step()


def peer_memory(words: int, device: torch.device) -> tuple[Tensor, object]:
    """Where each rank's memory of so many words of 64 bits lies, zeroed, [ranks] int64; and what must be kept."""
    import torch.distributed._symmetric_memory as symmetric

    memory = symmetric.empty(words, dtype=torch.int64, device=device).zero_()
    handle = symmetric.rendezvous(memory, dist.group.WORLD)
    pointers = [handle.get_buffer(r, memory.shape, memory.dtype).data_ptr() for r in range(count())]
    torch.cuda.synchronize(device)
    dist.barrier()
    return torch.tensor(pointers, dtype=torch.int64, device=device), (memory, handle)

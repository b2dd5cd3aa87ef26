"""Fused kernels of a decode step of 1 to 8 rows, in Triton. One row takes five launches per layer, each dependent on
the one before (a product of several rows may take two, see `kernels.few_rows`):

    norm + qkv | norms of q and k + rope + cache + attention | o + residual | norm + gate, up
        | activation x up + down + residual

then the norm, the lm_head and the sampling. Products accumulate in float32 by atomics: many programs of one warp keep
the most loads in flight, and none waits for another but for a norm's rstd. Their sums lie on grids (`kernels.grids`),
so that the order of the atomics changes nothing. A buffer that a product adds to is zeroed by an earlier launch.

With PDL (programmatic dependent launch, Hopper) a launch starts while the one before it drains, and waits for its end
at `gdc_wait`. What comes before that line may use only what no earlier launch of this step writes: weights, gains,
thresholds, shifts, the position, the step's number, the cache up to it. o of one row waits for its inputs themselves:
attention writes each in one word with the step's number. It waits for the end of attention only before its own, since
launches that wait for o reuse what attention reads. Which rows to prefetch is but a guess, from sums that are still
being added to (during attention: h, with little of o's part), a norm's last rstd and o's last input. A step's first
launch is an ordinary one, so no steps overlap.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Module

from kernels import grids, plan
from kernels.heads import Heads
from kernels.packed_words import TABLE, WIDTH, four_pairs, in_order, load_words, scales, with_escapes
from kernels.triton_gemv import Norm, Product, prefetch_gate_up, rounded, snap, tagged

GROUP = 8  # tokens whose largest logit the sampling looks at
JOINED = tl.constexpr(8)  # chunks of attention that are loaded at once to be joined: as many as 512 positions have
BEYOND = tl.constexpr(2.0**23)  # half of what a grid holds, see `kernels.grids`


class Residual(NamedTuple):
    """The residual stream: h [rows, dim], float32, its grid's fineness [dim], and beyond [1], int32; None: no grid.

    beyond becomes 1 when h is found near where additions round. It is looked at after each layer, while
    attention runs; o of one row may have begun to add by then.
    """

    h: Tensor
    fineness: Tensor | None = None
    beyond: Tensor | None = None


@triton.jit
def _load_residual(h_ptr, fineness_ptr, beyond_ptr, i, N: tl.constexpr):
    """Looks at h[i] of N; returns its fineness."""
    fineness = tl.load(fineness_ptr + i, mask=i < N, other=1.0)
    h = tl.load(h_ptr + i, mask=i < N, other=0.0)
    if tl.max((tl.abs(h) * fineness > BEYOND).to(tl.int32), axis=0) > 0:
        tl.store(beyond_ptr, 1)
    return fineness


def product_of(
    module: Module, gain: Tensor | None, sparsity: float, fineness: Tensor | None, multiplier: float
) -> Product:
    """The `Product` of a `sparse_model.SparseProjection` in a step of this sparsity; 0: nothing is cut.

    gain: of the norm before it; None: it adds to the residual, whose fineness and multiplier are given.
    """
    threshold, shift, offset = module.threshold, None, None
    if sparsity and module.shift is not None:
        shift, offset = module.shift, module.offset
        threshold = torch.stack((threshold, shift.expand_as(threshold)), dim=2)  # side by side
    bias = None if "q" in module.segments else module.bias  # attention adds that
    if bias is not None:
        offset = bias.float() if offset is None else offset + bias
    if fineness is not None and gain is not None:
        fineness = grids.fineness(grids.bound_after_norm(gain, module.weight, module.scale, shift, bias))
    stored = module.weight, threshold, module.widths, sparsity, module.scale
    return Product(*stored, offset, fineness, multiplier if gain is None else 1.0)


# ---- the embedding


@triton.jit
def _embed_kernel(
    token_ptr, embedding_ptr, h_ptr, fineness_ptr, beyond_ptr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, MULTIPLIER: tl.constexpr, PDL: tl.constexpr,
):
    """h = embedding[token], float32, after a look at the step before's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    h_ptr += row * DIM
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(token_ptr + row) * DIM
    h = tl.load(embedding_ptr + start + i, mask=i < DIM, other=0.0).to(tl.float32)
    if MULTIPLIER != 1.0:
        h = rounded(h * MULTIPLIER, embedding_ptr.dtype.element_ty)
    if fineness_ptr is not None:
        h = snap(h, _load_residual(h_ptr, fineness_ptr, beyond_ptr, i, DIM))
    tl.store(h_ptr + i, h, mask=i < DIM)


def launch_embed(token: Tensor, embedding: Tensor, multiplier: float, residual: Residual, pdl: bool) -> None:
    """h = multiplier embedding[token] of each row."""
    dim = embedding.shape[1]
    _embed_kernel[(triton.cdiv(dim, 1024), len(token))](
        token, embedding, *residual, DIM=dim, BLOCK=1024,
        MULTIPLIER=torch.tensor(multiplier, dtype=embedding.dtype).item(), PDL=pdl,
    )


# ---- attention


@triton.jit
def chunk_of(position):
    """The chunk of attention of a position: 8 of 64 positions, 8 of 128, then all of 256; fixed, whatever the cache.

    Fastest with 8 key/value heads (H100): 206 positions in 4 chunks, 1,224 and 4,296 in 16, 8,192 in 32.
    """
    return min(position // 64, min(8 + (position - 512) // 128, 16 + (position - 1536) // 256))


@triton.jit
def _chunk_start(chunk):
    return 64 * (chunk + max(chunk - 8, 0) + 2 * max(chunk - 16, 0))


def chunks_in(cache_length: int) -> int:
    """How many chunks a cache has."""
    return chunk_of.fn(cache_length - 1) + 1


@triton.jit
def _if_there(ptr, offsets, mask):
    """A tuple of what lies at a pointer, float32; empty without a pointer."""
    loaded = ()
    if ptr is not None:
        loaded = (tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32),)
    return loaded


@triton.jit
def _of_qkv(x_ptr, bias, offsets, mask, DTYPE: tl.constexpr):
    """Elements of qkv with their bias, float32, rounded where the unfused model rounds."""
    x = rounded(tl.load(x_ptr + offsets, mask=mask, other=0.0), DTYPE)
    if len(bias) > 0:
        x = rounded(x + bias[0], DTYPE)
    return x


@triton.jit
def _cosines_and_sines(position, inv_freq_ptr, pair, mask, FACTOR: tl.constexpr):
    """Of the rotation of pairs of adjacent elements at a position."""
    inv_freq = tl.load(inv_freq_ptr + pair, mask=mask, other=0.0)
    angle = position.to(tl.float32) * inv_freq
    cos, sin = tl.cos(angle), tl.sin(angle)
    if FACTOR != 1.0:
        factor = tl.where(inv_freq != 0.0, FACTOR, 1.0)
        cos, sin = cos * factor, sin * factor
    return cos, sin


@triton.jit
def _rotated(x, gain, cos, sin, eps, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Queries or keys [rows, elements]: normalised if there is a gain, then each pair of elements rotated.

    Their squares add up in float64, so that a launch with another layout gets the same sum.
    """
    if len(gain) > 0:
        squares = x.to(tl.float64) * x.to(tl.float64)
        mean = tl.sum(squares, axis=1, keep_dims=True).to(tl.float32) / HEAD_DIM
        x = rounded(rounded(x * tl.rsqrt(mean + eps), DTYPE) * gain[0], DTYPE)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    turned = tl.join(tl.fma(even, cos, odd * -sin), tl.fma(odd, cos, even * sin))
    return tl.reshape(turned, x.shape).to(DTYPE)


@triton.jit
def _join_chunks(part_ptr, lse_ptr, n_chunks, heads, offsets, mask, N_HEAD: tl.constexpr, SIZE: tl.constexpr):
    """y of query `heads`: the chunks' results, SIZE elements a chunk, weighted by their log-sum-exps, in order.

    heads, offsets, mask: [heads, elements]. JOINED chunks are loaded at once, by each thread for its own elements.
    """
    zeros = tl.zeros_like(heads).to(tl.float32)
    top, total, acc = zeros - float("inf"), zeros, zeros
    for start in range(0, n_chunks, JOINED):
        lses, parts, new_top = (), (), top
        for i in tl.static_range(JOINED):
            there = mask & (tl.zeros_like(heads) + start + i < n_chunks)
            lses = lses + (tl.load(lse_ptr + (start + i) * N_HEAD + heads, mask=there, other=float("-inf")),)  # noqa: RUF005
            parts = parts + (tl.load(part_ptr + (start + i) * SIZE + offsets, mask=there, other=0.0),)  # noqa: RUF005
            new_top = tl.maximum(new_top, lses[i])

        # a chunk that is absent or empty has weight 0, also where all so far are
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        total, acc, top = total * shrink, acc * shrink, new_top
        for i in tl.static_range(JOINED):
            weight = tl.exp(lses[i] - base)
            total += weight
            acc += weight * parts[i]
    return acc / total


@triton.jit(do_not_specialize=["seq_length", "splits", "n_pieces", "qkv_stride"])
def _attention_kernel(
    # the new position's query, key and value, and the cache
    qkv_ptr, bias_ptr, q_gain_ptr, k_gain_ptr, inv_freq_ptr, k_cache_ptr, v_cache_ptr, position_ptr,
    # the chunks' results, how many of a head have arrived, and the output
    part_ptr, lse_ptr, arrived_ptr, tag_ptr, y_ptr,
    # sizes: outputs of qkv with its room, positions of the cache, its chunks, and positions of the sliding window; the
    # scores' scale, and epsilon of the norms of q and k
    qkv_stride, seq_length, splits, sliding_window, softmax_scale, eps,
    # what additional programs look at and prefetch, see `_load_residual` and `prefetch_gate_up`
    h_ptr, fineness_ptr, beyond_ptr, gain_ptr, threshold_ptr, last_rstd_ptr, weight_ptr, half_bytes, n_pieces,
    # compiled in: heads; FACTOR: see `Heads`; SHARED: all rows are one text's, in one row of the cache, see
    # `launch_cache`; AHEAD: the `Operation` of gate|up, or None: nothing is prefetched
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, FACTOR: tl.constexpr,
    SHARED: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):
    """One query over one chunk of a key/value head's cache. The head's last program to end joins the chunks' results.

    The program whose chunk holds the new position rotates and caches the new key and value, and counts them. Chunks
    beyond it take no part, so nothing depends on the cache's length, nor is anything compiled for it.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h_ptr += row * DIM
    qkv_ptr += row * qkv_stride
    part_ptr += row * splits * (N_HEAD * HEAD_DIM)
    lse_ptr += row * splits * N_HEAD
    arrived_ptr += row * N_KV
    y_ptr += row * (N_HEAD * HEAD_DIM)
    # programs beyond the chunks: first some that look at h, then those that prefetch rows of gate|up, since attention
    # leaves the memory idle
    if split >= splits:
        extra = (split - splits) * N_KV + head
        if fineness_ptr is not None:
            if extra < N_KV:
                PART: tl.constexpr = triton.next_power_of_2((DIM + N_KV - 1) // N_KV)
                if PDL:
                    tl.extra.cuda.gdc_wait()
                _load_residual(h_ptr, fineness_ptr, beyond_ptr, extra * PART + tl.arange(0, PART), DIM)
            extra -= N_KV
        if AHEAD is not None:
            if extra >= 0:
                prefetch_gate_up(
                    extra, n_pieces, h_ptr, gain_ptr, threshold_ptr, last_rstd_ptr, weight_ptr, half_bytes, AHEAD
                )
        return

    position, tag = tl.load(position_ptr + row).to(tl.int32), 0
    if tag_ptr is not None:
        tag = tl.load(tag_ptr)
    n_chunks = chunk_of(position) + 1
    if split >= n_chunks:
        return

    # tiles of positions, elements and query heads, of which the tensor cores want 16
    DTYPE: tl.constexpr = k_cache_ptr.dtype.element_ty
    HEADS_PER_KV: tl.constexpr = N_HEAD // N_KV
    BLOCK_N: tl.constexpr = 64
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    BLOCK_G: tl.constexpr = max(16, triton.next_power_of_2(HEADS_PER_KV))
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    in_d, in_g = d < HEAD_DIM, g < HEADS_PER_KV

    # queries lie in ROWS rows, and the new key in each of them. A warp has whole rows and a thread whole pairs, so
    # norms and rotations need no other warp. What they need besides qkv is loaded while the launch before makes qkv
    ROWS: tl.constexpr = max(4, triton.next_power_of_2(HEADS_PER_KV))
    r, i = tl.arange(0, ROWS)[:, None], tl.broadcast_to(d[None, :], (ROWS, BLOCK_D))
    pair = tl.broadcast_to(tl.arange(0, BLOCK_D // 2)[None, :], (ROWS, BLOCK_D // 2))
    cos, sin = _cosines_and_sines(position, inv_freq_ptr, pair, pair < HEAD_DIM // 2, FACTOR)
    q_at, q_in = (head * HEADS_PER_KV + r) * HEAD_DIM + i, (r < HEADS_PER_KV) & (i < HEAD_DIM)
    k_at, k_in = (N_HEAD + head) * HEAD_DIM + i, i < HEAD_DIM
    q_bias, q_gain = _if_there(bias_ptr, q_at, q_in), _if_there(q_gain_ptr, i, q_in)
    k_bias, k_gain = _if_there(bias_ptr, k_at, k_in), _if_there(k_gain_ptr, i, k_in)

    # this program's chunk of the cache, and its first keys and values: no launch of this step writes them (SHARED: one)
    if SHARED and PDL:
        tl.extra.cuda.gdc_wait()
    first = _chunk_start(split)
    last = tl.minimum(_chunk_start(split + 1), position)
    owner = split == n_chunks - 1
    if sliding_window is not None:
        first = tl.maximum(first, position - sliding_window + 1)
    cache = (head if SHARED else row * N_KV + head).to(tl.int64) * seq_length * HEAD_DIM
    offsets = cache + (first + n)[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
    mask = (first + n < last)[:, None] & in_d[None, :]
    k = tl.load(k_cache_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(v_cache_ptr + offsets, mask=mask, other=0.0)

    # qkv has ended: the queries of this key/value head, its new key and its new value
    if PDL:
        tl.extra.cuda.gdc_wait()
    heads = head * HEADS_PER_KV + g
    q_offsets = (heads * HEAD_DIM)[:, None] + d[None, :]
    q_mask = in_g[:, None] & in_d[None, :]
    q = _rotated(_of_qkv(qkv_ptr, q_bias, q_at, q_in, DTYPE), q_gain, cos, sin, eps, HEAD_DIM, DTYPE)
    k_new = _rotated(_of_qkv(qkv_ptr, k_bias, k_at, k_in, DTYPE), k_gain, cos, sin, eps, HEAD_DIM, DTYPE)
    v_at = (N_HEAD + N_KV + head) * HEAD_DIM + d
    v_new = _of_qkv(qkv_ptr, _if_there(bias_ptr, v_at, in_d), v_at, in_d, DTYPE).to(DTYPE)
    if owner and not SHARED:
        at = cache + position.to(tl.int64) * HEAD_DIM
        tl.store(k_cache_ptr + at + i, k_new, mask=k_in & (r == 0))
        tl.store(v_cache_ptr + at + d, v_new, mask=in_d)

    # softmax so far: the largest score, the sum of exponentials and of weighted values; the owner starts with the new
    # position's
    score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * softmax_scale
    score = tl.reshape(tl.broadcast_to(score[None, :], (BLOCK_G // ROWS, ROWS)), (BLOCK_G,))
    q = tl.reshape(tl.broadcast_to(q[None, :, :], (BLOCK_G // ROWS, ROWS, BLOCK_D)), (BLOCK_G, BLOCK_D))
    top = tl.where(owner, score, float("-inf"))
    total = tl.where(owner, 1.0, 0.0) + tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.where(owner, v_new.to(tl.float32), 0.0)[None, :] + tl.zeros((BLOCK_G, BLOCK_D), tl.float32)

    # the chunk's positions before it, BLOCK_N at a time
    for start in range(first, last, BLOCK_N):
        if start > first:
            offsets = cache + (start + n)[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
            mask = (start + n < last)[:, None] & in_d[None, :]
            k = tl.load(k_cache_ptr + offsets, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * softmax_scale
        scores = tl.where((start + n < last)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp(top - new_top)
        p = tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(DTYPE), v, input_precision="ieee")
        top = new_top

    # a chunk before the window has no keys: its log-sum-exp is -inf
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(part_ptr + split * (N_HEAD * HEAD_DIM) + q_offsets, acc, mask=q_mask)
    tl.store(lse_ptr + split * N_HEAD + heads, lse, mask=in_g)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == n_chunks - 1:
        tl.store(arrived_ptr + head, 0)
        # what the compiler takes for scattered has one element per thread, so all loads and sums have the same layout
        of_head = tl.max_contiguous(head * HEADS_PER_KV + tl.broadcast_to(r, (ROWS, BLOCK_D)), (1, 1))
        at = tl.max_contiguous(q_at, (1, 1))
        y = _join_chunks(part_ptr, lse_ptr, n_chunks, of_head, at, q_in, N_HEAD, N_HEAD * HEAD_DIM).to(DTYPE)
        if tag_ptr is not None:
            y = tagged(y, tag)
        tl.store(y_ptr + at, y, mask=q_in)


@triton.jit
def _cache_kernel(
    qkv_ptr, bias_ptr, gain_ptr, inv_freq_ptr, k_cache_ptr, v_cache_ptr, position_ptr, qkv_stride, seq_length, eps,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, HEAD_DIM: tl.constexpr, FACTOR: tl.constexpr, PDL: tl.constexpr,
):
    """Rotates and caches the new key and value of one row and one key/value head, in the cache's first row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, row = tl.program_id(0), tl.program_id(1)
    qkv_ptr += row * qkv_stride
    position = tl.load(position_ptr + row).to(tl.int32)
    DTYPE: tl.constexpr = k_cache_ptr.dtype.element_ty
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    d = tl.arange(0, BLOCK_D)[None, :]
    in_d = d < HEAD_DIM
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    cos, sin = _cosines_and_sines(position, inv_freq_ptr, pair, pair < HEAD_DIM // 2, FACTOR)
    k_at, v_at = (N_HEAD + head) * HEAD_DIM + d, (N_HEAD + N_KV + head) * HEAD_DIM + d
    k_new = _of_qkv(qkv_ptr, _if_there(bias_ptr, k_at, in_d), k_at, in_d, DTYPE)
    k_new = _rotated(k_new, _if_there(gain_ptr, d, in_d), cos, sin, eps, HEAD_DIM, DTYPE)
    v_new = _of_qkv(qkv_ptr, _if_there(bias_ptr, v_at, in_d), v_at, in_d, DTYPE)
    at = (head.to(tl.int64) * seq_length + position) * HEAD_DIM + d
    tl.store(k_cache_ptr + at, k_new, mask=in_d)
    tl.store(v_cache_ptr + at, v_new.to(DTYPE), mask=in_d)


def launch_cache(qkv: Tensor, heads: Heads, cache: Module, position: Tensor, n_head: int, pdl: bool) -> None:
    """Writes the new keys and values of rows that stand at positions of one text, before any of them attends.

    Arguments as `launch_attention`'s, but for a cache of one row.
    """
    _, n_kv, seq_length, head_dim = cache.k_cache.shape
    _cache_kernel[(n_kv, len(qkv))](
        qkv, heads.bias, heads.k_gain, heads.inv_freq, cache.k_cache, cache.v_cache, position,
        qkv.stride(0), seq_length, heads.eps,
        N_HEAD=n_head, N_KV=n_kv, HEAD_DIM=head_dim, FACTOR=heads.factor, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )


class Chunks(NamedTuple):
    """Room for attention's chunks: results [rows, splits, n_head head_dim] and log-sum-exps [rows, splits, n_head].

    Both float32. arrived: [rows, n_kv] int32, how many of a key/value head's chunks have ended, 0 between launches.
    tag: [1] int32, the step's number, which tags the joined results, see `triton_gemv.tagged`; None: it does not.
    """

    parts: Tensor
    lse: Tensor
    arrived: Tensor
    tag: Tensor | None


def new_chunks(
    rows: int, n_kv: int, n_head: int, width: int, cache_length: int, tags: bool, device: torch.device
) -> Chunks:
    """`Chunks` for a cache; width: elements of all heads. The first step is number 1: no word of zeros is its own."""
    splits = chunks_in(cache_length)
    parts, lse = (torch.zeros(rows, splits, n, device=device) for n in (width, n_head))
    arrived = torch.zeros(rows, n_kv, device=device, dtype=torch.int32)
    return Chunks(parts, lse, arrived, torch.ones(1, device=device, dtype=torch.int32) if tags else None)


def launch_attention(
    qkv: Tensor, heads: Heads, cache: Module, position: Tensor, chunks: Chunks, y: Tensor,
    residual: Residual, ahead: tuple[Norm, Product], pdl: bool, shared: bool = False,
) -> None:
    """Attention of each row's new position, cached on the way, to y [rows, n_head head_dim].

    qkv: [rows, (n_head + 2 n_kv) head_dim and room], float32.
    cache: with k_cache and v_cache, each [rows, n_kv, seq_length, head_dim].
    position: [rows], int64.
    y: in the model's dtype; tagged where `chunks` has a tag.
    residual: looked at meanwhile; what qkv was made of.
    ahead: ffn_norm and gate|up, whose rows are prefetched meanwhile, with `pdl`, where there is one row.
    shared: the rows stand at positions of one text, whose cache of one row `launch_cache` has written.
    """
    k_cache, v_cache = cache.k_cache, cache.v_cache
    ffn_norm, gate_up = ahead
    weight = gate_up.weight
    _, n_kv, seq_length, head_dim = k_cache.shape
    rows, splits, n_head = chunks.lse.shape
    shape = len(weight), sum(gate_up.segments)
    n_pieces = plan.attention_prefetch(*shape, gate_up.sparsity, gate_up.form) if pdl and rows == 1 else 0
    operation = gate_up.operation("norm", k_cache.dtype) if n_pieces else None
    n_pieces *= n_kv * seq_length <= plan.CROWDED  # one kernel for caches of all lengths
    looks = residual.fineness is not None
    _attention_kernel[(n_kv, splits + looks + triton.cdiv(n_pieces, n_kv), rows)](
        qkv, heads.bias, heads.q_gain, heads.k_gain, heads.inv_freq, k_cache, v_cache, position,
        *chunks, y,
        qkv.stride(0), seq_length, splits, heads.sliding_window, heads.softmax_scale, heads.eps,
        *residual, ffn_norm.gain, gate_up.threshold, ffn_norm.last_rstd, weight.view(torch.uint8),
        weight[0].nbytes // 2, n_pieces,
        N_HEAD=n_head, N_KV=n_kv, HEAD_DIM=head_dim, DIM=residual.h.shape[1], FACTOR=heads.factor,
        SHARED=shared, AHEAD=operation, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )


# ---- the lm_head


@triton.jit
def _head_kernel(
    x_ptr, weight_ptr, weight_scale_ptr, logits_ptr, top_ptr, n_vocab, logits_stride,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, SCALING: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):
    """Logits of BLOCK_V tokens, W x / SCALING with W [vocab, DIM], and the largest of every GROUP, for the sampling.

    The matrix unit multiplies, always by 16 rows of x, of which those beyond ROWS are 0. So a row's sums do not depend
    on how many there are.
    """
    MOST: tl.constexpr = 16
    if PACKED:
        N: tl.constexpr = BLOCK_K // 8
        GROUPS: tl.constexpr = DIM // WIDTH
        rows, local = tl.arange(0, BLOCK_V)[:, None], tl.arange(0, N)[None, :]
        in_vocab = tl.program_id(0) * BLOCK_V + rows < n_vocab
        slots_ptr = weight_scale_ptr + TABLE + tl.program_id(0) * (2 * GROUPS)
        lists_ptr = weight_scale_ptr + TABLE + tl.load(weight_scale_ptr + 3)
        up, down = scales(weight_scale_ptr, 0)
        above = tl.load(weight_scale_ptr + 7)
        packed_ptr = weight_ptr + (tl.program_id(0) * BLOCK_V + rows).to(tl.int64) * (DIM // 8 * 3)
        words = load_words(packed_ptr, local, in_vocab & (local < DIM // 8))

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.arange(0, MOST)
    acc = tl.zeros((BLOCK_V, MOST), tl.float32)
    for start in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        if PACKED:
            pairs = four_pairs(words[0], words[1], words[2], above)
            packed_ptr += N * 3
            words = load_words(packed_ptr, local, in_vocab & (local < DIM // 8 - start // 8 - N))

            # the escapes of the tile's four cells of 32 rows and 64 columns, if there are any
            slots, escapes = (), 0
            for c in tl.static_range(4):
                group = start // WIDTH + c % 2
                there = (group < GROUPS) & (tl.program_id(0) * BLOCK_V + c // 2 * 32 < n_vocab)
                slots = slots + (tl.load(slots_ptr + c // 2 * GROUPS + group, mask=there, other=0),)  # noqa: RUF005
                escapes = escapes | slots[c]
            if escapes != 0:
                for c in tl.static_range(4):
                    row_in_cell, element = rows - c // 2 * 32, local - c % 2 * 8
                    pairs = with_escapes(pairs, slots[c], lists_ptr, row_in_cell, element, up)
            weight = in_order(pairs)
        else:
            at = weight_ptr + v[:, None].to(tl.int64) * DIM + k[None, :]
            weight = tl.load(at, mask=(v < n_vocab)[:, None] & (k < DIM)[None, :], other=0)

        at = x_ptr + row[None, :] * DIM + k[:, None]
        x = tl.load(at, mask=(row < ROWS)[None, :] & (k < DIM)[:, None], other=0.0)
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="ieee")

    if PACKED:
        acc *= down
    elif weight_scale_ptr is not None:
        acc *= tl.load(weight_scale_ptr + v, mask=v < n_vocab, other=0.0)[:, None]
    if SCALING != 1.0:
        acc /= SCALING

    # the logits, and the largest of each group
    known = (v < n_vocab)[:, None] & (row < ROWS)[None, :]
    tl.store(logits_ptr + row[None, :] * logits_stride + v[:, None], acc, mask=known)
    groups = tl.reshape(tl.where(known, acc, float("-inf")), (BLOCK_V // GROUP, GROUP, MOST))
    group = tl.program_id(0) * (BLOCK_V // GROUP) + tl.arange(0, BLOCK_V // GROUP)
    n_groups = tl.cdiv(n_vocab, GROUP)
    known = (group < n_groups)[:, None] & (row < ROWS)[None, :]
    tl.store(top_ptr + row[None, :] * n_groups + group[:, None], tl.max(groups, axis=1), mask=known)


def launch_head(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, scaling: float, logits: Tensor, top: Tensor, pdl: bool
) -> None:
    """logits [rows, vocab and room] float32 = W x / scaling; top [rows, groups]: the largest of every GROUP.

    x: [rows, dim], in the model's dtype.
    weight: [vocab, dim]; weight_scale: [vocab], float32, of an int8 weight, the escapes of a packed one, else None.
    """
    # llama-3-8b, 1 to 8 rows: 344 to 351 us, int8 186 to 192 (203 in tiles of 64 tokens); the bytes take 349 and 175
    n_vocab, dim, packed = len(weight), x.shape[1], weight.dtype == torch.uint8
    block_v, stages = (32, 5) if weight.dtype == torch.int8 else (64, 1) if packed else (64, 4)
    weight = weight.view(torch.int32) if packed else weight
    _head_kernel[(triton.cdiv(n_vocab, block_v),)](
        x, weight, weight_scale, logits, top, n_vocab, logits.stride(0),
        ROWS=len(x), DIM=dim, BLOCK_V=block_v, BLOCK_K=128, GROUP=GROUP, STAGES=stages, SCALING=scaling, PACKED=packed,
        PDL=pdl, num_warps=4, launch_pdl=pdl,
    )


# ---- the sampling


@triton.jit
def _ordered(x):
    """float32 -> int32 that sorts alike."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 that `_ordered` made a key (int64) of."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(key, low, k, enough):
    """A bound that k to `enough` (if ties allow) of a tensor of int32 reach; enough = k: the k-th largest.

    At least k reach `low`. It bisects values, which finds a bound among logits in fewer steps than bisecting keys.
    """
    low, high = low.to(tl.int64), tl.max(key, axis=0).to(tl.int64) + 1
    reached = enough + 1
    while (high - low > 1) & (reached > enough):
        middle = _ordered(0.5 * _value(low) + 0.5 * _value(high - 1)).to(tl.int64)
        middle = tl.where((middle > low) & (middle < high), middle, (low + high) >> 1)
        count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), axis=0)
        reached = tl.where(count >= k, count, reached)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
    return low.to(tl.int32)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x21F0AAAD & 0xFFFFFFFF
    return x ^ (x >> 15)


@triton.jit
def random_bits(seed, position, token):
    """`decoder.random_bits`."""
    return _mixed(_mixed(_mixed(seed & 0xFFFFFFFF) + position & 0xFFFFFFFF) + token & 0xFFFFFFFF)


@triton.jit
def _sample_kernel(
    # what the lm_head left, and room for the groups that are looked at
    logits_ptr, top_ptr, groups_ptr,
    # read and moved on
    seed_ptr, position_ptr, token_ptr, tokens_ptr, tag_ptr,
    n_vocab, n_groups, logits_stride, tokens_stride, temperature, top_k,
    # compiled in; CAPACITY: groups that are looked at, of GROUP tokens
    GREEDY: tl.constexpr, BLOCK_GROUPS: tl.constexpr, GROUP: tl.constexpr, CAPACITY: tl.constexpr, PDL: tl.constexpr,
):
    """Draws a token among the top_k of a row and moves on: one program.

    The top_k largest logits lie in groups (of GROUP neighbouring tokens) whose largest is at least the top_k-th
    largest group maximum. A bound that top_k to CAPACITY groups reach is found faster than that maximum and keeps them
    all, so only their logits are looked at. The argmax of logits / temperature + Gumbel noise draws from the softmax.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    logits_ptr += row * logits_stride
    top_ptr += row * n_groups
    groups_ptr += row * CAPACITY
    tokens_ptr += row * tokens_stride
    i = tl.arange(0, BLOCK_GROUPS)
    key = _ordered(tl.load(top_ptr + i, mask=i < n_groups, other=float("-inf")))
    bound = _kth_largest(key, tl.min(key, axis=0), top_k, CAPACITY)

    # list the groups: those above the bound first, so that ties with it cannot push one out
    above, at = (key > bound).to(tl.int32), ((key == bound) & (i < n_groups)).to(tl.int32)
    slot = tl.where(above > 0, tl.cumsum(above, 0) - 1, tl.sum(above, 0) + tl.cumsum(at, 0) - 1)
    tl.store(groups_ptr + slot, i, mask=((above + at) > 0) & (slot < CAPACITY))
    n_listed = tl.minimum(tl.sum(above + at, 0), CAPACITY)
    tl.debug_barrier()

    # their tokens' logits
    j = tl.arange(0, CAPACITY * GROUP)
    listed = tl.load(groups_ptr + j // GROUP, mask=j // GROUP < n_listed, other=0)
    token = listed * GROUP + j % GROUP
    valid = (j // GROUP < n_listed) & (token < n_vocab)
    logits = tl.load(logits_ptr + token, mask=valid, other=float("-inf"))
    position = tl.load(position_ptr + row)

    # the draw
    if GREEDY:
        score = logits
    else:
        key = _ordered(logits)
        kept = key >= _kth_largest(key, bound, top_k, top_k)
        bits = random_bits(tl.load(seed_ptr + row), position + 1, token)
        noise = -tl.log(-tl.log(((bits >> 9).to(tl.float32) + 0.5) * 2.0**-23))
        score = tl.where(kept & valid, logits / temperature + noise, float("-inf"))
    best = tl.max(score, axis=0)
    token = tl.min(tl.where(valid & (score == best), token, n_vocab - 1), axis=0)

    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(tokens_ptr + position + 1, token.to(tl.int64))
    tl.store(position_ptr + row, position + 1)
    if tag_ptr is not None:
        if row == 0:
            tl.store(tag_ptr, tl.load(tag_ptr) + 1)


def launch_sample(
    logits: Tensor, top: Tensor, groups: Tensor, seed: Tensor, position: Tensor, token: Tensor, tokens: Tensor,
    tag: Tensor | None, temperature: float, top_k: int, pdl: bool,
) -> None:
    """The next token of each row from what `launch_head` left: token and tokens[:, position + 1].

    seed, position, token: [rows], int64; tokens: [rows, positions]; groups: [rows, room], int32.
    tag: [1], int32, or None. It grows by one, as every position does.
    """
    greedy, n_vocab = temperature == 0, logits.shape[1]
    _sample_kernel[(len(token),)](
        logits, top, groups,
        seed, position, token, tokens, tag,
        n_vocab, top.shape[1], logits.stride(0), tokens.stride(0), float(temperature or 1.0), 1 if greedy else top_k,
        GREEDY=greedy, BLOCK_GROUPS=triton.next_power_of_2(top.shape[1]), GROUP=GROUP, CAPACITY=groups.shape[1],
        PDL=pdl, num_warps=16, launch_pdl=pdl,
    )


# ---- the graph


def record_graph(launch: Callable[[], None], *state: Tensor) -> torch.cuda.CUDAGraph:
    """Compiles the kernels that `launch` runs and records them; the tensors `state` end as they began."""
    # what this one run does is undone, but for the cache at its positions, which the first replay writes again, and for
    # the step's number, which may not come twice: this run's words bear it
    before = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream(state[0].device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph

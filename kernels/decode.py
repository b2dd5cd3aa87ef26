"""Fused kernels of one decode step at batch 1, in Triton: five launches a layer, each dependent on the one before.

    norm + qkv | rope + cache + attention | o + residual | norm + gate, up | SiLU x up + down + residual

then norm + lm_head, and the sampling. Products accumulate in float32 by atomics: many programs of one warp keep the
most loads in flight, and none waits for another but for a norm's scale. A buffer that a product adds to is zeroed by an
earlier launch.

With PDL (programmatic dependent launch, Hopper) a launch starts while the one before it drains, and waits for its end
at `gdc_wait`. What comes before that line may use only what no earlier launch of this step writes: weights, gains,
thresholds, shifts, the position, the cache up to it. Which rows to prefetch is but a guess, from sums that are still
being added to (during attention: h without o's part), a norm's last scale and o's last input. A step's first launch is
an ordinary one, so no steps overlap.
"""

import torch
import triton
import triton.language as tl

from kernels.triton_gemv import (
    ONE,
    SCALE_BUFFER,
    SLOT_STRIDE,
    SLOTS,
    fraction,
    prefetch_gate_up,
    rounded,
    rows_ahead,
    shared_norm_scale,
)


@triton.jit
def _embed_kernel(
    token_ptr, embedding_ptr, h_ptr, slots_ptr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SCALE_BUFFER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = embedding[token], float32; zeroes the slots that the lm_head's norm uses."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(slots_ptr + tl.arange(0, SCALE_BUFFER), tl.zeros((SCALE_BUFFER,), tl.float32))
    row = tl.load(token_ptr) * DIM
    tl.store(h_ptr + i, tl.load(embedding_ptr + row + i, mask=i < DIM, other=0.0).to(tl.float32), mask=i < DIM)


@triton.jit
def _rotated(x_ptr, bias_ptr, offsets, mask, pair, cos, sin, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of qkv rotated in adjacent pairs: j needs its partner j ^ 1, at `pair`."""
    x = rounded(tl.load(x_ptr + offsets, mask=mask, other=0.0), DTYPE)
    y = rounded(tl.load(x_ptr + pair, mask=mask, other=0.0), DTYPE)
    if HAS_BIAS:
        x = rounded(x + tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32), DTYPE)
        y = rounded(y + tl.load(bias_ptr + pair, mask=mask, other=0.0).to(tl.float32), DTYPE)
    return (x * cos + y * sin).to(DTYPE)


@triton.jit
def _attention_kernel(
    qkv_ptr, bias_ptr, k_cache_ptr, v_cache_ptr, position_ptr, inv_freq_ptr, part_ptr, lse_ptr, arrived_ptr,
    y_ptr, seq_length, chunk, window, scale,
    h_ptr, gain_ptr, threshold_ptr, last_scale_ptr, weight_ptr, half_bytes, n_pieces,
    AHEAD_ROWS: tl.constexpr, AHEAD_BYTES: tl.constexpr, CUT: tl.constexpr, SHIFT: tl.constexpr, N_IN: tl.constexpr,
    SPLITS: tl.constexpr,
    N_HEAD: tl.constexpr, N_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query over one chunk of a key/value head's cache. The head's last program to end joins the chunks' results.

    The program whose chunk holds the new position rotates and caches the new key and value, and counts them. Programs
    beyond the chunks prefetch rows of gate/up, since attention leaves the memory idle.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = k_cache_ptr.dtype.element_ty
    head, split = tl.program_id(0), tl.program_id(1)
    if AHEAD_ROWS > 0:
        if split >= SPLITS:
            tl.extra.cuda.gdc_wait()  # sooner it would hold up qkv
            piece = (split - SPLITS) * N_KV + head
            if piece < n_pieces:
                prefetch_gate_up(
                    piece, h_ptr, gain_ptr, threshold_ptr, last_scale_ptr, weight_ptr, half_bytes,
                    CUT, SHIFT, N_IN, AHEAD_ROWS, AHEAD_BYTES, DTYPE,
                )  # fmt: skip
            return
    position = tl.load(position_ptr).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    n = tl.arange(0, BLOCK_N)
    in_d = d < HEAD_DIM
    angle = position.to(tl.float32) * tl.load(inv_freq_ptr + d // 2, mask=in_d, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    sin = tl.where(d % 2 == 0, -sin, sin)
    first = split * chunk
    last = tl.minimum(first + chunk, position)
    owner = (position >= first) & (position < first + chunk)
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
    cache = head.to(tl.int64) * seq_length * HEAD_DIM
    offsets = cache + (first + n)[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
    mask = (first + n < last)[:, None] & in_d[None, :]
    k = tl.load(k_cache_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(v_cache_ptr + offsets, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    q_offsets = ((head * GROUP + g) * HEAD_DIM)[:, None] + d[None, :]
    q_mask = (g < GROUP)[:, None] & in_d[None, :]
    pair = ((head * GROUP + g) * HEAD_DIM)[:, None] + (d ^ 1)[None, :]
    q = _rotated(qkv_ptr, bias_ptr, q_offsets, q_mask, pair, cos[None, :], sin[None, :], HAS_BIAS, DTYPE)
    k_start = (N_HEAD + head) * HEAD_DIM
    k_new = _rotated(qkv_ptr, bias_ptr, k_start + d, in_d, k_start + (d ^ 1), cos, sin, HAS_BIAS, DTYPE)
    v_start = (N_HEAD + N_KV + head) * HEAD_DIM
    v_new = rounded(tl.load(qkv_ptr + v_start + d, mask=in_d, other=0.0), DTYPE)
    if HAS_BIAS:
        v_new = v_new + tl.load(bias_ptr + v_start + d, mask=in_d, other=0.0).to(tl.float32)
    v_new = v_new.to(DTYPE)
    if owner:
        tl.store(k_cache_ptr + cache + position.to(tl.int64) * HEAD_DIM + d, k_new, mask=in_d)
        tl.store(v_cache_ptr + cache + position.to(tl.int64) * HEAD_DIM + d, v_new, mask=in_d)
    score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], axis=1) * scale
    top = tl.where(owner, score, float("-inf"))
    total = tl.where(owner, 1.0, 0.0) + tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.where(owner, v_new.to(tl.float32), 0.0)[None, :] + tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        if start > first:
            offsets = cache + (start + n)[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
            mask = (start + n < last)[:, None] & in_d[None, :]
            k = tl.load(k_cache_ptr + offsets, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((start + n < last)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp(top - new_top)
        p = tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(DTYPE), v, input_precision="ieee")
        top = new_top
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total)))
    if SPLITS > 1:
        tl.store(part_ptr + split * (N_HEAD * HEAD_DIM) + q_offsets, acc, mask=q_mask)
        tl.store(lse_ptr + split * N_HEAD + head * GROUP + g, lse, mask=g < GROUP)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived_ptr + head, 0)
            s = tl.arange(0, SPLITS)[None, :]
            lses = tl.load(lse_ptr + s * N_HEAD + (head * GROUP + g)[:, None], mask=(g < GROUP)[:, None], other=0.0)
            top = tl.max(lses, axis=1)
            total = tl.sum(tl.exp(lses - top[:, None]), axis=1)
            acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
            for s in tl.static_range(SPLITS):
                lse = tl.load(lse_ptr + s * N_HEAD + head * GROUP + g, mask=g < GROUP, other=0.0)
                part = tl.load(part_ptr + s * (N_HEAD * HEAD_DIM) + q_offsets, mask=q_mask, other=0.0)
                acc += tl.exp(lse - top)[:, None] * part
            tl.store(y_ptr + q_offsets, (acc / total[:, None]).to(DTYPE), mask=q_mask)
    else:
        tl.store(y_ptr + q_offsets, acc.to(DTYPE), mask=q_mask)


@triton.jit
def _head_kernel(
    h_ptr, gain_ptr, weight_ptr, weight_scale_ptr, logits_ptr, top_ptr, n_vocab, eps, one,
    DIM: tl.constexpr, NORM_BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr, STRIDE: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_V tokens, W RMSNorm(h) with W [vocab, DIM], and the largest of them, for the sampling."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = gain_ptr.dtype.element_ty
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    if PDL:
        tl.extra.cuda.gdc_wait()
    scale = shared_norm_scale(logits_ptr + n_vocab, tl.program_id(0), h_ptr, eps, DIM, NORM_BLOCK, SLOTS, STRIDE)
    acc = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    for start in tl.static_range(0, DIM, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = v[:, None].to(tl.int64) * DIM + k[None, :]
        mask = (v < n_vocab)[:, None] & (k < DIM)[None, :]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        h = tl.load(h_ptr + k, mask=k < DIM, other=0.0)
        gain = tl.load(gain_ptr + k, mask=k < DIM, other=0.0).to(tl.float32)
        x = rounded(rounded(h * scale, DTYPE) * gain, DTYPE)
        if SCALED:
            weight = fraction(weight.to(tl.int32) ^ 0x80, one, 0, 8) - 1.5  # a 256th of it
        acc += weight.to(tl.float32) * x[None, :]
    logits = tl.sum(acc, axis=1)
    if SCALED:
        logits *= 256 * tl.load(weight_scale_ptr + v, mask=v < n_vocab, other=0.0)
    tl.store(logits_ptr + v, logits, mask=v < n_vocab)
    tl.store(top_ptr + tl.program_id(0), tl.max(tl.where(v < n_vocab, logits, float("-inf")), axis=0))


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
    """A bound that from k to `enough` (if ties allow) of a tensor of int32 reach; k: the k-th largest. At least k reach
    `low`. By bisection of the values, which finds a bound among logits in fewer steps than one of the keys."""
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
def _sample_kernel(
    logits_ptr, top_ptr, groups_ptr, seed_ptr, position_ptr, token_ptr, tokens_ptr,
    n_vocab, n_groups, temperature, top_k,
    GREEDY: tl.constexpr, BLOCK_GROUPS: tl.constexpr, GROUP: tl.constexpr, CAPACITY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draws a token among the top_k and moves on: one program.

    The top_k largest logits lie in groups (of GROUP neighbouring tokens) whose largest is at least the top_k-th
    largest group maximum. A bound that top_k to CAPACITY groups reach is found faster than that maximum and keeps them
    all, so only their logits are looked at. The argmax of logits / temperature + Gumbel noise draws from the softmax.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    i = tl.arange(0, BLOCK_GROUPS)
    key = _ordered(tl.load(top_ptr + i, mask=i < n_groups, other=float("-inf")))
    bound = _kth_largest(key, tl.min(key, axis=0), top_k, CAPACITY)
    # groups above the bound first, so that ties with it cannot push one out
    above, at = (key > bound).to(tl.int32), ((key == bound) & (i < n_groups)).to(tl.int32)
    slot = tl.where(above > 0, tl.cumsum(above, 0) - 1, tl.sum(above, 0) + tl.cumsum(at, 0) - 1)
    tl.store(groups_ptr + slot, i, mask=((above + at) > 0) & (slot < CAPACITY))
    found = tl.minimum(tl.sum(above + at, 0), CAPACITY)
    tl.debug_barrier()
    j = tl.arange(0, CAPACITY * GROUP)
    chosen = tl.load(groups_ptr + j // GROUP, mask=j // GROUP < found, other=0)
    token = chosen * GROUP + j % GROUP
    valid = (j // GROUP < found) & (token < n_vocab)
    logits = tl.load(logits_ptr + token, mask=valid, other=float("-inf"))
    position = tl.load(position_ptr)
    if GREEDY:
        score = logits
    else:
        key = _ordered(logits)
        kept = key >= _kth_largest(key, bound, top_k, top_k)
        uniform = tl.rand(tl.load(seed_ptr) + position * 1000003, token)
        noise = -tl.log(-tl.log(tl.maximum(uniform, 1e-10)))
        score = tl.where(kept & valid, logits / temperature + noise, float("-inf"))
    best = tl.max(score, axis=0)
    token = tl.min(tl.where(valid & (score == best), token, n_vocab - 1), axis=0)
    tl.store(token_ptr, token.to(tl.int64))
    tl.store(tokens_ptr + position + 1, token.to(tl.int64))
    tl.store(position_ptr, position + 1)


def launch_embed(token, embedding, h, logits, pdl: bool) -> None:
    """h [dim] float32 = embedding[token]; readies `logits` for `launch_head`."""
    n_vocab, dim = embedding.shape
    _embed_kernel[(triton.cdiv(dim, 1024),)](
        token, embedding, h, logits[n_vocab:], DIM=dim, BLOCK=1024, SCALE_BUFFER=SCALE_BUFFER, PDL=pdl
    )


def attention_splits(seq_length: int, n_kv: int) -> int:
    """Into how many chunks a cache is cut: enough programs for a GPU's multiprocessors, but no chunk much under 64.

    A power of two, as the program that joins them needs it. Fastest on an H100 with 8 key/value heads: 206 positions in
    4 chunks, 1,224 and 4,296 in 16, 8,192 in 32.
    """
    most = max(1, 128 // n_kv)
    if seq_length > 384 * most:
        most *= 2
    return 1 << (min(triton.cdiv(seq_length, 64), most).bit_length() - 1)


AHEAD_ROWS, AHEAD_BYTES = 128, 2048  # what one program prefetches


def launch_attention(
    qkv, bias, k_cache, v_cache, position, inv_freq, parts, lse, arrived, y, window, pdl,
    *, h, gain, threshold, last_scale, weight, sparsity,
) -> None:  # fmt: skip
    """Attention of the new position, cached on the way, to y [n_head head_dim] in the model's dtype.

    qkv: [(n_head + 2 n_kv) head_dim] float32; bias the same or None; caches [1, n_kv, seq_length, head_dim];
    parts: [splits, n_head head_dim] and lse: [splits, n_head], float32, the chunks' results and log-sum-exps;
    arrived: [n_kv] int32, zeros before and after.
    h to sparsity: of gate/up, the same as `launch_gemv`'s; with `pdl`, rows of it are prefetched meanwhile.
    """
    _, n_kv, seq_length, head_dim = k_cache.shape
    splits, n_head = lse.shape
    group = n_head // n_kv
    half_bytes, n_pieces = weight[0].nbytes // 2, 0
    # beside 256 programs (8 key/value heads from 6,145 positions on) it makes a step 0.6 to 1.3 % longer
    if pdl and n_kv * splits <= 128 and half_bytes % 16 == 0:
        rows = rows_ahead(*weight.shape, sparsity, 8 * weight.element_size())
        n_pieces = rows // AHEAD_ROWS * 2 * triton.cdiv(half_bytes, AHEAD_BYTES)
    _attention_kernel[(n_kv, splits + triton.cdiv(n_pieces, n_kv))](
        qkv, bias, k_cache, v_cache, position, inv_freq, parts, lse, arrived, y, seq_length,
        triton.cdiv(seq_length, splits), window or 0, head_dim**-0.5,
        h, gain, threshold, last_scale, weight.view(torch.uint8), half_bytes, n_pieces,
        AHEAD_ROWS=AHEAD_ROWS if n_pieces else 0, AHEAD_BYTES=AHEAD_BYTES, CUT=sparsity > 0,
        SHIFT=threshold.dim() == 3, N_IN=weight.shape[0], SPLITS=splits,
        N_HEAD=n_head, N_KV=n_kv, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_N=64, HAS_BIAS=bias is not None,
        WINDOW=window is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


HEAD_ROWS = 8  # tokens a program of the lm_head, and a group of the sampling


def launch_head(h, gain, weight, weight_scale, logits, top, eps, pdl) -> None:
    """logits [vocab] float32 = W RMSNorm(h), with SCALE_BUFFER behind them; top: the largest of every HEAD_ROWS.

    weight: [vocab, dim]; weight_scale: [vocab], float32, of an int8 weight, else None.
    """
    n_vocab, dim = weight.shape
    _head_kernel[(top.numel(),)](
        h, gain, weight, weight_scale, logits, top, n_vocab, eps, ONE,
        DIM=dim, NORM_BLOCK=min(4096, triton.next_power_of_2(dim)), BLOCK_V=HEAD_ROWS, BLOCK_K=1024, SLOTS=SLOTS,
        STRIDE=SLOT_STRIDE, SCALED=weight_scale is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


def launch_sample(logits, top, groups, seed, position, token, tokens, temperature: float, top_k: int, pdl) -> None:
    """The next token from what `launch_head` left; writes token [1], tokens[position + 1] and position + 1."""
    greedy, n_vocab = temperature == 0, logits.numel() - SCALE_BUFFER
    _sample_kernel[(1,)](
        logits, top, groups, seed, position, token, tokens, n_vocab, top.numel(), float(temperature or 1.0),
        1 if greedy else top_k, GREEDY=greedy, BLOCK_GROUPS=triton.next_power_of_2(top.numel()), GROUP=HEAD_ROWS,
        CAPACITY=groups.numel(), PDL=pdl, num_warps=16, launch_pdl=pdl,
    )  # fmt: skip

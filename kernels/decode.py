"""Fused kernels of one decode step at batch 1, in Triton: five launches a layer, each dependent on the one before.

norm + qkv | rope + cache + attention | o + residual | norm + gate, up | SiLU x up + down + residual

The residual stream, and the sums of every product, are float32 and accumulated by atomics: many small programs keep
the most loads in flight, and none waits for another. A buffer is zeroed by a launch that runs before its next use.
With PDL (programmatic dependent launch, Hopper) a launch starts while the one before drains: what does not depend on
it (thresholds, gains, old keys and values) is loaded before `gdc_wait`.
"""

import triton
import triton.language as tl


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _inputs(
    rows, in_range, x_ptr, gain, lse_ptr, eps,
    PROLOGUE: tl.constexpr, DTYPE: tl.constexpr, N_IN: tl.constexpr, NORM_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The inputs of a tile, float32 holding values of the model's dtype, made from what the launch before left."""
    if PROLOGUE == "norm":
        squares = tl.zeros((NORM_BLOCK,), tl.float32)
        for start in tl.static_range(0, N_IN, NORM_BLOCK):
            i = start + tl.arange(0, NORM_BLOCK)
            h = tl.load(x_ptr + i, mask=i < N_IN, other=0.0)
            squares += h * h
        scale = tl.rsqrt(tl.sum(squares, axis=0) / N_IN + eps)
        h = tl.load(x_ptr + rows, mask=in_range, other=0.0)
        return _round(_round(h * scale, DTYPE) * gain, DTYPE)
    elif PROLOGUE == "silu":
        gate = _round(tl.load(x_ptr + rows, mask=in_range, other=0.0), DTYPE)
        up = _round(tl.load(x_ptr + N_IN + rows, mask=in_range, other=0.0), DTYPE)
        return _round(_round(gate * tl.sigmoid(gate), DTYPE) * up, DTYPE)
    else:  # "attention": partial results of the splits, weighted by their log-sum-exp
        if SPLITS == 1:
            return _round(tl.load(x_ptr + rows, mask=in_range, other=0.0), DTYPE)
        else:
            s = tl.arange(0, SPLITS)[:, None]
            lse = tl.load(
                lse_ptr + s * (N_IN // HEAD_DIM) + (rows // HEAD_DIM)[None, :], mask=in_range[None, :], other=0.0
            )
            y = tl.load(x_ptr + s * N_IN + rows[None, :], mask=in_range[None, :], other=0.0)
            weight = tl.exp(lse - tl.max(lse, axis=0)[None, :])
            return _round(tl.sum(weight * y, axis=0) / tl.sum(weight, axis=0), DTYPE)


@triton.jit
def _gemv_kernel(
    x_ptr, gain_ptr, lse_ptr, weight_ptr, threshold_ptr, out_ptr, zero_ptr,
    n_out, n_zero, tiles_1, tiles_2, start_1, start_2, eps,
    PROLOGUE: tl.constexpr, CUT: tl.constexpr, N_IN: tl.constexpr, NORM_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, ZERO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    tile = tl.program_id(1)
    program = tile * tl.num_programs(0) + tl.program_id(0)
    in_1, in_2 = (tile >= tiles_1).to(tl.int32), (tile >= tiles_2).to(tl.int32)
    segment = in_1 + in_2
    first = tl.where(in_2 > 0, start_2, tl.where(in_1 > 0, start_1, 0))
    last = tl.where(in_2 > 0, n_out, tl.where(in_1 > 0, start_2, start_1))
    tile -= tl.where(in_2 > 0, tiles_2, tl.where(in_1 > 0, tiles_1, 0))
    rows = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    cols = first + tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = rows < N_IN
    if CUT:
        threshold = tl.load(threshold_ptr + segment * N_IN + rows, mask=in_range, other=float("inf"))
    gain = rows
    if PROLOGUE == "norm":
        gain = tl.load(gain_ptr + rows, mask=in_range, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)
    x = _inputs(rows, in_range, x_ptr, gain, lse_ptr, eps, PROLOGUE, DTYPE, N_IN, NORM_BLOCK, SPLITS, HEAD_DIM)
    keep = in_range
    if CUT:
        keep = in_range & ~(tl.abs(x) <= threshold)
        x = tl.where(keep, x, 0.0)
    mask = keep[:, None] & (cols < last)[None, :]
    offsets = rows[:, None].to(tl.int64) * n_out + cols[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    product = tl.sum(x[:, None] * weight.to(tl.float32), axis=0)
    tl.atomic_add(out_ptr + cols, product, mask=cols < last, sem="relaxed")

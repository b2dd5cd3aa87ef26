"""The sparse product on a GPU, in Triton: one program a tile of inputs x outputs, rows masked at the load."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 inputs x 128 outputs, one warp, no loop: many small programs keep the most loads in flight on an H100, and a
# masked row costs no bytes (loops over a column strip and index lists both measured slower there).
BLOCK_IN, BLOCK_OUT, NUM_WARPS = 32, 128, 1
MAX_SEGMENTS = 3


@triton.jit
def _sparse_gemv_kernel(
    x_ptr, weight_ptr, threshold_ptr, out_ptr,  # (B, IN), (IN, OUT), (S, IN), (B, OUT) float32, zeroed
    n_in, n_out,
    tiles_1, tiles_2,  # first tile of the second and the third segment
    start_1, start_2,  # first output of the second and the third segment
    BATCH: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    in_1, in_2 = (tile >= tiles_1).to(tl.int32), (tile >= tiles_2).to(tl.int32)
    segment = in_1 + in_2
    first = tl.where(in_2 > 0, start_2, tl.where(in_1 > 0, start_1, 0))
    last = tl.where(in_2 > 0, n_out, tl.where(in_1 > 0, start_2, start_1))
    tile -= tl.where(in_2 > 0, tiles_2, tl.where(in_1 > 0, tiles_1, 0))

    rows = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    cols = first + tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = rows < n_in
    threshold = tl.load(threshold_ptr + segment * n_in + rows, mask=in_range, other=float("inf"))
    any_kept = rows < 0
    for b in tl.static_range(BATCH):
        x = tl.load(x_ptr + b * n_in + rows, mask=in_range, other=0.0).to(tl.float32)
        any_kept |= in_range & ~(tl.abs(x) <= threshold)
    mask = any_kept[:, None] & (cols < last)[None, :]
    offsets = rows[:, None].to(tl.int64) * n_out + cols[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    for b in tl.static_range(BATCH):
        x = tl.load(x_ptr + b * n_in + rows, mask=in_range, other=0.0, eviction_policy="evict_last").to(tl.float32)
        keep = in_range & ~(tl.abs(x) <= threshold)
        product = tl.where(keep[:, None], x[:, None] * weight, 0.0)
        tl.atomic_add(out_ptr + b * n_out + cols, tl.sum(product, axis=0), mask=cols < last, sem="relaxed")


def launch_sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int]) -> Tensor:
    """The launcher behind `kernels.sparse_gemv.sparse_gemv`; same arguments and result."""
    assert len(segments) <= MAX_SEGMENTS and x.is_contiguous() and weight.is_contiguous()
    batch, n_in = x.shape
    n_out = weight.shape[1]
    tiles, starts = [0], [0]  # where each segment begins, in tiles and in outputs
    for width in segments:
        tiles.append(tiles[-1] + triton.cdiv(width, BLOCK_OUT))
        starts.append(starts[-1] + width)
    assert starts[-1] == n_out
    pad = MAX_SEGMENTS - len(segments)
    tiles, starts = tiles + tiles[-1:] * pad, starts + starts[-1:] * pad
    out = torch.zeros(batch, n_out, device=x.device, dtype=torch.float32)
    _sparse_gemv_kernel[(triton.cdiv(n_in, BLOCK_IN), tiles[-1])](
        x, weight, threshold, out, n_in, n_out, tiles[1], tiles[2], starts[1], starts[2],
        BATCH=batch, BLOCK_IN=BLOCK_IN, BLOCK_OUT=BLOCK_OUT, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out.to(x.dtype)

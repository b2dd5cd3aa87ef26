"""y = W^T cut(x): the product that reads only the weight rows of kept inputs. The op and its reference.

An input is kept where not (|x_i| <= t_i), compared in float32, so NaN is kept and reaches the output as in a dense
layer. Weights are [in, out], contiguous: a cut input is one row that is never read (TEAL, arXiv 2408.14690, section 4.3
with the layout of its column-major weights).
"""

import torch
from torch import Tensor

from kernels import cpu
from kernels.quantized import dequantize, form_of


def keep_mask(x: Tensor, threshold: Tensor) -> Tensor:
    """Which inputs are kept: bool, the broadcast shape of x [..., in] and threshold [in]."""
    return ~(x.float().abs() <= threshold)


def sparse_gemv_ref(
    x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int], scale: Tensor | None = None, *_
) -> Tensor:
    """The op's meaning in plain torch, for x [..., in]; accumulates as torch's matmul does. See `sparse_gemv`."""
    weight = dequantize(weight, scale, x.dtype)
    parts = zip(threshold, weight.split(segments, dim=1), strict=True)
    return torch.cat([torch.where(keep_mask(x, t), x, 0) @ w for t, w in parts], dim=-1)


@torch.library.custom_op("teal_fast::sparse_gemv", mutates_args=(), device_types="cpu")
def sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    segments: list[int],
    scale: Tensor | None = None,
    fineness: Tensor | None = None,
) -> Tensor:
    """Product of each row of x, cut by its threshold, with the weight; rows of cut inputs are not read.

    x: [B, in], bfloat16, float16 or float32. Every row cuts its own inputs.
    weight, scale: of [in, out], contiguous, see `kernels.quantized.Form`; floating weights have the dtype of x. The
        kernels want int4's groups to be multiples of 16 that divide the segments, and int8's segments on a GPU of 4.
    threshold: [S, in], float32, a row for each output segment.
    segments: widths of the S output segments, which add up to out.
    fineness: [out], float32, of the outputs' grid, see `kernels.grids`; None: on a GPU the last bits change from run to
        run. A CPU's sums have one order.
    Returns [B, out], the dtype of x, accumulated in float32.
    """
    if not cpu.has_kernel(x.dtype, form_of(weight, scale)) or cpu.library() is None:
        return sparse_gemv_ref(x, weight, threshold, segments, scale)
    return cpu.launch_sparse_gemv(x, weight, threshold, segments, scale)


@sparse_gemv.register_fake
def _(x, weight, threshold, segments, scale=None, fineness=None):
    torch._check(x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[0])
    torch._check(threshold.shape[0] == len(segments) and threshold.shape[1] == x.shape[1])
    return x.new_empty(x.shape[0], sum(segments))


@sparse_gemv.register_kernel("cuda")
def _(x, weight, threshold, segments, scale=None, fineness=None):
    from kernels.products import launch_sparse_gemv

    return launch_sparse_gemv(x, weight, threshold, segments, scale, fineness)

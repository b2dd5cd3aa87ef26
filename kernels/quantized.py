"""The form of a quantised weight in memory: int8 with a scale an output, or int4 with a scale and a minimum a group.

int4 is packed along the outputs, and so are its groups: all that an input's row needs lies in that row, so that a cut
input skips its scales too. [in, out] stands for s * n + m, n of 0 to 15.
"""

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """[in, out / 2] uint8 of codes [in, out] (0 to 15, uint8): the even output of two in the low nibble."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a weight stands for, [in, out], computed in float32 and given in `dtype`.

    Args:
        weight: [in, out] of a floating dtype or int8, or [in, out / 2] uint8 of `pack_int4`.
        scale: None; of int8 [out], float32; of int4 [in, groups, 2], bfloat16: s and m of every group of outputs.
    """
    if scale is not None and weight.dtype == torch.uint8:
        codes = torch.stack((weight & 15, weight >> 4), dim=-1)
        s, m = scale.float().unsqueeze(-2).unbind(-1)
        weight = (codes.view(*scale.shape[:2], -1) * s + m).flatten(1)
    elif scale is not None:
        weight = weight * scale
    return weight.to(dtype)

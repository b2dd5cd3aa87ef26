"""The products of a decode step on a GPU: which kernel multiplies, by the weight's form and the number of rows of x."""

import torch
from torch import Tensor

from kernels.few_rows import Prepared
from kernels.half_mma import fits_half, launch_half
from kernels.integer_mma import launch_integers
from kernels.triton_gemv import Product, launch_gemv


def launch_product(
    prologue: str, x: Tensor, product: Product, out: Tensor, *, prepared: Prepared | None = None, **options
) -> None:
    """Adds the product of each row of x to `out`: see `kernels.triton_gemv.launch_gemv`.

    prepared: room through which 2 to 8 rows share one launch. Without it each row has programs of its own.
    """
    if fits_half(product):
        launch_half(prologue, x, product, out, prepared=prepared, **options)
    elif product.form.name != "none":
        launch_integers(prologue, x, product, out, prepared=prepared, **options)
    else:
        launch_gemv(prologue, x, product, out, **options)


def launch_sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int], scale=None, fineness=None):
    """The launcher behind `kernels.sparse_gemv.sparse_gemv`; same arguments and result."""
    out = torch.zeros(x.shape[0], sum(segments), device=x.device, dtype=torch.float32)
    product = Product(weight, threshold, segments, weight_scale=scale, fineness=fineness)
    launch_product("given", x.contiguous(), product, out, dtype=x.dtype)
    return out.to(x.dtype)

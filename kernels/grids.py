"""Grids for a GPU's sums of products: what lies on one is added exactly, so that no order of additions matters.

The programs of a product add to an output in an order that changes from run to run, and float32 additions round. So
each program first rounds its sum to a multiple of the output's spacing, a power of two. Then no addition rounds as long
as any part of the sum stays within LEVELS spacings. Beyond that it rounds, as any float32 sum does: it may then differ
from run to run, but is never wrong. Models of float32 have no grids: LEVELS are too few for their precision.
"""

import math

import torch
from torch import Tensor
from torch.nn import Module

from kernels.quantized import dequantize, form_of

LEVELS = 2.0**24  # float32 holds all multiples of a spacing up to so many
ROUNDING = 1.02  # a norm's output in 16 bits, rounded up to three times, against the exact one
PROBE_TOKENS, SPARE = 256, 16
BLOCK = 256  # inputs whose weights are dequantised at once


def fineness(bound: Tensor) -> Tensor:
    """1 / spacing, powers of two, for sums that stay within `bound`; both [out], float32."""
    bound = bound.nan_to_num(0.0).clamp(2.0**-24, 2.0**60)
    above = (bound.view(torch.int32) + 0x7FFFFF & ~0x7FFFFF).view(torch.float32)  # the next power of two, exactly
    return LEVELS / above


def bound_after_norm(
    gain: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """What no part of an RMSNorm's product with a weight exceeds, [out], float32, whatever the norm's input.

    By Cauchy-Schwarz: before the gain [in] a norm's output has a 2-norm of at most sqrt(in). Shifts [in] count twice,
    in the inputs and in the offset, of which a bias [out] is another part. Sums are taken in float64, so that a few
    columns of a weight, a rank's part, get the bounds that they have in the whole.
    """
    squares, shifted = 0.0, 0.0
    if form_of(weight, scale).name == "packed":
        weight, scale = dequantize(weight, scale, torch.bfloat16), None
    for i in range(0, len(weight), BLOCK):
        rows = slice(i, i + BLOCK)
        part = dequantize(weight[rows], scale[rows] if scale is not None and scale.dim() > 1 else scale, torch.float32)
        squares += (part * gain[rows, None].float()).double().square().sum(0)
        if shift is not None:
            shifted += shift[rows].abs().double() @ part.abs().double()
    bound = math.sqrt(len(weight)) * squares.sqrt() + 2 * shifted + (0 if bias is None else bias.abs())
    return (ROUNDING * bound).float()


def _probed(model: Module) -> list:
    """The layers of a dense pass over random tokens, all of which have run."""
    length = min(PROBE_TOKENS, model.config.block_size)  # learned positions end there
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    layers = list(model.walk([tokens]))
    assert layers[-1].outputs
    return layers


@torch.no_grad()
def residual_bound(model: Module) -> Tensor:
    """What each channel of the residual stream is taken to stay within, [dim], float32; computed once per Transformer.

    SPARE times the largest between layers in a dense pass over random tokens, but for position 0, where some channels
    are a thousand times as large, and which is never decoded. And no less than the embedding's largest.
    """
    if not hasattr(model, "residual_bound"):
        layers = _probed(model)
        states = [*(layer.inputs[0] for layer in layers), layers[-1].outputs[0]]
        peak = torch.stack([state[0, 1:].abs().amax(0).float() for state in states]).amax(0)
        largest = torch.linalg.vector_norm(model.tok_embeddings.weight, math.inf, dim=0)
        largest = largest * torch.full_like(largest, model.config.embedding_multiplier)  # as it rounds its own
        bound = torch.maximum(SPARE * peak, largest.float())
        model.register_buffer("residual_bound", bound, persistent=False)
    return model.residual_bound


@torch.no_grad()
def set_site_grids(model: Module) -> None:
    """Gives each site of a SparseTransformer a grid for the unfused product, `fineness` [out], float32.

    Its outputs are taken to stay within SPARE times the largest in a dense pass, as the residual stream is.
    """
    peaks: list[Tensor] = []

    def keep_peak(_module, _inputs, y: Tensor) -> None:
        peaks.append(y[0, 1:].abs().amax(0).float())

    hooks = [module.register_forward_hook(keep_peak) for module in model.sites]
    _probed(model)
    for module, hook, peak in zip(model.sites, hooks, peaks, strict=True):
        hook.remove()
        module.fineness = fineness(SPARE * peak)

"""The form of a weight in memory: floating, packed bfloat16, int8 with a scale per output, or int4 with a scale and a
minimum per group.

int4 is packed along the outputs, and its groups lie along them too. So a row holds all that its input needs, and a cut
input skips its scales as well. So does a row of packed bfloat16, see `kernels.packed`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module

from kernels import packed

SHORT = 256  # rows of x at most whose `product` widens integers in registers; with 512 dequantising takes less time
_STORED_AS = {"int8": torch.int8, "int4": torch.uint8, "packed": torch.uint8}


class Form(NamedTuple):
    """How a weight [in, out] is stored.

    | name | weight | scale |
    |---|---|---|
    | "none" | [in, out], a floating `dtype` | None |
    | "int8" | [in, out], int8 | [out], float32 |
    | "int4" | [in, out / 2], uint8, see `pack_int4` | [in, out / groupsize, 2], bfloat16: s and m of each group |
    | "packed" | [in, 3 out / 2], uint8, see `packed.pack` | [any], int32: `packed.escape_table` |

    An int4 code n of 0 to 15 stands for s * n + m. `name` is ModelArgs.quant; groupsize, of outputs that stay together,
    is 0 but for int4 and packed weights.
    """

    name: str
    dtype: torch.dtype
    groupsize: int = 0

    @classmethod
    def named(cls, name: str, dtype: torch.dtype | None, groupsize: int) -> "Form":
        """The form that ModelArgs.quant and .groupsize name; `dtype`: the model's own, None for torch's default."""
        if name == "packed" and dtype not in (None, torch.bfloat16):
            raise ValueError(f"packed weights are bfloat16: choose --precision bfloat16, not {str(dtype)[6:]}")
        groupsize = {"int4": groupsize, "packed": packed.GROUP}.get(name, 0)
        return cls(name, _STORED_AS.get(name) or dtype or torch.get_default_dtype(), groupsize)

    @property
    def bits(self) -> int:
        """Of one weight."""
        return {"int4": 4, "packed": 12}.get(self.name) or 8 * self.dtype.itemsize

    def row_bytes(self, n_out: int) -> int:
        """Bytes of one input's weights, with the scales that are its own in int4."""
        return n_out * self.bits // 8 + (4 * n_out // self.groupsize if self.name == "int4" else 0)

    def empty(
        self, n_in: int, segments: dict[str, int], device=None, out_first: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """A new weight [in, out] of this form and its scale, not filled; out_first: both `transposed`.

        segments: name and width of each projection fused along the outputs.
        Raises ValueError: groups of int4, or of packed weights, that do not divide a segment.
        """
        if self.name == "packed" and "output" in segments:  # a row of the lm_head is an output
            n_in, segments, out_first = segments["output"], {"output": n_in}, False
        for name, width in segments.items():
            if self.name == "packed" and width % packed.GROUP:
                raise ValueError(f"{name} cannot be packed: its rows of {width} are no multiple of {packed.GROUP}")
            if self.name == "int4" and (self.groupsize < 16 or self.groupsize % 16 or width % self.groupsize):
                raise ValueError(
                    f"group size {self.groupsize}: int4 needs a multiple of 16 that divides {name}'s {width} outputs"
                )
        n_out, scale = sum(segments.values()), None
        weight = torch.empty(n_in, n_out * self.bits // (8 * self.dtype.itemsize), device="meta", dtype=self.dtype)
        if self.name == "int8":
            scale = torch.empty(n_out, device="meta", dtype=torch.float32)
        elif self.name == "int4":
            scale = torch.empty(n_in, n_out // self.groupsize, 2, device="meta", dtype=torch.bfloat16)
        elif self.name == "packed":
            scale = torch.empty(0, device="meta", dtype=torch.int32)
        shapes = transposed(weight, scale) if out_first else (weight, scale)
        return tuple(t if t is None else torch.empty(t.shape, device=device, dtype=t.dtype) for t in shapes)


def form_of(weight: Tensor, scale: Tensor | None) -> Form:
    """The form of a weight [in, out] and its scale, for callers that see nothing but these tensors."""
    if weight.dtype == torch.uint8 and scale.dtype == torch.int32:
        return Form("packed", weight.dtype, packed.GROUP)
    if weight.dtype == torch.uint8:
        return Form("int4", weight.dtype, 2 * weight.shape[1] // scale.shape[1])
    return Form("none" if scale is None else "int8", weight.dtype)


def transposed(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Views of a weight and its scale with inputs and outputs swapped: [in, out] <-> [out, in]."""
    per_input = scale is not None and scale.dim() > 1  # int4's; one scale per output has nothing to swap
    return weight.t(), scale.transpose(0, 1) if per_input else scale


def _packed_rows(module: Module) -> tuple[Tensor, list[int]]:
    """A module's packed weight by rows, and the widths of their segments: of the lm_head a row is an output."""
    if "output" in module.segments:
        return module.weight, [module.weight.shape[1] * 2 // 3]
    return module.weight.t() if isinstance(module, Linear) else module.weight, list(module.segments.values())


def table_on_load(module: Module, state_dict: dict, prefix: str, *_) -> None:
    """A load_state_dict pre-hook: makes the escape table of packed weights; ValueError: they or it are damaged."""
    key, weight = f"{prefix}scale", f"{prefix}weight"
    if weight in state_dict and key in state_dict and state_dict[key].dtype == torch.int64:
        stored, listed = (state_dict[name].to(module.weight.device) for name in (weight, key))
        rows, widths = _packed_rows(module)
        state_dict[weight] = stored
        try:
            if not torch.equal(packed.with_checksum(stored, listed[1:]), listed):
                raise ValueError("the packed weights or their escapes are damaged, or an older version wrote them")
            state_dict[key] = packed.escape_table(listed[1:], len(rows), widths)
        except ValueError as error:
            raise ValueError(f"{weight}: {error}; make them again: python quantize.py --mode packed") from None
    if key in state_dict and state_dict[key].dtype == torch.int32:
        module.scale = torch.empty_like(state_dict[key], device=module.weight.device)


def dense_weight(module: Module, dtype: torch.dtype) -> Tensor:
    """What a module's weight stands for, [out, in]; it is stored `transposed`, unless it is a packed lm_head."""
    if module.scale.dtype == torch.int32 and "output" in module.segments:
        return dequantize(module.weight, module.scale, dtype)
    return dequantize(*transposed(module.weight, module.scale), dtype).t()


def fill_module(module: Module, std: float, generator: torch.Generator) -> None:
    """`fill_random` of a module's weight and scale; packed weights are those of a normal distribution."""
    weight, scale = module.weight, getattr(module, "scale", None)
    if scale is None or scale.dtype != torch.int32:
        return fill_random(weight, scale, std, generator)
    rows, widths = _packed_rows(module)
    random = torch.empty(len(rows), sum(widths), device=weight.device, dtype=torch.bfloat16)
    random.normal_(0.0, std, generator=generator)
    parts, escapes = zip(*map(packed.pack, random.split(widths, dim=1)), strict=True)
    rows.copy_(torch.cat(parts, dim=1))
    module.scale = packed.escape_table(torch.cat(escapes), len(rows), widths)


def fill_random(weight: Tensor, scale: Tensor | None, std: float, generator: torch.Generator) -> None:
    """Fills a weight of another form, `transposed` or not. What it stands for has about mean 0 and deviation `std`."""
    if scale is None:
        weight.normal_(0.0, std, generator=generator)
    elif weight.dtype == torch.uint8:
        weight.random_(0, 256, generator=generator)
        scale.copy_(torch.tensor([std / 4.61, -7.5 * std / 4.61]))  # 4.61: the deviation of 0 to 15
    else:
        weight.random_(-127, 128, generator=generator)
        scale.fill_(std / 73.3)  # the deviation of -127 to 127


def pack_int4(codes: Tensor) -> Tensor:
    """[in, out / 2] uint8 of codes [in, out] (0 to 15, uint8): the even output of two in the low nibble."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a weight and its scale stand for (see `Form`), [in, out], computed in float32 and given in `dtype`."""
    form, compiling = form_of(weight, scale), torch.compiler.is_compiling()
    if form.name == "packed":
        return (unpack if compiling else _unpack)(weight, scale).to(dtype)
    if scale is not None and weight.is_cuda and not compiling:  # Inductor fuses what follows
        from kernels.triton_dequantize import launch_dequantize

        return launch_dequantize(weight, scale, dtype)

    if form.name == "int4":
        codes = torch.stack((weight & 15, weight >> 4), dim=-1)
        s, m = scale.float().unsqueeze(-2).unbind(-1)
        weight = (codes.view(*scale.shape[:2], -1) * s + m).flatten(1)
    elif form.name == "int8":
        weight = weight * scale
    return weight.to(dtype)


def _unpack(weight: Tensor, table: Tensor) -> Tensor:
    """`packed.unpack`, by a kernel where there is one."""
    if weight.is_cuda:
        from kernels.triton_dequantize import launch_unpack

        return launch_unpack(weight, table)
    from kernels import cpu

    return packed.unpack(weight, table) if cpu.library() is None else cpu.unpack(weight, table)


unpack = torch.library.custom_op("teal_fast::unpack", _unpack, mutates_args=())


@unpack.register_fake
def _(weight: Tensor, table: Tensor) -> Tensor:
    return weight.new_empty(len(weight), weight.shape[1] * 2 // 3, dtype=torch.bfloat16)


def product(x: Tensor, site) -> Tensor:
    """x [..., in] times what the contiguous weight [in, out] of a site and its scale stand for, [..., out], as x."""
    weight, scale = site.weight, site.scale
    integers = form_of(weight, scale).name in ("int8", "int4")
    if not integers or not x.is_cuda or x.dtype == torch.float32 or x.requires_grad:
        return x @ dequantize(weight, scale, x.dtype)
    # torch.compile needs an operation; an eager pass does without its dispatch
    return (quantized_product if torch.compiler.is_compiling() else _quantized_product)(x, weight, scale)


def _quantized_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """On a GPU: up to SHORT rows of x take a kernel that reads integers alone, more take torch, after dequantising."""
    if 0 < x.numel() <= SHORT * x.shape[-1]:
        from kernels.triton_dequantize import launch_product

        return launch_product(x, weight, scale)
    return x @ dequantize(weight, scale, x.dtype)


quantized_product = torch.library.custom_op(
    "teal_fast::quantized_product", _quantized_product, mutates_args=(), device_types="cuda"
)


@quantized_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1))

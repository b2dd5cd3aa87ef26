"""A checkpoint with packed bfloat16 weights, exactly, or with int8 or int4 ones, rounded by GPTQ (arXiv 2210.17323).

python quantize.py --mode packed                                        # the same tokens from 3/4 of the bytes
python quantize.py --mode int8                                          # the default model, on text that it writes
python quantize.py --mode int4 --data c4.jsonl --groupsize 32           # rounded for the inputs of your text
python quantize.py --checkpoint_path DIR --mode int8 --output_dir OUT   # default OUT: DIR-int8
python quantize.py --mode int8 --num_tokens 0                           # each weight to the nearest, no text

packed: bfloat16 in 12 bits, to the bit (`kernels.packed`): a run equals that of the plain checkpoint. Weights of
float16 or float32 become bfloat16 first, as in a run with --precision bfloat16. Everything beside it goes along.

generate.py, eval.py, calibrate.py and greedy.py take the result as any other checkpoint. int8 is symmetric with one
scale per output, applied once to its sum. int4 is s * n + m, with s and m (bfloat16) for every group of an input's
outputs. For a cut input neither its weights nor its s and m are read. q, k, v and lm_head are int8 in both modes. The
embedding and the norms keep their dtype; a tied lm_head becomes a tensor of its own. Cut tables are copied, for int8
statistics, too. An int4 model's own tables give 0.2 to 0.6 % less perplexity at 40 % and more (SmolLM2-135M).

Weights are rounded input by input, from those in --precision. Those not yet rounded make up for the error that this
makes in the outputs on the text. Memory: the model, the text's hidden states, eight float32 matrices [in, in] for one
layer, lm_head twice in float32, and the rounded weights in the host's. A run that ends early leaves nothing.
"""

import options

if __name__ == "__main__":
    options.run_script("quantize")

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import thresholds
from calibrate import calibration_tokens
from cli import placement
from formats.checkpoint import Source, convert, copy_files, fingerprint, load_weights, write_weights
from formats.default_model import resolve_checkpoint
from formats.files import lock, read_json, write_json
from formats.text import WINDOW
from kernels.packed import pack, with_checksum
from kernels.quantized import pack_int4
from model import read_config
from sparse_model import SITES, SparseTransformer
from thresholds import SCRIPTS, STATISTICS_NAME, CutTable, Statistics, find_table, load_statistics, table_name

QUANTIZED = {f"{name}.weight" for name in ("wq", "wk", "wv", "wqkv", "wo", "w1", "w3", "w13", "w2", "output")}
DAMPING, BLOCK = 0.01, 128  # of GPTQ: share of the mean diagonal that is added to it; inputs before the rest is updated
SPANS = (0.8, 1.0, 5)  # of a group's range, from which int4's least squares start: first, last, how many


def int8_scale(weight: Tensor) -> Tensor:
    """Scales [out] of a weight [in, out], by which the largest of an output's weights is 127."""
    peak = weight.abs().amax(dim=0)
    return torch.where(peak > 0, peak / 127, 1.0)


def round_int8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What weights [..., out], float32, become, and their codes: int8, -127 to 127."""
    codes = (weight / scale).round_().clamp_(-127, 127)
    return codes * scale, codes.to(torch.int8)


def round_int4(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [..., out], float32, rounded; their codes, uint8, 0 to 15; scale [..., out / groupsize, 2], bfloat16."""
    # of each group s and m are those of least squared error among fits that start from `SPANS` of its range
    group = weight.unflatten(-1, (-1, groupsize))
    low, high = group.aminmax(dim=-1, keepdim=True)
    spans = torch.linspace(*SPANS, device=weight.device).view(-1, *[1] * group.dim())
    s = (high - low) * (spans / 15)
    codes = _codes(group, s, (low + high) / 2 - 7.5 * s)
    centered = codes - codes.mean(-1, keepdim=True)
    s = (centered * group).sum(-1, keepdim=True) / centered.square().sum(-1, keepdim=True).clamp_min(1e-9)
    s = s.bfloat16().float()
    m = (group - s * codes).mean(-1, keepdim=True).bfloat16().float()
    codes = _codes(group, s, m)
    best = (s * codes + m - group).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    s, m, codes = (torch.take_along_dim(found, best, 0)[0] for found in (s, m, codes))
    value, scale = s * codes + m, torch.cat((s, m), -1)
    return value.flatten(-2), codes.flatten(-2).to(torch.uint8), scale.bfloat16()


def _codes(group: Tensor, s: Tensor, m: Tensor) -> Tensor:
    return ((group - m) / torch.where(s == 0, 1.0, s)).round_().clamp_(0, 15)


def round_block(rows: Tensor, factors: Tensor, rounding: Callable, form: Tensor | int) -> list[Tensor]:
    """Rounds a block's rows [n, out], the first first, each of which changes those below it; factors: [n, n].

    Returns what they miss over their factors [n, out], and what is stored of them, each [n, ...].
    """
    errors, stored = torch.empty_like(rows), []
    for i, (row, factor) in enumerate(zip(rows, factors, strict=True)):
        value, *codes = rounding(row, form)
        stored.append(codes)
        errors[i] = (row - value) / factor[i]
        rows[i + 1 :].addr_(factor[i + 1 :], errors[i], alpha=-1)
    return [errors, *map(torch.stack, zip(*stored, strict=True))]


@lru_cache
def block_graph(shape: tuple[int, int], rounding: Callable, groupsize: int, device: torch.device) -> tuple:
    """`round_block` recorded for blocks of this shape: the graph, what it reads (rows, factors, scale), its results."""
    # in int4 a row is some 60 launches of 2 us, which cost the host 10 us each: 19 s per layer of llama-3-8b
    from kernels.fused_step import record_graph

    rows, factors, scale = (torch.ones(size, device=device) for size in (shape, (shape[0],) * 2, shape[1:]))
    results = []

    def launch() -> None:
        results[:] = round_block(rows, factors, rounding, groupsize or scale)

    return record_graph(launch, rows), (rows, factors, scale), results


def round_on_gpu(rows: Tensor, factors: Tensor, rounding: Callable, form: Tensor | int) -> list[Tensor]:
    """`round_block` by its graph; leaves the rows as they are."""
    groupsize = form if isinstance(form, int) else 0
    graph, held, results = block_graph(tuple(rows.shape), rounding, groupsize, rows.device)
    for tensor, value in zip(held, (rows, factors, *(() if groupsize else (form,))), strict=False):
        tensor.copy_(value)
    graph.replay()
    return [tensor.clone() for tensor in results]


def gptq(weight: Tensor, hessian: Tensor, rounding: Callable, form: Tensor | int) -> list[Tensor]:
    """Rounds a weight's rows by falling diagonal; those that follow make up for each row's error, by least squares.

    weight: [in, out], float32; hessian: [in, in], float32, the sum of x x^T over inputs x (zeros: every row is rounded
    alone), is changed; rounding: of a row [out] and `form`, `round_int8` and its scale or `round_int4` and a groupsize.

    Returns what is stored, each [in, ...].
    """
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1
    order = diagonal.argsort(descending=True)
    weight = weight[order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)

    stored, round_rows = [], round_on_gpu if weight.is_cuda else round_block
    for first, rows, factors in zip(range(0, len(weight), BLOCK), weight.split(BLOCK), upper.split(BLOCK), strict=True):
        end = first + len(rows)
        errors, *codes = round_rows(rows, factors[:, first:end], rounding, form)
        stored.append(codes)
        weight[end:].addmm_(factors[:, end:].t(), errors, alpha=-1)
    back = order.argsort()
    return [torch.cat(part)[back] for part in zip(*stored, strict=True)]


def quantize_weight(name: str, weight: Tensor, hessian: Tensor, mode: str, groupsize: int) -> dict[str, Tensor]:
    """A projection's tensors for the checkpoint, of its weight [in, out] and gptq's hessian; ValueError: not finite."""
    weight = weight.float()
    if not weight.isfinite().all():
        raise ValueError(f"{name} cannot be quantised, it has weights that are not finite")
    if not hessian.isfinite().all():
        raise ValueError(f"the inputs of {name} are not finite; choose another --precision")
    if mode == "int8":
        scale = int8_scale(weight)
        (codes,) = gptq(weight, hessian, round_int8, scale)
    else:
        codes, scale = gptq(weight, hessian, round_int4, groupsize)
        codes, scale = pack_int4(codes), scale.transpose(0, 1)
    return {f"{name}.weight": codes.t().contiguous().cpu(), f"{name}.scale": scale.contiguous().cpu()}


def add_moments(hessian: Tensor, module, args: tuple[Tensor]) -> None:
    """A module's hook: adds the second moments of its input [B, T, in] to hessian [in, in], float32."""
    x = args[0].flatten(0, -2).float()
    hessian.addmm_(x.t(), x)


@torch.no_grad()
def quantize_model(model: SparseTransformer, windows: Tensor, mode: str, groupsize: int) -> dict[str, Tensor]:
    """Quantised tensors by name, for inputs that windows [N, T] (int64) give densely. Raises as `quantize_weight`."""
    batches = windows.split(max(1, WINDOW // windows.shape[1])) if len(windows) else ()
    sensitive = replace(model.config, quant=mode).sensitive_quant
    tensors, zeros = {}, partial(torch.zeros, device=model.device)

    for layer in tqdm(model.walk(batches), total=model.config.n_layer, desc="quantising", unit="layer"):
        # the second moments of each site's inputs
        modules = {site: layer.block.get_submodule(place.module) for site, place in SITES.items()}
        hessians = {site: zeros(len(m.weight), len(m.weight)) for site, m in modules.items()}
        with ExitStack() as hooks:
            for site, module in modules.items():
                hooks.enter_context(module.register_forward_pre_hook(partial(add_moments, hessians[site])))
            states = layer.outputs

        # round with them
        for site, module in modules.items():
            form = sensitive if site == "qkv" else mode
            name = f"layers.{layer.index}.{SITES[site].module}"
            tensors |= quantize_weight(name, module.weight, hessians[site], form, groupsize)

    # lm_head
    hessian = zeros(model.config.dim, model.config.dim)
    for x in states:
        add_moments(hessian, None, (model.norm(x),))
    return tensors | quantize_weight("output", model.output_weight.t(), hessian, sensitive, groupsize)


@torch.no_grad()
def pack_model(model: SparseTransformer) -> dict[str, Tensor]:
    """Packed tensors of a model's projections and lm_head by name."""
    names = [f"layers.{i}.{site.module}" for i in range(model.config.n_layer) for site in SITES.values()]
    tensors = {}
    for name, module in tqdm([*zip(names, model.sites, strict=True), ("output", None)], desc="packing", unit="matrix"):
        segments = module.weight.split(module.widths, dim=1) if module else [model.output_weight]
        parts, listed = zip(*map(pack, segments), strict=True)
        rows = torch.cat(parts, dim=1)  # of the lm_head they are outputs
        stored = (rows.t() if module else rows).contiguous().cpu()
        tensors |= {f"{name}.weight": stored, f"{name}.scale": with_checksum(stored, torch.cat(listed).cpu())}
    n = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("weight")) * 2 // 3
    print(f"{8 * sum(tensor.nbytes for tensor in tensors.values()) / n:.3f} bits per weight")
    return tensors


def taken_along(folder: Path, mode: str) -> dict[str, Statistics | CutTable]:
    """Statistics (not of int4) and cut tables of the checkpoint in `folder`, by file name; says what stays behind."""
    path = folder / STATISTICS_NAME
    thresholds.warn_of_old_files(folder)
    readers: dict[str, Callable] = {table_name(rule): partial(find_table, rule, folder) for rule in SCRIPTS}
    readers |= {STATISTICS_NAME: partial(load_statistics, path, folder)} if path.is_file() else {}
    artifacts = {}
    for name, read in readers.items():
        try:
            artifacts |= {name: artifact} if (artifact := read()) else {}
        except ValueError as error:
            print(f"{name} stays behind: {error}", file=sys.stderr)
    if mode == "int4" and artifacts.pop(STATISTICS_NAME, None):
        print(f"{STATISTICS_NAME} stays behind: int4 needs its own; make it with calibrate.py", file=sys.stderr)
    return artifacts


def main(argv: list[str] | None = None) -> Path:
    """Quantises a checkpoint and returns the new one's folder. Raises ValueError for a user's mistake."""
    o = options.quantize(argv)
    folder = resolve_checkpoint(o.checkpoint_path)
    config = read_config(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json to go with the new weights; convert_hf_checkpoint.py writes one")
    if config.quant != "none":
        raise ValueError(f"{folder} is quantised already; give the checkpoint that it was made from")
    SparseTransformer(replace(config, quant=o.mode, groupsize=o.groupsize), device="meta")  # says if rows do not fit
    output = o.output_dir or folder.with_name(f"{folder.name}-{o.mode}")
    artifacts, exact = taken_along(folder, o.mode), o.mode == "packed"

    def write(folder: Path, part: Path) -> None:
        model = SparseTransformer.from_checkpoint(folder, *placement(o))
        windows, text = torch.zeros(0, 1, dtype=torch.int64), "none, exact" if exact else "none, to nearest"
        if o.num_tokens and not exact:
            windows, text = calibration_tokens(folder, model, o.data, o.num_tokens, o.seed)
        quantized = pack_model(model) if exact else quantize_model(model, windows, o.mode, o.groupsize)

        # what is not quantised stays as it is
        weights = {n: w for n, w in load_weights(folder).items() if ".".join(n.split(".")[-2:]) not in QUANTIZED}
        copy_files(folder, part)
        made = {"mode": o.mode, "text": text, "tokens": windows.numel()}
        made |= {"groupsize": o.groupsize} if o.mode == "int4" else {}
        write_json(part / "config.json", {**read_json(folder / "config.json"), "quantization": made})
        tensors = (weights | quantized).items()
        write_weights(part, {n: Source(tuple(w.shape), w.dtype, lambda w=w: w) for n, w in tensors})

        # the artifacts belong to the new checkpoint; a table's quality was that of the original's weights
        own = fingerprint(part)
        for name, artifact in artifacts.items():
            if not exact:
                artifact.metadata.pop("quality", None)
            if "fingerprint" in artifact.metadata:
                artifact.metadata["fingerprint"] = own
            artifact.save(part / name)

    with lock(output):
        convert(write, folder, output)
    print(f"{output}: use it as --checkpoint_path" + (f" (with it: {', '.join(artifacts)})" if artifacts else ""))
    return output

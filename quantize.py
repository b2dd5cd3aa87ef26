"""A checkpoint with int8 weights: projections and lm_head symmetric, rounded to nearest, one scale an output.

python quantize.py --mode int8                                          # the default model
python quantize.py --checkpoint_path DIR --mode int8 --output_dir OUT   # default OUT: DIR-int8

generate.py, eval.py, calibrate.py and greedy.py take the result as any other checkpoint. An input's row is a row of the
[in, out] weight as before, so a cut input skips its bytes; the scale is the output's, applied once to its sum. The
embedding and the norms keep their dtype; a tied lm_head becomes an int8 tensor of its own.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from convert_hf_checkpoint import (
    COPIED_FILES,
    Source,
    check_absent,
    command_line,
    convert,
    lock,
    resolve_checkpoint,
    write_json,
    write_weights,
)
from model import load_weights, read_config, read_json

QUANTIZED = {f"{name}.weight" for name in ("wq", "wk", "wv", "wqkv", "wo", "w1", "w3", "w13", "w2", "output")}


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [out, in], scale [out] float32) of a weight [out, in]; weight is about int8 * scale[:, None].

    Raises:
        ValueError: the weight is not finite.
    """
    weight = weight.float()
    peak = weight.abs().amax(dim=1)
    if not peak.isfinite().all():
        raise ValueError("it has weights that are not finite")
    scale = torch.where(peak > 0, peak / 127, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def quantize_checkpoint(folder: Path, partial: Path) -> None:
    """Writes the int8 checkpoint of `folder` into `partial`, one tensor in memory at a time."""
    config = read_json(folder / "config.json")
    weights = load_weights(folder)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    tensors = {}
    for name, weight in weights.items():
        shape = tuple(weight.shape)
        if ".".join(name.split(".")[-2:]) not in QUANTIZED:
            tensors[name] = Source(shape, weight.dtype, lambda w=weight: w)
            continue

        def part(i: int, name: str = name, weight: Tensor = weight) -> Tensor:
            try:
                return quantize_int8(weight)[i]
            except ValueError as error:
                raise ValueError(f"{folder}: {name} cannot be quantised, {error}") from None

        tensors[name] = Source(shape, torch.int8, lambda part=part: part(0))
        tensors[name.removesuffix("weight") + "scale"] = Source(shape[:1], torch.float32, lambda part=part: part(1))
    for name in COPIED_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial / name)
    write_json(partial / "config.json", {**config, "quantization": {"mode": "int8"}})
    write_weights(partial, tensors)


def main(checkpoint_path: str | None, mode: str, output_dir: str | None) -> Path:
    """Quantises a checkpoint and returns the new one's folder.

    Raises:
        ValueError: the checkpoint is quantised already or cannot be read, or the output is there.
    """
    folder = resolve_checkpoint(checkpoint_path)
    if read_config(folder).quant != "none":
        raise ValueError(f"{folder} is quantised already; give the checkpoint that it was made from")
    output = Path(output_dir) if output_dir else folder.with_name(f"{folder.name}-{mode}")
    with lock(output):
        check_absent(output)
        convert(quantize_checkpoint, folder, output)
    print(f"{output}: use it as --checkpoint_path")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", help="a checkpoint's folder or a file in it; default: the default model")
    parser.add_argument("--mode", choices=["int8"], required=True)
    parser.add_argument("--output_dir", help="default: the checkpoint's folder with -int8 behind its name")
    command_line(main, parser.parse_args())

"""Convert a checkpoint to this repository's layout, tensor by tensor (memory stays near the largest tensor).

    python convert_hf_checkpoint.py --repo_id meta-llama/Llama-2-7b-hf    # from the hub, through its own cache
    python convert_hf_checkpoint.py --checkpoint_dir path/to/folder       # config.json, safetensors or .bin, tokenizer
    python convert_hf_checkpoint.py --gguf model.gguf --output_dir checkpoints/my-model

The output folder (default: checkpoints/<org>/<name> beside this script) holds model.safetensors (shards of 5 GB above
10 GB) with GPT-Fast's tensor names in the source's dtype, config.json in Hugging Face form and the tokenizer's files.
It is built as <output>.partial and renamed at the end: a folder of its final name is complete.
"""

import options

if __name__ == "__main__":
    options.run_script("convert_hf_checkpoint")

from functools import partial
from pathlib import Path

from formats.checkpoint import CHECKPOINTS, Shapes, check_absent, convert, expected_tensors
from formats.files import lock
from formats.gguf_file import convert_gguf
from formats.huggingface import convert_folder, download_snapshot
from model import ModelArgs, Transformer


def shapes_of(config: dict) -> Shapes:
    """Names and shapes of the tensors of a checkpoint with this config.json."""
    model = Transformer(ModelArgs.from_config(config), device="meta")
    return {name: tuple(tensor.shape) for name, tensor in expected_tensors(model).items()}


def main(argv: list[str] | None = None) -> Path:
    """Converts one source; prints and returns the output folder.

    Raises ValueError for a source that is absent or cannot be converted, an output that is there.
    """
    o = options.convert_hf_checkpoint(argv)

    # where from and where to, before a long download
    local = o.gguf or o.checkpoint_dir
    if local and not local.exists():
        raise ValueError(f"there is no {local}")
    if o.checkpoint_dir and not local.is_dir():
        raise ValueError(f"--checkpoint_dir {local} is a file, not a folder; a GGUF file is given as --gguf")
    name = o.repo_id or (o.gguf.stem if o.gguf else local.resolve().name)
    output = (o.output_dir or CHECKPOINTS / name).resolve()
    if local and output in (local.resolve(), *local.resolve().parents):
        raise ValueError(f"{output} holds the source {local}; give another --output_dir")
    check_absent(output)

    convert_source = convert_gguf if o.gguf else convert_folder
    with lock(output):
        source = local or download_snapshot(o.repo_id)
        convert(partial(convert_source, expected_shapes=shapes_of), source, output)
    print(f"converted to {output}")
    return output

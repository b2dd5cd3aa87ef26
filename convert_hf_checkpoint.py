"""Convert a checkpoint to this repository's layout, tensor by tensor (memory stays near the largest tensor).

    python convert_hf_checkpoint.py --repo_id meta-llama/Llama-2-7b-hf    # from the hub, through its own cache
    python convert_hf_checkpoint.py --checkpoint_dir path/to/folder       # config.json, safetensors or .bin, tokenizer
    python convert_hf_checkpoint.py --gguf model.gguf --output_dir checkpoints/my-model

The output folder (default: checkpoints/<org>/<name> beside this script) holds model.safetensors (shards of 5 GB above
10 GB) with GPT-Fast's tensor names in the source's dtype, config.json in Hugging Face form and the tokenizer's files.
It is built as <output>.partial and renamed at the end: a folder of its final name is complete.
"""

import argparse
from functools import partial
from pathlib import Path

from cli import command_line
from formats.checkpoint import CHECKPOINTS, check_absent, convert
from formats.files import lock
from formats.gguf_file import convert_gguf
from formats.huggingface import convert_folder, download_snapshot
from model import FAMILIES, ModelArgs, expected_shapes


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the model of a config.json has."""
    return expected_shapes(ModelArgs.from_config(config))


def main(
    repo_id: str | None = None,
    checkpoint_dir: Path | None = None,
    gguf: Path | None = None,
    output_dir: Path | None = None,
) -> Path:
    """Converts one source; prints and returns the output folder.

    Raises:
        ValueError: not exactly one source, a source that is absent or cannot be converted, an output that is there.
    """
    if sum(source is not None for source in (repo_id, checkpoint_dir, gguf)) != 1:
        raise ValueError("give one of --repo_id, --checkpoint_dir, --gguf")

    # where from and where to, before a long download
    local = gguf or checkpoint_dir
    if local and not local.exists():
        raise ValueError(f"there is no {local}")
    output = (output_dir or CHECKPOINTS / (repo_id or (gguf.stem if gguf else local.resolve().name))).resolve()
    if local and output in (local.resolve(), *local.resolve().parents):
        raise ValueError(f"{output} holds the source {local}; give another --output_dir")
    check_absent(output)

    if gguf:
        convert_source = partial(convert_gguf, architectures=FAMILIES, expected_shapes=shapes_of)
    else:
        convert_source = partial(convert_folder, expected_shapes=shapes_of)
    source = local or download_snapshot(repo_id)
    with lock(output):
        convert(convert_source, source, output)
    print(f"converted to {output}")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a checkpoint to this repository's layout.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--repo_id", help="a repository of the Hugging Face hub, ORG/NAME")
    source.add_argument("--checkpoint_dir", type=Path, help="a Hugging Face folder: config.json, weights, tokenizer")
    source.add_argument("--gguf", type=Path, help="a GGUF file of architecture llama or qwen2")
    parser.add_argument("--output_dir", type=Path, help="the output folder itself (default: checkpoints/<org>/<name>)")
    command_line(main, parser.parse_args())

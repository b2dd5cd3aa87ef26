"""A checkpoint in Hugging Face's form, as a folder or in the hub, becomes one of ours."""

import shutil
from collections.abc import Callable
from pathlib import Path

from formats.checkpoint import COPIED_FILES, Shapes, Source, indexed_files, read_tensors, rename_tensors, write_weights
from formats.config import config_fields
from formats.files import one_line, read_json

HF_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}  # theirs -> ours
HF_NAMES |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
HF_NAMES |= {f"self_attn.{letter}_proj": f"attention.w{letter}" for letter in "qkvo"}
HF_NAMES |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}


def convert_folder(source: Path, partial: Path, expected_shapes: Callable[[dict], Shapes]) -> None:
    """Writes the checkpoint of a Hugging Face folder to `partial`; see `formats.checkpoint.convert`.

    `expected_shapes` gives names and shapes of the tensors that the model of a config.json has. Raises ValueError for a
    missing or damaged file, tensors that do not fit the config, and what expected_shapes raises.
    """
    config = read_json(source / "config.json")
    expected, head_dim = expected_shapes(config), config_fields(config)["head_dim"]
    tensors = rename_tensors(folder_sources(source), HF_NAMES, expected, head_dim, half_split=True)
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    write_weights(partial, tensors)


def source_files(folder: Path) -> list[Path]:
    """Files that hold the weights: safetensors or, where there are none, pickled ones. Raises ValueError for none."""
    for single, others in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            return indexed_files(index)
        if files := sorted(f for f in folder.glob(others) if not f.name.startswith("consolidated")):
            return files
    raise ValueError(f"{folder} holds no *.safetensors and no pytorch_model*.bin")


def folder_sources(folder: Path) -> dict[str, Source]:
    """Every tensor of the folder's weight files; a file is opened anew for each tensor, so that only one is mapped."""
    sources: dict[str, Source] = {}
    for path in source_files(folder):
        for name, tensor in read_tensors(path).items():
            if name in sources:
                raise ValueError(f"{path} repeats the tensor {name} of another file")
            sources[name] = Source(tuple(tensor.shape), tensor.dtype, lambda p=path, n=name: read_tensors(p)[n])
    return sources


def download_snapshot(repo_id: str) -> Path:
    """The folder of a hub repository in Hugging Face's cache, fetched: safetensors, or .bin where there are none.

    Raises ValueError for no such repository, no access to it, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    skipped = ["consolidated*", "original/*"]
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = [weights, "*.index.json", *COPIED_FILES]
            folder = Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=skipped))
            if any(folder.glob(weights)):
                break
        return folder
    except GatedRepoError:
        raise ValueError(f"{repo_id} is gated: accept its terms on huggingface.co, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {repo_id!r} (or it is private: `hf auth login`)") from None
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a repository id such as meta-llama/Llama-2-7b-hf: {error}") from None
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        raise ValueError(f"cannot fetch {repo_id} from the hub ({one_line(error)}); run again to resume") from None

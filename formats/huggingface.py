"""A checkpoint in Hugging Face's form, as a folder or in the hub, becomes one of ours."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from formats import checkpoint
from formats.checkpoint import COPIED_FILES, WEIGHT_SUFFIXES, Shapes, Source
from formats.config import config_fields
from formats.files import one_line, read_json, write_json

HF_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}  # theirs -> ours
HF_NAMES |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
HF_NAMES |= {f"self_attn.{letter}_proj": f"attention.w{letter}" for letter in "qkvo"}
HF_NAMES |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
# adapters, variants in another precision, states of a training
OTHER_WEIGHTS = re.compile(r"adapter|consolidated|optimizer|scheduler|rng_state|training_args|\.(fp|bf)\d+[.-]")


def convert_folder(source: Path, partial: Path, expected_shapes: Callable[[dict], Shapes]) -> None:
    """Writes the checkpoint of a Hugging Face folder to `partial`; see `formats.checkpoint.convert`.

    `expected_shapes` gives those of a config's model by name. Raises ValueError for a damaged file or a wrong tensor.
    """
    config = read_json(source / "config.json")
    fields, sources = config_fields(config), folder_sources(source)
    checkpoint.check_layers(sources, fields["n_layer"])
    if (source / "vocab.json").is_file() and not any(source.glob("tokenizer.[jm]*")):
        make = "make it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise ValueError(f"{source} has vocab.json and merges.txt, but no tokenizer.json; {make}")

    # of tied matrices a folder may hold both, or the head alone
    head, untied = sources.get(HEAD), False
    if fields["tie_embeddings"] and head:
        untied = checkpoint.is_own_head(head.load(), sources.setdefault(EMBEDDING, head).load())
    config |= {"tie_word_embeddings": False} if untied else {}

    tensors = checkpoint.rename_tensors(sources, HF_NAMES, expected_shapes(config), fields["head_dim"], half_split=True)
    checkpoint.copy_files(source, partial)
    if untied:
        write_json(partial / "config.json", config)
    checkpoint.write_weights(partial, tensors)


def source_files(folder: Path) -> list[Path]:
    """Files that hold the weights, chosen as transformers does, else any of a model. Raises ValueError for none."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        if (index := folder / f"{single}.index.json").is_file():
            return checkpoint.indexed_files(index)
    for pattern in (*SHARDS, "*.safetensors", "pytorch_model*.bin"):
        if files := sorted(f for f in folder.glob(pattern) if not OTHER_WEIGHTS.search(f.name)):
            return files
    others = sorted(f.name for f in folder.glob("*") if f.suffix in WEIGHT_SUFFIXES)
    found = f"; it has {', '.join(others[:5])}, which are not a model in Hugging Face's form" if others else ""
    raise ValueError(f"{folder} holds no *.safetensors and no pytorch_model*.bin{found}")


def folder_sources(folder: Path) -> dict[str, Source]:
    """Every tensor of the folder's weight files; a file is opened anew for each tensor, so that only one is mapped."""
    sources: dict[str, Source] = {}
    for path in source_files(folder):
        # torch's older format cannot be mapped
        mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
        for name, tensor in checkpoint.read_tensors(path).items():
            if name in sources:
                raise ValueError(f"{path} repeats the tensor {name} of another file")
            load = (lambda p=path, n=name: checkpoint.read_tensors(p)[n]) if mapped else (lambda t=tensor: t)
            sources[name] = Source(tuple(tensor.shape), tensor.dtype, load)
    return sources


def download_snapshot(repo_id: str) -> Path:
    """The folder, in Hugging Face's cache, of a hub repository; ValueError: no such one, no access, or no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    usual = ["model.safetensors", SHARDS[0]], ["pytorch_model.bin", SHARDS[1]]
    try:
        for weights in (*usual, ["*.safetensors", "pytorch_model*.bin"]):
            patterns = [*weights, "*.index.json", "vocab.json", *COPIED_FILES]
            folder = Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
            if any(f for pattern in weights for f in folder.glob(pattern)):
                break
    except GatedRepoError:
        raise ValueError(f"{repo_id} is gated: accept its terms on huggingface.co, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {repo_id!r} (or it is private: `hf auth login`)") from None
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a repository id such as meta-llama/Llama-2-7b-hf: {error}") from None
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        raise ValueError(f"cannot fetch {repo_id} from the hub ({one_line(error)}); run again to resume") from None
    return folder

"""A checkpoint in Hugging Face's form, as a folder or in the hub, becomes one of ours."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from formats import checkpoint
from formats.checkpoint import COPIED_FILES, WEIGHT_SUFFIXES, Shapes, Source
from formats.config import config_fields, language_config
from formats.files import one_line, read_json, regular_file, write_json
from formats.gguf_file import NORMAL, byte_level_tokenizer

HF_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}  # theirs -> ours
HF_NAMES |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
HF_NAMES |= {f"self_attn.{letter}_proj": f"attention.w{letter}" for letter in "qkvo"}
HF_NAMES |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
HF_NAMES |= {f"self_attn.{letter}_norm": f"attention.{letter}_norm" for letter in "qk"}
HF_NAMES |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffn_norm"}
HF_NAMES |= {"self_attn.qkv_proj": "attention.wqkv", "mlp.gate_up_proj": "feed_forward.w13"}  # Phi-3
# GPT-NeoX, then OPT
HF_NAMES |= {"attention.query_key_value": "attention.wqkv", "attention.dense": "attention.wo"}
HF_NAMES |= {"mlp.dense_h_to_4h": "feed_forward.w3", "mlp.dense_4h_to_h": "feed_forward.w2"}
HF_NAMES["model.final_layer_norm"] = "norm"
HF_NAMES |= {"model.embed_positions": "pos_embeddings", "self_attn.out_proj": "attention.wo", "fc1": "feed_forward.w3"}
HF_NAMES |= {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "ffn_norm", "fc2": "feed_forward.w2"}
PREFIXES = re.compile(r"^(gpt_neox|(model\.)?decoder|model\.language_model|language_model\.model)\.")  # for "model."
# buffers that older folders hold, and the images' part of a multimodal model
LEFT_OUT = re.compile(r"layers\.\d+\.attention\.(masked_)?bias$|^(model\.)?(vision_tower|multi_modal_projector)\.")
OPT_OFFSET = 2  # rows of OPT's learned positions that stand before position 0
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GPT_NEOX_ENDS = {"gpt_neox.embed_in.weight": EMBEDDING, "embed_out.weight": HEAD}
SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
# adapters, variants in another precision, states of a training
OTHER_WEIGHTS = re.compile(r"adapter|consolidated|optimizer|scheduler|rng_state|training_args|\.(fp|bf)\d+[.-]")


def convert_folder(source: Path, partial: Path, expected_shapes: Callable[[dict], Shapes]) -> None:
    """Writes the checkpoint of a Hugging Face folder to `partial`; see `formats.checkpoint.convert`.

    `expected_shapes` gives those of a config's model by name. Raises ValueError for a damaged file or a wrong tensor.
    """
    stored = read_json(source / "config.json")
    config = language_config(stored)
    fields = config_fields(config)
    sources = canonical(folder_sources(source), fields)
    checkpoint.check_layers(sources, fields["n_layer"])
    if (source / "vocab.json").is_file() and not any(source.glob("tokenizer.[jm]*")):
        if "learned_positions" not in fields:
            make = "make it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            raise ValueError(f"{source} has vocab.json and merges.txt, but no tokenizer.json; {make}")
        write_gpt2_tokenizer(source, partial)

    # of tied matrices a folder may hold both, or the head alone
    head, untied = sources.get(HEAD), False
    if fields["tie_embeddings"] and head:
        untied = checkpoint.is_own_head(head.load(), sources.setdefault(EMBEDDING, head).load())
    config = config | ({"tie_word_embeddings": False} if untied else {})

    # norms after a branch take the name that elsewhere is the next branch's
    names = HF_NAMES | ({"post_attention_layernorm": "post_attention_norm"} if fields.get("post_norm") else {})
    rotary_dim = int(fields["head_dim"] * fields["rotary_share"])
    tensors = checkpoint.rename_tensors(sources, names, expected_shapes(config), fields["head_dim"], rotary_dim)
    checkpoint.copy_files(source, partial)
    if config != stored:
        write_json(partial / "config.json", config)
    checkpoint.write_weights(partial, tensors)


def write_gpt2_tokenizer(source: Path, partial: Path) -> None:
    """tokenizer.json from vocab.json and merges.txt of a folder of OPT's, whose texts are split as GPT-2's."""
    vocab = read_json(source / "vocab.json")
    ids = {str(i): token for token, i in vocab.items()}
    tokens = [ids.get(str(i)) for i in range(len(vocab))]
    if None in tokens:
        raise ValueError(f"{source / 'vocab.json'} has no token of id {tokens.index(None)}; get it again")
    _, *merges = regular_file(source / "merges.txt").read_text("utf-8", "replace").splitlines() or [""]
    tokenizer = byte_level_tokenizer(tokens, [NORMAL] * len(tokens), merges, "gpt-2")
    (partial / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def canonical(sources: dict[str, Source], fields: dict) -> dict[str, Source]:
    """The tensors of any family under "model.", without what no model of ours has."""
    found = {}
    for name, source in sources.items():
        if LEFT_OUT.search(name):
            continue
        if ".query_key_value." in name and source.shape[:1] == (rows := 3 * fields["n_head"] * fields["head_dim"],):
            by_head = torch.arange(rows).view(-1, 3, fields["head_dim"])  # q, k and v of a head, then of the next
            source = checkpoint.reordered(source, by_head.transpose(0, 1).flatten())
        if name.endswith("decoder.embed_positions.weight") and source.shape[:1] > (OPT_OFFSET,):
            source = checkpoint.reordered(source, torch.arange(OPT_OFFSET, source.shape[0]))
        found[GPT_NEOX_ENDS.get(name) or PREFIXES.sub("model.", name).removeprefix("language_model.")] = source
    return found


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
            patterns = [*weights, "*.index.json", "vocab.json", "merges.txt", *COPIED_FILES]
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

"""The tiny models that all tests share: their shapes, and what builds them in memory and as a checkpoint."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from convert_hf_checkpoint import shapes_of
from model import ModelArgs, Transformer
from sparse_model import SparseTransformer

# As ModelArgs; of the fused steps: widths that no tile divides.
SMALL = {"block_size": 64, "vocab_size": 96, "n_layer": 2, "n_head": 4, "dim": 32, "intermediate_size": 48}
FUSED = SMALL | {"block_size": 256, "vocab_size": 101, "n_local_heads": 2, "dim": 64, "intermediate_size": 172}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
YARN |= {"beta_slow": 1.0, "truncate": True, "attention_factor": 1.25}
# of the fused steps: all that a model may have besides what Llama has
SWITCHES = {"qk_norm": "head", "vector_std": 0.3, "attention_scale": 0.1, "activation": "relu", "n_layer": 3}
SWITCHES |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "rotary_share": 0.75, "rope_scaling": YARN}
SWITCHES |= {"unrotated_layers": [1], "sliding_window": 5, "windowed_layers": [2], "local_rope_base": 30.0}
SWITCHES |= {"embedding_multiplier": 3.3, "residual_multiplier": 0.22, "logits_scaling": 7.0}

# As config.json; TINY is that of the checkpoint `tiny`.
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 128}
TINY = CONFIG | {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 300, "max_position_embeddings": 160}
TINY |= {"bos_token_id": None, "eos_token_id": None}


def build(
    cls: type = Transformer,
    shape: dict = SMALL,
    *,
    seed: int = 0,
    std: float = 0.3,
    vector_std: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **changes,
) -> Transformer:
    """A model of random weights, large enough that attention is far from uniform; norms and biases vary by vector_std.

    `shape` is one of ModelArgs or of config.json; `changes` to it are in the same form.
    """
    shape = shape | changes
    args = ModelArgs.from_config(shape) if "architectures" in shape else ModelArgs(**shape)
    model = cls(args, device, dtype).requires_grad_(False).eval()
    model.init_weights(seed, std)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if vector_std and parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            parameter += vector_std * noise.to(dtype)
    return model


def build_cut(shape: dict = FUSED, *, shifted: bool = False, by_channel: bool = False, **options) -> SparseTransformer:
    """A sparse model of random cuts: around half of the inputs; by_channel: some always and the others never."""
    model = build(SparseTransformer, shape, **options)
    generator = torch.Generator(model.device).manual_seed(1)
    for module in model.sites:
        if module.bias is not None:
            module.bias.normal_(generator=generator)
        threshold = 0.3 * torch.rand(module.threshold.shape, generator=generator, device=model.device)
        shift = 0.4 * torch.rand(len(module.weight), generator=generator, device=model.device) - 0.2
        module.set_cut(1e9 * (threshold < 0.15) if by_channel else threshold, shift if shifted else None)
    model.sparsity = 0.5
    return model


def caches(model: Transformer) -> list[torch.Tensor]:
    """The keys and values of each layer's cache, themselves."""
    return [tensor for block in model.layers for tensor in block.attention.kv_cache.buffers()]


def decode(model: Transformer, idx: torch.Tensor, prompt: int, **options) -> torch.Tensor:
    """Logits of all positions: the prompt's at once, then token by token with these options, through the cache."""
    model.setup_caches(len(idx), idx.shape[1])
    at = torch.arange(idx.shape[1], device=idx.device)
    parts = [model(idx[:, :prompt], at[:prompt])] if prompt else []
    parts += [model(idx[:, i : i + 1], at[i : i + 1], **options) for i in range(prompt, idx.shape[1])]
    return torch.cat(parts, dim=1)


def random_tokens(batch: int, length: int, vocab_size: int = SMALL["vocab_size"], seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, config: dict, text: str | None = None, std: float = 0.2) -> Path:
    """A folder as the converter leaves it: random matrices, norms of ones, a tokenizer of `text` if that is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * std
        for name, shape in shapes_of(config).items()
    }
    save_file(tensors, folder / "model.safetensors")
    if text is not None:
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator([text] * 4, vocab_size=config["vocab_size"], show_progress=False)
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def copy_with_text(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint in `folder`, with 200 lines of text.txt in it."""
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    lines = [f"Hello, my name is Ann and story {i} is of rivers." for i in range(200)]
    (copy / "text.txt").write_text("\n".join(lines))
    return copy


def edit_json(path: Path, **changes) -> None:
    """Sets keys of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_config(folder: Path, **changes) -> None:
    edit_json(folder / "config.json", **changes)


def split_weights(folder: Path) -> None:
    """Rewrites a checkpoint's weights as two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in (0, 1):
        shard, names = f"model-0000{i + 1}-of-00002.safetensors", sorted(tensors)[i::2]
        save_file({name: tensors[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def flags(**options) -> list[str]:
    """A script's command line: True is a bare flag, False its --no_ form, None is left out, a list is spread."""
    words = []
    for name, value in options.items():
        if value is True or value is False:
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words

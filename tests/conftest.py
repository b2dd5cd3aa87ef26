import json
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

TINY = {
    **{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 300},
    **{"max_position_embeddings": 160, "bos_token_id": None, "eos_token_id": None},
}


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data() -> Path:
    """Data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A converted checkpoint of random weights with a tokenizer of 300 tokens. Tests that change it copy it first."""
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    from model import ModelArgs, expected_shapes

    folder = tmp_path_factory.mktemp("org") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.2
        for name, shape in expected_shapes(ModelArgs.from_config(TINY)).items()
    }
    save_file(tensors, folder / "model.safetensors")
    tokenizer = ByteLevelBPETokenizer()
    sentences = ["Hello, my name is Ann and this is a story of rivers."] * 4
    tokenizer.train_from_iterator(sentences, vocab_size=300, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder

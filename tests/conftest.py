import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def assembly():
    """Integers' kernel is partly assembly, which the interpreter does not know."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        import lanes

        lanes.install()


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
    from models import TINY, write_checkpoint

    text = "Hello, my name is Ann and this is a story of rivers."
    return write_checkpoint(tmp_path_factory.mktemp("org") / "tiny", TINY, text)


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A copy of `tiny` that a test may change."""
    return shutil.copytree(tiny, tmp_path / "copy")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """Data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    return folder

"""Fixtures that every test may use."""

from pathlib import Path

import numpy as np
import pytest
import torch

from parity_rows import parity_row, pytest_addoption, pytest_sessionfinish  # noqa: F401 (hooks and a fixture)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no real data beside the repository (../shared/data)")
    return SHARED


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers for every run; a failure prints the seed."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    request.node.user_properties.append(("seed", seed))
    print(f"seed={seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped, visibly, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

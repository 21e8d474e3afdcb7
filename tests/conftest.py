"""Settings of all tests."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are tiny: more threads only wait for each other, on a busy machine for minutes.
    torch.set_num_threads(1)

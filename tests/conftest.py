"""Settings of all tests: where kernels run, what uninitialised memory holds, how many threads work.

Without a GPU, Triton's interpreter runs the kernels. Without triton, tests of kernels are not collected.
"""

import importlib.util
import os
import sys

import pytest
import torch

from .interpreter import hasten_interpreter
from .poison import poison_empty_memory


# Files whose tests share what takes long to make.
SHARED = (
    "training/test_processes.py",
    "training/test_checkpoints.py",
    "training/test_lora.py",
    "parallel/test_context_parallel.py",
)

# Triton reads this when it is imported, and nothing has imported it yet.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore_glob = ["*kernels*.py", "*tuning.py", "*/test_launch.py", "*/test_recording.py"]
if importlib.util.find_spec("triton") is not None:
    collect_ignore_glob.clear()


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are tiny: more threads only wait for each other, on a busy machine for minutes.
    torch.set_num_threads(1)
    poison_empty_memory()
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        hasten_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with shared things come first: a process of xdist that is idle takes tests from the end of another's.

    It would make again what the tests that it takes share.
    """
    items.sort(key=lambda item: not item.path.as_posix().endswith(SHARED))


@pytest.fixture(scope="session")
def fork_server() -> None:
    """The server of multiprocessing that forks processes, with what all of its users need.

    There is one in a process of tests. Started by one test for its own needs, it would lack imports of the next, whose
    processes would each take seconds to import them.
    """
    from diffusers_sparse3d.training.preparation.jobs import PRELOADED
    from diffusers_sparse3d.training.worker_pool import _start_server

    if sys.platform != "win32":
        with pytest.MonkeyPatch.context() as patch:
            # Runs of pytest in such processes would each import all entry points of plugins.
            patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
            _start_server(["pytest", PRELOADED])


@pytest.fixture(autouse=True)
def seed() -> None:
    """What fails once fails again: no test depends on the tests before it."""
    torch.manual_seed(0)

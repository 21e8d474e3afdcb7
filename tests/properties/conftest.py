"""How many examples the property-based tests take: the same few hundred each time, or new ones with `make fuzz`."""

import os

import pytest


try:
    from hypothesis import HealthCheck, settings
except ImportError:  # of the extra `dev`
    collect_ignore_glob = ["test_*.py"]
else:
    common = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}
    settings.register_profile("suite", derandomize=True, max_examples=200, **common)
    settings.register_profile("fuzz", max_examples=1000, **common)
    settings.load_profile(os.environ.get("SPARSE3D_PROPERTIES", "suite"))


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings of libraries about random input are not shown with each example."""
    caplog.set_level("ERROR")

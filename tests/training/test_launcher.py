"""Settings of `accelerate launch`: followed, unless the configuration says otherwise, and then it is said."""

import logging

import pytest
from accelerate.state import AcceleratorState

from diffusers_sparse3d.training.configuration import TrainingConfig
from diffusers_sparse3d.training.distributed import make_accelerator, on_main_process


@pytest.fixture(autouse=True)
def fresh_state():
    """What accelerators share is as in a new process, before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def make(tmp_path):
    """Makes the accelerator of a configuration and lets its folder go."""

    def make(**options):
        config = TrainingConfig(data="", output_dir=str(tmp_path), cpu=True, max_train_steps=1, **options)
        accelerator = make_accelerator(config)
        accelerator.end_training()
        return accelerator

    return make


def test_the_launcher_is_followed(make, monkeypatch, caplog):
    plain = make()
    assert (plain.mixed_precision, plain.gradient_accumulation_steps) == ("no", 1)
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with caplog.at_level(logging.WARNING):
        launched = make()
    assert (launched.mixed_precision, launched.gradient_accumulation_steps) == ("bf16", 3)
    assert not caplog.messages


def test_the_configuration_overrides_the_launcher_and_says_so(make, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with caplog.at_level(logging.WARNING):
        accelerator = make(mixed_precision="no", gradient_accumulation_steps=2)
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 2)
    assert len(caplog.messages) == 2
    for name, ours, theirs in (("mixed_precision", "no", "bf16"), ("gradient_accumulation_steps", 2, 3)):
        assert f"`{name}` is {ours}, as the configuration says, not {theirs}, as the launcher says." in caplog.messages


def test_sharding_of_the_first_version_is_refused(make, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="`fsdp_version` must be 2"):
        make()


def test_deepspeed_on_the_cpu_is_refused(make, monkeypatch):
    """Accelerate would leave it out without a word."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"`cpu` must be false under DeepSpeed.*without `--use_deepspeed`"):
        make()


def test_errors_of_the_main_process(make):
    accelerator = make()
    assert on_main_process(accelerator, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        on_main_process(accelerator, lambda: 1 / 0)

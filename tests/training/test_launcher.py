"""Settings of `accelerate launch`: followed, unless the configuration says otherwise, and then it is said."""

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from diffusers_sparse3d.training.configuration import TrainingConfig
from diffusers_sparse3d.training.distributed import follow_deepspeed, make_accelerator, on_main_process, prepare

from .linear_task import LinearTask


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


class DeepSpeedAccelerator:
    """What a training uses of an accelerator under DeepSpeed, which is not installed."""

    distributed_type = DistributedType.DEEPSPEED

    def __init__(self, passes, settings):
        self.gradient_accumulation_steps, self.settings = passes, settings
        self.state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))

    def prepare(self, *objects):
        """Ends with the passes that DeepSpeed's settings have, as accelerate does."""
        self.gradient_accumulation_steps = self.settings["gradient_accumulation_steps"]
        return objects


@pytest.mark.parametrize("launched", [4, "auto"])
def test_deepspeed_takes_the_forward_passes_of_the_configuration(launched):
    """The batches of a step are as many, and divided by as many."""
    settings = {"gradient_accumulation_steps": launched, "gradient_clipping": 5.0}
    accelerator, task = DeepSpeedAccelerator(2, settings), LinearTask()
    config = TrainingConfig(data="", output_dir="", max_train_steps=1, batch_size=3, gradient_accumulation_steps=2)
    prepare(accelerator, task, torch.optim.AdamW(task.parameters()), config)
    assert accelerator.gradient_accumulation_steps == 2
    assert settings == {
        "gradient_accumulation_steps": 2, "gradient_clipping": 5.0, "train_micro_batch_size_per_gpu": 3,
    }  # fmt: skip


def test_forward_passes_of_a_file_of_deepspeed(monkeypatch):
    for given, environment, expected in ((4, None, 4), ("auto", None, 1), (4, "1", 1)):
        accelerator = DeepSpeedAccelerator(1, {"gradient_accumulation_steps": given})
        with monkeypatch.context() as patch:
            patch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
            if environment is not None:
                patch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", environment)
            follow_deepspeed(accelerator)
        assert accelerator.gradient_accumulation_steps == expected


def test_errors_of_the_main_process(make):
    accelerator = make()
    assert on_main_process(accelerator, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        on_main_process(accelerator, lambda: 1 / 0)

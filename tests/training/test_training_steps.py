"""Optimizer steps of the training loop, worked out by hand on a loss whose gradient is the data."""

import pytest
import torch

from diffusers_sparse3d.training import trainer as trainer_module
from diffusers_sparse3d.training.batches import pack
from diffusers_sparse3d.training.checkpoints import list_checkpoints, save_checkpoint
from diffusers_sparse3d.training.configuration import TrainingConfig
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.trainer import Trainer, make_accelerator

from .linear_task import LinearTask, Values


def run(folder, monkeypatch, values, **options):
    """Trains a LinearTask with plain gradient descent at learning rate 1; returns the task and the entries logged."""

    def make_optimizer(config, module, fused):
        return torch.optim.SGD(module.parameters(), lr=1.0)

    monkeypatch.setattr(trainer_module, "make_optimizer", make_optimizer)
    defaults = {"max_train_steps": 1, "batch_size": 1, "ema_decay": 0.0, "max_grad_norm": 100.0, "logging_steps": 1}
    config = TrainingConfig(data="", output_dir=str(folder), cpu=True, num_workers=0, **{**defaults, **options})
    task = LinearTask()
    accelerator = make_accelerator(config)
    Trainer(config, accelerator, task, Values(values), pack).train()
    return task, [entry for entry in read_metrics(folder) if "loss" in entry]


def test_accumulated_gradients_and_losses_are_means(tmp_path, monkeypatch):
    task, (entry,) = run(tmp_path, monkeypatch, [[1.0, 0.0], [0.0, 3.0]], gradient_accumulation_steps=2)
    assert task.weight.tolist() == [1 - 0.5, 2 - 1.5]
    # The losses of the two samples are 1 and 6.
    assert entry["loss"] == pytest.approx(3.5)
    assert entry["grad_norm"] == pytest.approx((0.5**2 + 1.5**2) ** 0.5)


def test_gradients_are_clipped_to_the_limit(tmp_path, monkeypatch):
    task, (entry,) = run(tmp_path, monkeypatch, [[3.0, 4.0]], max_grad_norm=0.5)
    assert entry["grad_norm"] == pytest.approx(5)  # before clipping
    assert (torch.tensor([1.0, 2.0]) - task.weight).tolist() == pytest.approx([0.3, 0.4], abs=1e-5)
    task, _ = run(tmp_path / "below", monkeypatch, [[0.3, 0.2]], max_grad_norm=0.5)
    assert task.weight.tolist() == pytest.approx([0.7, 1.8])


def test_logged_losses_are_means_of_the_steps_in_between(tmp_path, monkeypatch):
    # With every step the first weight moves by -1: the losses are 1, 0, -1, -2.
    _, entries = run(tmp_path, monkeypatch, [[1.0, 0.0]], max_train_steps=4, logging_steps=2)
    assert [(entry["step"], entry["loss"]) for entry in entries] == [(2, pytest.approx(0.5)), (4, pytest.approx(-1.5))]


def test_averaged_weights_are_kept(tmp_path, monkeypatch):
    """After training the task holds the exponential moving average, whose decay warms up as (1 + n) / (10 + n)."""
    task, _ = run(tmp_path, monkeypatch, [[1.0, 0.0]], max_train_steps=2, ema_decay=0.9)
    average = 1.0
    for step, weight in ((1, 0.0), (2, -1.0)):
        decay = min(0.9, step / (9 + step)) if step > 1 else 0.0
        average = decay * average + (1 - decay) * weight
    assert task.weight[0].item() == pytest.approx(average, abs=1e-6)


def test_warmup_scales_the_steps(tmp_path, monkeypatch):
    task, _ = run(tmp_path, monkeypatch, [[1.0, 0.0]], max_train_steps=4, lr_warmup_steps=4)
    assert task.weight[0].item() == pytest.approx(1 - (0.25 + 0.5 + 0.75 + 1))


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (1000, 200, 30):
        save_checkpoint(tmp_path, step, [])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-30", "checkpoint-200", "checkpoint-1000"]


class MatrixTask(LinearTask):
    """A LinearTask with a matrix in a block, which Muon trains, before the weights, which AdamW trains."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    def forward(self, batch):
        return super().forward({"values": self.blocks[0](batch["values"])})


@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_a_step_with_infinite_gradients_is_skipped_as_a_whole(tmp_path, value):
    """Half precision scales losses: an infinite gradient anywhere lowers the scale once, and no weight moves."""
    options = {"optimizer": "muon", "max_train_steps": 1, "batch_size": 1, "learning_rate": 0.1, "ema_decay": 0.0}
    config = TrainingConfig(data="", output_dir=str(tmp_path), cpu=True, num_workers=0, **options)
    task, accelerator = MatrixTask(), make_accelerator(config)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer = Trainer(config, accelerator, task, Values([[value, 2.0]]), pack)
    before = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    trainer.train()
    moved = [not torch.equal(parameter, before[name]) for name, parameter in task.named_parameters()]
    assert moved == 3 * [value == 1.0]
    assert accelerator.scaler.get_scale() == (64.0 if value == 1.0 else 32.0)
    accelerator.end_training()

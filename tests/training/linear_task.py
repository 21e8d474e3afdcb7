"""The smallest training there is: two weights, and a loss whose gradient is the data."""

import torch
from torch import nn
from torch.utils.data import Dataset

from diffusers_sparse3d.training.batches import pack
from diffusers_sparse3d.training.configuration import TrainingConfig
from diffusers_sparse3d.training.losses import Loss
from diffusers_sparse3d.training.task import Task
from diffusers_sparse3d.training.trainer import Trainer, make_accelerator


class Values(Dataset):
    """Vectors of two numbers: `values[index, choice]`."""

    def __init__(self, values):
        self.values = torch.tensor(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        return {"values": self.values[key[0]]}


class LinearTask(Task):
    """The loss is the mean over the batch of weight times data, so that its gradient is the mean of the data."""

    loss_weights = {"loss": 1.0}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, batch):
        return {"loss": Loss((batch["values"] @ self.weight).sum(), self.counts(batch)["loss"])}

    def counts(self, batch):
        return {"loss": torch.tensor(len(batch["values"]))}


def linear_trainer(folder, **options):
    """Returns the trainer of a LinearTask on five samples, with AdamW, averages and random numbers in the loss."""
    defaults = {"max_train_steps": 4, "batch_size": 2, "logging_steps": 1, "checkpointing_steps": 2, "ema_decay": 0.9}
    config = TrainingConfig(
        data="", output_dir=str(folder), cpu=True, num_workers=0, learning_rate=0.1, **{**defaults, **options}
    )
    values = torch.arange(10.0).view(5, 2).sin().tolist()
    accelerator = make_accelerator(config)
    try:
        return Trainer(config, accelerator, NoisyTask(), Values(values), pack)
    except BaseException:
        accelerator.end_training()
        raise


def train_linear(folder, **options):
    """Trains a LinearTask to its end and returns the trainer."""
    trainer = linear_trainer(folder, **options)
    try:
        trainer.train()
    finally:
        trainer.accelerator.end_training()
    return trainer


class NoisyTask(LinearTask):
    """A LinearTask whose loss depends on torch's random generator, as models with dropout do."""

    def forward(self, batch):
        noise = torch.rand(len(batch["values"]), 2)
        return {"loss": Loss(((batch["values"] + noise) @ self.weight.sin()).sum(), self.counts(batch)["loss"])}

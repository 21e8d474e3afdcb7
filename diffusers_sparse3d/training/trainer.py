"""The training loop that all training commands share."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast, send_to_device, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .configuration import TrainingConfig
from .losses import Loss, LossSums
from .metrics import plot_losses
from .optimizers import make_optimizers
from .phases import phase_factor
from .sampler import BatchSchedule, StreamBatches, TrainingSampler, make_loader
from .schedule import Clock, learning_rate_factor
from .task import Task, weighted_sum


# Optimizer steps after which all processes agree again on how much of the time budget is used up.
CLOCK_STEPS = 10


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Makes the accelerator of a training and sets all seeds, alike in all processes so that initial weights agree."""
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        # Training is an endless stream of batches, without ends of epochs at which gradients would be synchronised.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        project_config=ProjectConfiguration(project_dir=config.output_dir),
    )
    set_seed(config.seed)
    return accelerator


class Trainer:
    """Trains a task, with schedule, averaged weights, logs, pictures, checkpoints and exact resume.

    Args:
        config: Configuration of the training.
        accelerator: Accelerator of `make_accelerator`.
        task: Module to train; its parameters that require gradients are trained and averaged.
        dataset: Maps a `SampleKey` to a sample.
        collate_fn: Joins samples to a batch, a dictionary of tensors.
        schedule: Batches of all processes; batches of one length if None.
        validation_dataset: The same for validation; if None, there is no validation and there are no pictures.
        validation_schedule: Batches of one process for validation; batches of one length if None.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        task: Task,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], dict[str, Any]],
        schedule: BatchSchedule | None = None,
        validation_dataset: Dataset[Any] | None = None,
        validation_schedule: BatchSchedule | None = None,
    ):
        self.config, self.accelerator = config, accelerator
        self.dataset, self.collate_fn = dataset, collate_fn
        self.validation_dataset = validation_dataset
        counts = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
        self.schedule = schedule or stream_schedule(dataset, config, *counts)
        if validation_schedule is None and validation_dataset is not None:
            validation_schedule = stream_schedule(validation_dataset, config)
        self.validation_schedule = validation_schedule
        self.output_dir = Path(config.output_dir)
        self.task = task.to(accelerator.device)
        self.parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
        optimizers = make_optimizers(config, task, fused=accelerator.device.type == "cuda")
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.model, *self.optimizers = accelerator.prepare(task, *optimizers)
        self.clock = Clock()
        accelerator.register_for_checkpointing(self.clock)
        self.ema: EMAModel | None = None
        if config.ema_decay > 0:
            self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)
        # From here on, each process draws its own noise.
        set_seed(config.seed, device_specific=True)
        self.writer = None
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
            self.writer = SummaryWriter(self.output_dir / "logs")

    @property
    def step(self) -> int:
        """Number of optimizer steps that are done."""
        return self.clock.step

    @property
    def finished(self) -> bool:
        """Whether the limit on steps or on time is reached."""
        config = self.config
        if config.max_train_steps is not None and self.clock.step >= config.max_train_steps:
            return True
        return config.max_train_minutes is not None and self.clock.seconds >= 60 * config.max_train_minutes

    def train(self) -> None:
        """Trains until a limit is reached.

        In the end a checkpoint and the loss curve are saved, and the task holds the averaged weights.
        """
        config, accelerator = self.config, self.accelerator
        self.resume()
        sampler = TrainingSampler(self.schedule, accelerator.process_index, start=self.step)
        pin_memory = accelerator.device.type == "cuda"
        batches = iter(make_loader(self.dataset, sampler, self.collate_fn, config.num_workers, pin_memory))
        bar = tqdm(
            total=config.max_train_steps, initial=self.step, desc="Training", disable=not accelerator.is_main_process
        )
        sums = LossSums()
        self.model.train()
        self.clock.start()
        while not self.finished:
            factor = learning_rate_factor(config, self.step, self.clock.seconds / 60) * phase_factor(config, self.step)
            for optimizer, peaks in zip(self.optimizers, self.peaks):
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = peak * factor
            passes = [next(batches) for _ in range(config.gradient_accumulation_steps)]
            self.optimize([send_to_device(batch, accelerator.device, non_blocking=True) for batch in passes], sums)
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.clock.step += 1
            bar.update()
            if self.step % CLOCK_STEPS == 0:
                self.synchronize_clock()
            if self.step % config.logging_steps == 0:
                self.log(sums, config.learning_rate * factor, bar)
                sums = LossSums()
            # Validation leaves the state of the random generators as it was, so that a resumed training is the same.
            if config.validation_steps and self.step % config.validation_steps == 0 and not self.finished:
                self.validate()
            if config.checkpointing_steps and self.step % config.checkpointing_steps == 0:
                self.save_checkpoint()
        bar.close()
        self.validate()
        self.save_checkpoint()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        self.task.eval()
        if self.writer is not None:
            self.writer.close()
            plot_losses(self.output_dir)
        accelerator.wait_for_everyone()

    def optimize(self, batches: list[dict[str, Any]], sums: LossSums) -> None:
        """Takes one optimizer step on batches, one for each forward pass, and adds their losses to `sums`.

        What is minimised is a mean over the elements of the global batch, so that neither the number of processes nor
        that of forward passes changes it. The gradients are averaged over both later, which is undone here.
        """
        accelerator, weights = self.accelerator, self.task.loss_weights
        counts = [self.task.counts(batch) for batch in batches]
        local = torch.stack([torch.stack([count[name].double() for name in weights]) for count in counts]).sum(0)
        global_counts = dict(zip(weights, accelerator.reduce(local, reduction="sum").clamp(min=1).float()))
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
        for batch in batches:
            with accelerator.accumulate(self.model):
                losses: dict[str, Loss] = self.model(batch)
                parts = {name: losses[name].total * (scale / global_counts[name]) for name in weights}
                accelerator.backward(weighted_sum(parts, weights))
                sums.add(losses)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                    sums.add({"grad_norm": Loss(norm, torch.ones_like(norm))})
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

    def synchronize_clock(self) -> None:
        """Sets the clocks of all processes to that of the main one, so that learning rates and the end agree."""
        self.clock.tick()
        if self.accelerator.num_processes > 1:
            seconds = torch.tensor([self.clock.seconds], device=self.accelerator.device)
            self.clock.seconds = float(broadcast(seconds))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Puts the averaged weights in place of the current ones, in evaluation mode and without compilation."""
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        self.task.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.task.train()
            if self.ema is not None:
                self.ema.restore(self.parameters)

    @torch.no_grad()
    def validate(self) -> None:
        """Computes validation losses and pictures in the main process, with the same noise every time."""
        accelerator, config = self.accelerator, self.config
        if self.validation_dataset is not None and self.validation_schedule is not None and self.writer is not None:
            devices = [accelerator.device] if accelerator.device.type == "cuda" else []
            with self.averaged_weights(), torch.random.fork_rng(devices):
                torch.manual_seed(config.seed)
                batches, _ = self.validation_schedule.phase(self.step)
                sums = LossSums()
                for _, keys in zip(range(config.num_validation_batches), TrainingSampler(batches)):
                    batch = self.collate_fn([self.validation_dataset[key] for key in keys])
                    with accelerator.autocast():
                        sums.add(self.task(send_to_device(batch, accelerator.device)))
                means = sums.means(lambda tensor: tensor, self.task.loss_weights)
                self.write({f"validation/{name}": value for name, value in means.items()})
                ((first,),) = batches.step(0)
                resolution = first[0].resolution
                pictured = StreamBatches(
                    len(cast(Sized, self.validation_dataset)),
                    config.num_pictures,
                    config.seed,
                    resolutions=[resolution],
                )
                batch = self.collate_fn([self.validation_dataset[key] for key in pictured.step(0)[0][0]])
                with accelerator.autocast():
                    picture = self.task.pictures(send_to_device(batch, accelerator.device))
                folder = self.output_dir / "pictures"
                folder.mkdir(exist_ok=True)
                picture.save(folder / f"{self.step:07d}.png")
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                pixels = pixels.view(picture.height, picture.width, 3)
                self.writer.add_image("pictures", pixels, self.step, dataformats="HWC")
        accelerator.wait_for_everyone()

    def log(self, sums: LossSums, learning_rate: float, bar: tqdm) -> None:
        """Writes the means of the losses over all processes and the steps since the last entry."""
        values = sums.means(self.accelerator.reduce, self.task.loss_weights)
        if self.accelerator.is_main_process:
            self.write({**values, "learning_rate": learning_rate, "minutes": self.clock.seconds / 60})
            bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{learning_rate:.1e}")

    def write(self, values: dict[str, float]) -> None:
        """Writes one entry to `metrics.jsonl` and to TensorBoard, in the main process alone."""
        if self.writer is None:
            return
        with (self.output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name if "/" in name else f"train/{name}", value, self.step)

    def save_checkpoint(self) -> None:
        """Saves the complete state of training in OUTPUT_DIR/checkpoint-STEP and deletes the oldest checkpoints."""
        folder = self.output_dir / f"checkpoint-{self.step}"
        self.synchronize_clock()
        self.accelerator.save_state(str(folder))
        limit = self.config.checkpoints_total_limit
        if limit is not None and self.accelerator.is_main_process:
            for old in list_checkpoints(self.output_dir)[:-limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Loads the checkpoint that the configuration names and drops the entries that were logged after it.

        Raises:
            ValueError: if it does not exist.
        """
        checkpoint: str | Path | None = self.config.resume_from_checkpoint
        if checkpoint == "latest":
            checkpoint = next(reversed(list_checkpoints(self.output_dir)), None)
        if checkpoint is not None:
            if not os.path.isdir(checkpoint):
                raise ValueError(f"`resume_from_checkpoint` must be a folder, got {str(checkpoint)!r}")
            self.accelerator.load_state(str(checkpoint))
            if self.ema is not None:
                self.ema.to(self.accelerator.device)
        if self.accelerator.is_main_process:
            path = self.output_dir / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if checkpoint is not None and json.loads(line)["step"] <= self.step]
            path.write_text("".join(line + "\n" for line in kept))


def stream_schedule(
    dataset: Dataset[Any], config: TrainingConfig, num_processes: int = 1, num_passes: int = 1
) -> BatchSchedule:
    """Returns batches of the configured length of samples without a resolution, in one phase without end."""
    length = len(cast(Sized, dataset))
    batches = StreamBatches(length, config.batch_size, config.seed, num_processes, num_passes)
    return BatchSchedule([(0, batches)])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints in a folder in the order of their steps."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

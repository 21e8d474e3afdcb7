"""The training loop that all training commands share."""

import logging
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast, send_to_device, set_seed
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .averages import WeightAverages
from .balancing import log_balance
from .checkpoints import limit_checkpoints, save_checkpoint
from .configuration import TrainingConfig
from .distributed import (
    TrainingAccelerator,
    autocast,
    is_sharded,
    make_accelerator,
    on_main_process,
    prepare,
    unsharded_copy,
    use_unsharded,
)
from .kernel_compilation import compile_model_examples
from .losses import Loss
from .metrics import append_metrics, drop_metrics_after, plot_losses
from .optimizers import make_optimizer
from .phases import phase_factor
from .profiling import StepProfiler, part
from .sampler import BatchSchedule, StreamBatches, TrainingSampler, make_loader
from .schedule import Clock, learning_rate_factor
from .shards import reshard, share, whole
from .task import Task, weighted_sum
from .training_state import TrainingState, trained_parameters
from .validation import Validation, save_picture


__all__ = ["Task", "Trainer", "make_accelerator"]

logger = logging.getLogger(__name__)

# Optimizer steps after which all processes agree again on how much of the time budget is used up.
CLOCK_STEPS = 10


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
        accelerator: TrainingAccelerator,
        task: Task,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], dict[str, Any]],
        schedule: BatchSchedule | None = None,
        validation_dataset: Dataset[Any] | None = None,
        validation_schedule: BatchSchedule | None = None,
    ):
        self.config, self.accelerator = config, accelerator
        self.dataset, self.collate_fn = dataset, collate_fn
        counts = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
        self.schedule = schedule or stream_schedule(dataset, config, *counts)
        self.validation: Validation | None = None
        if validation_dataset is not None:
            validation_schedule = validation_schedule or stream_schedule(validation_dataset, config)
            self.validation = Validation(config, accelerator, validation_dataset, collate_fn, validation_schedule)
        self.output_dir = Path(config.output_dir)
        self.task = task
        task.move(accelerator.device)
        self.unsharded = unsharded_copy(task) if is_sharded(accelerator) else {}
        optimizer = make_optimizer(config, task, fused=accelerator.device.type == "cuda")
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = prepare(accelerator, task, optimizer, config)
        # Where they are sharded, parameters are others from here on.
        decays = [config.ema_decay, *config.more_ema_decays] if config.ema_decay > 0 else []
        self.averages = WeightAverages(dict(trained_parameters(task)), decays)
        self.clock = Clock()
        self.state = TrainingState(accelerator, task, self.optimizer, self.averages, self.clock, seed=config.seed)
        self.writer: Any = None
        # From here on, each process draws its own random numbers, if a model needs them.
        set_seed(config.seed, device_specific=True)

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

        In the end a checkpoint is saved, the last validation computed and the loss curve drawn, and the task holds the
        averaged weights. A training that has reached its limit before is left as it is.
        """
        self.resume()
        if not self.finished:
            on_main_process(self.accelerator, self._open_logs)
            self._run()
            self.synchronize_clock()
            # First of all: what follows may fail, as a validation that runs out of memory.
            self.save_checkpoint()
            self._conclude()
        self._use_average(0)
        self.task.eval()
        self.accelerator.wait_for_everyone()

    def finish(self, write: Callable[[], None]) -> None:
        """Calls `write` in all processes, which saves the trained models, unless that was done before for this step.

        Models with the other averages are saved in OUTPUT_DIR/averages/DECAY.
        """
        folder = self.accelerator.output_folder
        if not share(folder is not None and folder.is_finished(self.step)):
            write()
            for index, decay in enumerate(self.config.more_ema_decays if self.averages.decays else [], 1):
                self._use_average(index)
                target = self.output_dir / "averages" / f"{decay:g}"
                on_main_process(self.accelerator, lambda: self.task.save_pretrained(target))  # noqa: B023
                self._use_average(0)
            on_main_process(self.accelerator, lambda: folder.finish(self.step) if folder is not None else None)
        self._unwrap()

    def _unwrap(self) -> None:
        """Gives up the wrapper of DDP, before the process group ends.

        As the last one to hold the group, it would wait for the group's threads, which wait for Python's lock.
        """
        self.model = self.task
        self.accelerator.free_memory()

    def optimize(self, batches: list[dict[str, Any]]) -> None:
        """Takes one optimizer step on batches, one for each forward pass.

        What is minimised is a mean over the elements of the global batch, so that neither the number of processes nor
        that of forward passes changes it. The gradients are averaged over both later, which is undone here.
        """
        accelerator, weights, sums = self.accelerator, self.task.loss_weights, self.state.losses
        counts = [self.task.counts(batch) for batch in batches]
        local = torch.stack([torch.stack([count[name].double() for name in weights]) for count in counts]).sum(0)
        global_counts = dict(zip(weights, accelerator.reduce(local, reduction="sum").clamp(min=1).float()))
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
        for batch in batches:
            with accelerator.accumulate(self.model):
                with part("forward"), autocast(accelerator):
                    losses: dict[str, Loss] = self.model(batch)
                parts = {name: losses[name].total * (scale / global_counts[name]) for name in weights}
                with part("backward"):
                    accelerator.backward(weighted_sum(parts, weights))
                sums.add(losses)
                if accelerator.sync_gradients:
                    parameters = list(self.averages.parameters.values())
                    norm = accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
                    # DeepSpeed clips by itself, and may not know the norm.
                    if norm is not None:
                        norm = whole(torch.as_tensor(norm, device=accelerator.device))
                        sums.add({"grad_norm": Loss(norm, torch.ones_like(norm))})
                with part("optimizer"):
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        with part("averages"):
            self.averages.update()
        self.clock.step += 1

    def synchronize_clock(self) -> None:
        """Sets the clocks of all processes to that of the main one, so that learning rates and the end agree."""
        self.clock.tick()
        if self.accelerator.num_processes > 1:
            seconds = torch.tensor([self.clock.seconds], device=self.accelerator.device)
            self.clock.seconds = float(broadcast(seconds))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Puts the averaged weights in place of the current ones, in evaluation mode and without compilation."""
        self.task.eval()
        try:
            with self.averages.applied(), torch.compiler.set_stance("force_eager"):
                reshard(self.task.modules())
                yield
        finally:
            reshard(self.task.modules())
            self.task.train()

    @torch.no_grad()
    def validate(self) -> None:
        """Computes validation losses and a picture with the averaged weights, the same noise every time."""
        if self.validation is None:
            return
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        # Random generators are afterwards as they were, so that a resumed training is the same.
        with self.averaged_weights(), torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            means = self.validation.losses(self.task, self.step)
            picture = self.validation.picture(self.task, self.step)
        self.write({f"validation/{name}": value for name, value in means.items()})
        self.show("pictures", picture, f"{self.step:07d}.png")

    def log(self, learning_rate: float, bar: tqdm) -> None:
        """Writes the means of the losses over all processes and the steps since the last entry."""
        values = self.state.losses.means(self.accelerator.reduce, self.task.loss_weights)
        self.state.losses.sums.clear()
        self.write({**values, "learning_rate": learning_rate, "minutes": self.clock.seconds / 60})
        bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{learning_rate:.1e}")

    def write(self, values: dict[str, float]) -> None:
        """Writes one entry to `metrics.jsonl` and to TensorBoard, in the main process alone."""
        if self.writer is None:
            return
        append_metrics(self.output_dir, {"step": self.step, **values})
        for name, value in values.items():
            self.writer.add_scalar(name if "/" in name else f"train/{name}", value, self.step)

    def show(self, name: str, picture: Image.Image, file: str) -> None:
        """Writes a picture to OUTPUT_DIR/pictures and to TensorBoard, in the main process alone."""
        if self.writer is not None:
            pixels = save_picture(picture, self.output_dir / "pictures" / file)
            self.writer.add_image(name, pixels, self.step, dataformats="HWC")

    def save_checkpoint(self) -> None:
        """Saves the complete state of training in OUTPUT_DIR/checkpoint-STEP, then deletes the oldest checkpoints.

        Raises:
            OSError: if it cannot be written, with the checkpoints that there are.
        """
        files, limit = self.state.files(), self.config.checkpoints_total_limit

        def save() -> None:
            try:
                save_checkpoint(self.output_dir, self.step, files)
            finally:
                exhaust(files)
            if limit is not None:
                limit_checkpoints(self.output_dir, limit)

        if not self.accelerator.is_main_process:
            exhaust(files)
        on_main_process(self.accelerator, save)

    def resume(self) -> None:
        """Loads the checkpoint that the configuration names and drops the results that are later than it."""
        folder = self.accelerator.output_folder
        checkpoint = folder.checkpoint if folder is not None else None
        if share(checkpoint is not None):
            self.state.load(checkpoint)
        if folder is not None and not self.finished:
            folder.start(self.config, self.step)
            drop_metrics_after(self.output_dir, self.step)

    def _run(self) -> None:
        """Takes optimizer steps until a limit is reached."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            log_balance(self.schedule, self.step)
        sampler = TrainingSampler(self.schedule, accelerator.process_index, start=self.step)
        pin_memory = accelerator.device.type == "cuda"
        batches = iter(make_loader(self.dataset, sampler, self.collate_fn, config.num_workers, pin_memory))
        # While the processes start that load data.
        compile_model_examples(self.task.kernel_examples(self.validation is not None), accelerator)
        bar = tqdm(
            total=config.max_train_steps, initial=self.step, desc="Training", disable=not accelerator.is_main_process
        )
        profiler = None
        if config.profile_steps and accelerator.is_main_process:
            profiler = StepProfiler(self.output_dir, config.profile_steps, accelerator.device)
        self.model.train()
        self.clock.start()
        while not self.finished:
            factor = learning_rate_factor(config, self.step, self.clock.seconds / 60) * phase_factor(config, self.step)
            for group, peak in zip(self.optimizer.param_groups, self.peaks):
                group["lr"] = peak * factor
            with part("data"):
                passes = [next(batches) for _ in range(accelerator.gradient_accumulation_steps)]
                passes = [send_to_device(batch, accelerator.device, non_blocking=True) for batch in passes]
            self.optimize(passes)
            if profiler is not None:
                profiler.step()
            bar.update()
            checkpoint_is_due = config.checkpointing_steps and self.step % config.checkpointing_steps == 0
            if checkpoint_is_due or self.step % CLOCK_STEPS == 0:
                self.synchronize_clock()
            if self.step % config.logging_steps == 0:
                self.log(config.learning_rate * factor, bar)
            # What follows the last step follows the loop.
            if config.validation_steps and self.step % config.validation_steps == 0 and not self.finished:
                self.validate()
            if checkpoint_is_due and not self.finished:
                self.save_checkpoint()
        if profiler is not None:
            profiler.close()
        bar.close()

    def _conclude(self) -> None:
        """Computes the last validation and draws the loss curve; an error says where the training is saved."""
        try:
            self.validate()
            if self.writer is not None:
                self.writer.close()
                plot_losses(self.output_dir)
        except Exception:
            logger.error(
                "All steps are done and saved in %s: `resume_from_checkpoint: latest` writes the models of it.",
                self.output_dir / f"checkpoint-{self.step}",
            )
            raise

    def _open_logs(self) -> None:
        """Opens the log of TensorBoard, in the main process."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.output_dir / "logs", purge_step=self.step + 1 if self.step else None)

    def _use_average(self, index: int) -> None:
        """Puts an average into the task for good; models that were sharded are whole afterwards."""
        if self.unsharded:
            use_unsharded(self.task, self.unsharded, self.averages.values[index] if self.averages.decays else {})
        else:
            self.averages.apply(index)


def exhaust(values: Iterator[Any]) -> None:
    """Takes all that is left of an iterator whose every item all processes make together."""
    for _ in values:
        pass


def stream_schedule(
    dataset: Dataset[Any], config: TrainingConfig, num_processes: int = 1, num_passes: int = 1
) -> BatchSchedule:
    """Returns batches of the configured length of samples without a resolution, in one phase without end."""
    length = len(cast(Sized, dataset))
    batches = StreamBatches(length, config.batch_size, config.seed, num_processes, num_passes)
    return BatchSchedule([(0, batches)])

"""The trainer of a fine-tuning: Accelerate's trackers, and meshes of validation images by the whole pipeline."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers
from diffusers import DiffusionPipeline
from PIL import Image

from .. import Direct3DS2Pipeline  # noqa: F401  (registers the pipeline with diffusers)
from ..geometry.mesh import export_mesh
from ..geometry.render import preview
from ..pipelines.image_processor import load_images
from .distributed import autocast, is_sharded, on_main_process
from .trainer import Trainer


logger = logging.getLogger(__name__)


def find_trackers(args: argparse.Namespace) -> list[str]:
    """Returns the names of the trackers of `--report_to`. TensorBoard's logs are the trainer's own.

    Raises:
        ImportError: if the package of a tracker is missing.
    """
    names = [name for name in args.report_to if name not in ("tensorboard", "none")]
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        raise ImportError(f"`report_to` needs the packages of its trackers: `pip install {' '.join(missing)}`")
    return names


def start_trackers(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Starts the trackers of `--report_to`; raises as `find_trackers`."""
    accelerator.log_with = filter_trackers(find_trackers(args))
    settings = {name: value for name, value in vars(args).items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers(args.tracker_project_name, settings)


class ValidationImages:
    """Pictures of objects, of which the whole pipeline makes meshes while one of its transformers is trained.

    Args:
        paths: Files of the pictures.
        folder: Folder of the pipeline.
        component: Name of the transformer that is trained.
        trained: The transformers that are trained already, by name, with their adapters.
        seed: Seed of the noise, the same every time.
    """

    def __init__(self, paths: list[Path], folder: Path, component: str, trained: dict[str, Any], seed: int):
        self.paths, self.folder, self.component, self.seed = paths, folder, component, seed
        self.trained = trained

    def generate(self, task: Any, output: Path) -> list[Image.Image]:
        """Writes a mesh of each picture to `output` and returns pictures of the meshes, beside the given ones.

        The pipeline has the transformer, VAE and image encoder of a `DiTTask`; all else is loaded for this alone.
        """
        device = next(task.transformer.parameters()).device
        vae = self.component.replace("transformer", "vae")
        own = {self.component: task.transformer, vae: task.vae, "image_encoder": task.image_encoder}
        pipe: Any = DiffusionPipeline.from_pretrained(self.folder, **{**self.trained, **own}).to(device)
        pipe.set_progress_bar_config(disable=True)
        pictures = []
        for path in self.paths:
            try:
                (image,) = load_images(path)
                mesh = pipe(image, generator=torch.Generator().manual_seed(self.seed)).meshes[0]
                output.mkdir(parents=True, exist_ok=True)
                export_mesh(mesh, output / f"{path.stem}.glb")
                pictures.append(preview(mesh, image, size=256))
            except Exception as error:
                # A model that has only begun to learn may make nothing of a picture, or more than fits into memory.
                logger.warning("No mesh of the validation image %s: %s", path, error)
        return pictures


class FineTuner(Trainer):
    """A trainer that also writes to Accelerate's trackers and makes meshes of validation images."""

    images: ValidationImages | None = None

    def write(self, values: dict[str, float]) -> None:
        """Writes one entry to the log files and to all trackers, in the main process alone."""
        super().write(values)
        named = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        self.accelerator.log(named, step=self.step)

    def show(self, name: str, picture: Image.Image, file: str) -> None:
        """Writes a picture to a file, to TensorBoard and to all trackers, in the main process alone."""
        super().show(name, picture, file)
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(picture)}, step=self.step)
            else:
                tracker.log_images({name: [picture]}, step=self.step)

    @torch.no_grad()
    def validate(self) -> None:
        """Validates as any training, then makes meshes of the validation images with the averaged weights."""
        super().validate()
        images = self.images
        if images is None or not images.paths:
            return
        if is_sharded(self.accelerator):
            logger.warning("Validation images are left out: with sharded weights, one process alone cannot use them.")
            return
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        folder = self.output_dir / "meshes" / f"{self.step:07d}"
        with self.averaged_weights(), torch.random.fork_rng(devices), autocast(self.accelerator):
            on_main_process(self.accelerator, lambda: self._show_meshes(images, folder))

    def _show_meshes(self, images: ValidationImages, folder: Path) -> None:
        """Makes and shows meshes of the validation images; what fails of it is a warning, not the training's end."""
        try:
            self._show_all(images.generate(self.task, folder))
        except Exception as error:
            logger.warning("No meshes of the validation images: %s", error)

    def _show_all(self, pictures: list[Image.Image]) -> None:
        """Shows pictures of equal width, one below the other."""
        if not pictures:
            return
        column = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)), "white")
        top = 0
        for picture in pictures:
            column.paste(picture, (0, top))
            top += picture.height
        self.show("validation images", column, f"validation-{self.step:07d}.png")

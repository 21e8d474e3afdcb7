"""Generations that report their progress, and stop when they are told to or take too long."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import trimesh
from PIL import Image

from ..geometry.cell_mesh import cells_to_mesh
from ..geometry.clean_up import MeshCleanUp
from ..pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline
from ..pipelines.selection import score_mesh
from ..pipelines.stages import DenseStage


logger = logging.getLogger(__name__)


class GenerationError(Exception):
    """Something that the user should read: the message was written for them."""


@dataclass(frozen=True)
class Request:
    """
    What a user asks for.

    Attributes:
        pictures: RGBA, the object as alpha.
        seeds: one mesh for each, of each picture.
        resolution: samples per axis.
        steps: denoising steps of each stage, in the order of `stages`; the model's own for None.
        guidance_scales: likewise.
        level: iso-level of the surface.
        clean_up: applied to each mesh.
    """

    pictures: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    resolution: int
    steps: tuple[int | None, int | None] = (None, None)
    guidance_scales: tuple[float | None, float | None] = (None, None)
    level: float = 0.0
    clean_up: MeshCleanUp = field(default_factory=MeshCleanUp)


@dataclass(frozen=True)
class Progress:
    """
    One piece of news of a generation.

    Attributes:
        text: what is being done.
        share: of the work of this text that is done, 0 to 1; None where nobody knows.
        seed: whose mesh it is.
        photo: the index of its picture.
        shape: a shape to look at, if there is a new one.
        finished: whether this mesh is done: `shape` is the one that was asked for; without one, `text` says why.
        score: how well that mesh fits the picture, where there are several seeds; see `pipelines.selection.MeshScore`.
    """

    text: str
    share: float | None
    seed: int
    shape: trimesh.Trimesh | None = None
    finished: bool = False
    score: float | None = None
    photo: int = 0


class Generator:
    """
    Runs one request at a time on a pipeline.

    Args:
        pipeline: the pipeline, on its device.
        time_limit: seconds after which a generation is stopped.
    """

    def __init__(self, pipeline: Direct3DS2Pipeline, time_limit: float = 600.0):
        self.pipeline = pipeline
        self.time_limit = time_limit
        self._lock = threading.Lock()

    def run(self, request: Request) -> Iterator[Progress]:
        """
        Generate, in a thread of its own: all seeds of one picture, then those of the next. Closing the iterator stops
        the work after the running step.

        Yields:
            [`Progress`], of each seed of each picture the last with the finished mesh. Of several, those that fail say
            why in their last one, and the others go on.

        Raises:
            GenerationError: if nothing is left to do: the time limit is exceeded, or the model finds no object or
                surface for the only mesh.
        """
        news: queue.Queue[Progress | BaseException | None] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                with self._lock:
                    deadline = time.monotonic() + self.time_limit
                    for photo, seed in itertools.product(range(len(request.pictures)), request.seeds):
                        if not stop.is_set():
                            self._generate_or_say_why(request, photo, seed, news, stop, deadline)
            except BaseException as error:  # passed on to the thread that reads the news
                news.put(error)
            finally:
                news.put(None)

        thread = threading.Thread(target=work, name="generation", daemon=True)
        thread.start()
        try:
            while (item := news.get()) is not None:
                if isinstance(item, ValueError):
                    raise GenerationError(str(item)) from item
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def wait(self, timeout: float) -> None:
        """Waits until no generation runs, at most `timeout` seconds."""
        if self._lock.acquire(timeout=timeout):
            self._lock.release()

    def _generate_or_say_why(
        self, request: Request, photo: int, seed: int, news: queue.Queue, stop: threading.Event, deadline: float
    ) -> None:
        """Puts the news of one mesh into the queue, of one of several also that it failed."""
        try:
            self._generate(request, photo, seed, news, stop, deadline)
        except (GenerationError, ValueError) as error:
            if len(request.pictures) * len(request.seeds) == 1 or time.monotonic() > deadline:
                raise
            text = str(error)
            if not isinstance(error, GenerationError):
                # What it says may hold paths of the server: it goes to the log alone.
                logger.exception("A mesh of several failed")
                text = "The generation failed."
            news.put(Progress(text, 1.0, seed, finished=True, photo=photo))

    def _generate(
        self, request: Request, photo: int, seed: int, news: queue.Queue, stop: threading.Event, deadline: float
    ) -> None:
        """Puts the news of one mesh into the queue."""
        names = {"dense": "Finding the rough shape", "sparse": "Adding detail", "sparse_1024": "Adding fine detail"}
        late, cells = False, torch.empty(0, 4)
        second = self.pipeline.resolutions.index(request.resolution) > 0

        def on_step(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
            nonlocal late, cells
            late = time.monotonic() > deadline
            pipe._interrupt = late or stop.is_set()
            done = (step + 1) / pipe.num_timesteps
            shape = None
            if pipe.stage == "dense" and done == 1 and not pipe.interrupt:
                cells = self._find_cells(pipe.dense_stage, tensors["latents"])
                shape = cells_to_mesh(cells[:, 1:].cpu().numpy(), pipe.dense_stage.resolution)
            elif pipe.stage == "sparse" and done == 1 and second and not pipe.interrupt:
                surface = (request.level, pipe.config.default_max_opening)
                shape = pipe.extract_meshes(pipe.sparse_stages[0], tensors["latents"], cells, 1, *surface)[0]
            news.put(Progress(names[pipe.stage], done, seed, shape, photo=photo))

        picture = request.pictures[photo]
        mask = picture.getchannel("A")
        news.put(Progress("Looking at the picture", None, seed, photo=photo))
        output = self.pipeline(
            picture,
            mask_image=mask,
            resolution=request.resolution,
            dense_num_inference_steps=request.steps[0],
            num_inference_steps=request.steps[1],
            num_inference_steps_1024=request.steps[1] if second else None,
            dense_guidance_scale=request.guidance_scales[0],
            guidance_scale=request.guidance_scales[1],
            level=request.level,
            remove_floaters=request.clean_up.remove_floaters,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=on_step,
        )
        if stop.is_set():
            return
        if late:
            raise GenerationError(
                f"The generation took longer than {self.time_limit:.0f} seconds and was stopped. Fewer steps or a"
                " lower resolution take less time."
            )
        mesh = output.meshes[0]
        if len(mesh.faces) == 0:
            raise GenerationError("The model found no surface. Try another seed.")
        news.put(Progress("Cleaning up", None, seed, mesh, photo=photo))
        mesh = request.clean_up(mesh)
        several = len(request.seeds) > 1
        score = self._score(mesh, picture, mask) if several else None
        news.put(Progress("Done", 1.0, seed, mesh, finished=True, score=score, photo=photo))

    def _score(self, mesh: trimesh.Trimesh, picture: Image.Image, mask: Image.Image) -> float:
        """The score that the pipeline's `select` gives a mesh, by the mask that the image encoder gets."""
        _, masks = self.pipeline.image_processor.preprocess(picture, mask)
        return score_mesh(mesh, masks[:, 0].numpy()).score

    def _find_cells(self, stage: DenseStage, latents: torch.Tensor) -> torch.Tensor:
        """The occupied cells, `[N, 4]` int32.

        Raises:
            GenerationError: if there are none.
        """
        try:
            return stage.find_cells(latents)
        except ValueError as error:
            raise GenerationError("The model found no shape in this photo. Try another seed or more steps.") from error

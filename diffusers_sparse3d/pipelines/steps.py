"""The steps of a generation, as methods of the pipeline: encode the image, denoise, decode, find the next cells."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import trimesh
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_integer
from ..geometry.cavities import fill_cavities
from ..geometry.clean_up import MeshCleanUp
from ..geometry.marching_cubes import sparse_sdf_to_mesh
from ..geometry.mesh import normalize_mesh
from ..geometry.surface_cells import cells_near_surface
from ..models.cuda_graphs import replaying_cuda_graphs
from ..sparse_tensor import SparseTensor
from .conditioning import encode_image
from .guards import report_empty, warn_of_meshes
from .inputs import check_generator, checked_replacements, stage_setting
from .kernel_compilation import StageCall, compile_stages
from .pipeline_output import Direct3DS2PipelineOutput, pad_samples
from .progress import named_progress_bar
from .several_pictures import make_velocity
from .stages import SparseStage, Stage
from .step_cache import StepCache, steps_in_interval
from .timesteps import set_timesteps, step_arguments


Callback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
_Call = TypeVar("_Call", bound=Callable[..., Any])


def one_call_at_a_time(call: _Call) -> _Call:
    """A decorator of a method that refuses to run while it runs for the same pipeline, in a thread or a callback.

    What interrupts a call ends with it: steps called afterwards run.

    Raises:
        RuntimeError: then, before any work.
    """

    @functools.wraps(call)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = object()
        # One operation, so that of two threads exactly one finds its own object.
        if vars(self).setdefault("_running_call", own) is not own:
            raise RuntimeError(
                "This pipeline is running already, in another thread or in a callback of its own. Another pipeline"
                " with the same weights may run beside it: `type(pipe).from_pipe(pipe)`."
            )
        try:
            self._interrupt = False
            return call(self, *args, **kwargs)
        finally:
            self._interrupt = False
            del vars(self)["_running_call"]

    return cast(_Call, guarded)


class GenerationSteps(DiffusionPipeline):
    """
    The steps that `__call__` of a pipeline with stages is made of, and what callbacks may ask about the running stage.

    The steps can be called one by one. They keep gradients unless called under `torch.no_grad()`, as `__call__` does.
    """

    _callback_tensor_inputs = ["latents", "encoder_hidden_states"]
    _stage: str | None = None
    _interrupt = False
    _guidance_scale: float
    _num_timesteps: int
    _current_timestep: float | None = None
    _batches_guidance = True
    _max_graph_tokens: int | None = 32_768
    # For which calls kernels were compiled.
    _compiled_ahead: frozenset[str] = frozenset()
    # What `from_pipe` takes over beside the components and the configuration.
    _settings_of_steps = ("_batches_guidance", "_max_graph_tokens", "_progress_bar_config")

    def enable_guidance_batching(self) -> None:
        """Predict with and without the image by one call of the transformer for twice as many samples, the default."""
        self._batches_guidance = True

    def disable_guidance_batching(self) -> None:
        """Predict with and without the image by two calls of the transformer: less memory, more time."""
        self._batches_guidance = False

    def enable_cuda_graphs(self, max_tokens: int | None = 32_768) -> None:
        """
        Replay the steps of a stage as CUDA graphs, the default: the first step runs, the second is captured.

        A step of few tokens waits for what launches its work, a replay does not. A graph holds the memory of a step,
        some 16 KiB a token of the published transformers in half precision, until its stage is done. On a CPU, and
        where `diffusers_sparse3d.models.cuda_graphs.capture_key` says why not, steps run as they are.

        Args:
            max_tokens: steps with more tokens run as they are, because a GPU has enough to do with them; with guidance
                in one batch, all tokens of both predictions count. No limit if None.

        Raises:
            ValueError: if `max_tokens` is no integer of at least 0.
        """
        self._max_graph_tokens = None if max_tokens is None else check_integer("max_tokens", max_tokens, 0)

    def disable_cuda_graphs(self) -> None:
        """Run all steps as they are, see `enable_cuda_graphs`."""
        self._max_graph_tokens = 0

    def compile_kernels(self, batch_size: int = 1) -> None:
        """
        Compile the kernels that calls with the default settings launch, many at a time.

        The first call does so by itself; a server may do it before the first picture comes. What is compiled is kept
        on disk, in triton's cache, and found there by later processes. Does nothing on a CPU.

        Args:
            batch_size: number of meshes of a call.

        Raises:
            ValueError: if `batch_size` is no positive integer.
        """
        check_integer("batch_size", batch_size, 1)
        guided = {stage.name: stage_setting(self.config, stage.name, "guidance_scale") > 1 for stage in self.stages}
        self._compile_kernels(self.stages, batch_size, guided, self.config.default_max_opening)

    def _compile_kernels(
        self, stages: Sequence[Stage], batch_size: int, guided: Mapping[str, bool], max_opening: float
    ) -> None:
        """Compile the kernels of stages, unless they were compiled for such a call before.

        Args:
            stages: that will run.
            batch_size: number of samples.
            guided: by the name of a stage, whether there is guidance.
            max_opening: as in `extract_meshes`.
        """
        calls = []
        for stage in stages:
            # As `GuidedVelocity` does. Of more samples, two are enough for an example.
            both = guided[stage.name] and self._batches_guidance
            calls.append(StageCall(stage, min(2, batch_size * (1 + both)), int(both), max_opening))

        def show_progress(total: int) -> Any:
            # Kernels in triton's cache take less than a second.
            settings = {"desc": "Compiling kernels", "delay": 1.0, **getattr(self, "_progress_bar_config", {})}
            return tqdm(total=total, **settings)

        self._compiled_ahead = compile_stages(calls, self._compiled_ahead, show_progress)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """
        A pipeline with the components and settings of another one, as in diffusers, but with schedulers of its own.

        So both may run at once, in two threads. What is switched on for a model, such as a cache or offloading, is on
        for both, and with it only one of them may run. Weights are shared and stay as they are: only where a `dtype`
        is given are they cast, in both pipelines, neither of which may run meanwhile.

        Args:
            pipeline: the other pipeline.
            kwargs: components in place of its own, and further settings as in diffusers.
        """
        schedulers = {
            name: copy.deepcopy(part)
            for name, part in pipeline.components.items()
            if isinstance(part, SchedulerMixin) and name not in kwargs
        }
        own_class = cls
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            # diffusers ends with `to(dtype=torch.float32)` where no dtype is given.
            own_class = type(cls.__name__, (cls,), {"__module__": cls.__module__, "to": lambda self, **_: self})
        new = super(GenerationSteps, own_class).from_pipe(pipeline, **schedulers, **kwargs)
        if type(new) is own_class:
            new.__class__ = cls
        for name in cls._settings_of_steps:
            if name in vars(pipeline):
                setattr(new, name, copy.copy(vars(pipeline)[name]))
        return new

    @property
    def stages(self) -> list[Stage]:
        """The stages that have all their components, in the order of use: the dense one, then the sparse ones."""
        raise NotImplementedError

    @property
    def stage(self) -> str | None:
        """Name of the stage while it denoises, "dense", "sparse" or "sparse_1024", for callbacks; else None."""
        return self._stage

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the stage that runs."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the stage that runs makes an unconditional prediction too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the stage that runs."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> float | None:
        """Timestep of the running step, from 1000 down to 0, which caches ask for; None outside of the steps."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether to leave out all further denoising steps; a callback sets `_interrupt`."""
        return self._interrupt

    def encode_image(
        self,
        pixel_values: Tensor,
        mask: Tensor,
        num_meshes_per_image: int = 1,
        stages: Sequence[Stage] | None = None,
    ) -> tuple[dict[str, Tensor], ...]:
        """
        Conditioning of each stage, as keyword arguments of its transformer.

        Args:
            pixel_values: `[B, 3, S, S]` float32, from the image processor.
            mask: `[B, 1, S, S]` float32, likewise; 1 on the foreground.
            num_meshes_per_image: how often to repeat the tokens of each image.
            stages: the stages to condition; if None the dense and the first sparse one.

        Returns:
            A dictionary for each stage, with `encoder_hidden_states [B * num_meshes_per_image, L, D]`; or, for sparse
            conditioning, packed `[M, D]` with `encoder_coords [M, 4]`.

        Raises:
            ValueError: if an image has no foreground.
        """
        tokens = encode_image(self.image_encoder, pixel_values).repeat_interleave(num_meshes_per_image, dim=0)
        mask = mask.repeat_interleave(num_meshes_per_image, dim=0)
        patch_size = self.image_encoder.config.patch_size
        stages = self.stages[:2] if stages is None else stages
        return tuple(stage.prepare_conditioning(tokens, mask, patch_size) for stage in stages)

    def denoise(
        self,
        stage: Stage,
        latents: Tensor,
        transformer_arguments: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        batch_size: int,
        num_inference_steps: int,
        guidance_scale: float,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        multiple_images: str = "alternate",
        generator: torch.Generator | list[torch.Generator] | None = None,
        picture_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """
        The denoising loop of one stage, with the classifier-free guidance of [`GuidedVelocity`].

        Args:
            stage: the stage.
            latents: the noise, `[B, C, r, r, r]` of a dense or `[N, C]` of a sparse stage.
            transformer_arguments: what the transformer takes at each step beside latents and timestep: from
                `encode_image`, and for a sparse stage completed by `SparseStage.transformer_arguments`. A list of
                them for several pictures of each object.
            batch_size: number of samples, B.
            num_inference_steps: steps of the scheduler.
            guidance_scale: scale of the guidance; up to 1 there is none.
            attention_kwargs: passed to the transformer.
            callback_on_step_end: see `__call__` of the pipeline.
            callback_on_step_end_tensor_inputs: likewise.
            guidance_interval: (start, stop) in shares of the steps: guidance is off before and after.
            multiple_images: what to do with several pictures, see `__call__` of the pipeline.
            generator: of the noise that some schedulers draw at each step; a list has one for each sample.
            picture_counts: to average, how many pictures each sample has, in the first of the `transformer_arguments`;
                by default as many as there are.

        Returns:
            The denoised latents, of the shape of `latents`.

        Raises:
            TypeError: if `generator` is something else.
            ValueError: if `generator` is a list of another length than `batch_size`, the transformer has a cache of
                diffusers that these steps or several pictures do not fit, or the callback returns something else than
                a dictionary of the tensors there are.
        """
        check_generator(generator, batch_size)
        scheduler = stage.scheduler
        self._guidance_scale = guidance_scale
        # A token is a cell: a row of a sparse stage, a place in the grid of the dense one.
        num_tokens = latents.shape[0] / batch_size if latents.ndim == 2 else latents[0, 0].numel()
        set_timesteps(scheduler, num_inference_steps, num_tokens, latents.device)
        scheduler.set_begin_index(0)
        self._num_timesteps = len(scheduler.timesteps)
        first = transformer_arguments if isinstance(transformer_arguments, Mapping) else transformer_arguments[0]
        if isinstance(stage, SparseStage):
            copies = 2 if guidance_scale > 1 and self._batches_guidance else 1
            stage.warn_of_memory(first["coords"], batch_size, copies)
        noise_arguments = step_arguments(scheduler, generator, first.get("coords"))
        cache = StepCache(stage.transformer)
        timesteps = scheduler.timesteps.tolist()
        guided_steps = steps_in_interval(guidance_interval, self._num_timesteps)
        cache.check(self._num_timesteps, guided_steps if guidance_scale > 1 else range(0), self._batches_guidance)
        common = {"attention_kwargs": attention_kwargs, "return_dict": False}
        options = (batch_size, self._batches_guidance, multiple_images, picture_counts)
        velocity = make_velocity(stage.transformer, transformer_arguments, common, *options)

        graphs = replaying_cuda_graphs(self._max_graph_tokens)
        name = f"{stage.name.replace('_', ' ').capitalize()} stage"
        progress = named_progress_bar(self, name, self._num_timesteps)
        with self._in_stage(stage.name), graphs, progress as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timesteps[i]
                scale = self.guidance_scale if i in guided_steps else 1.0
                cache.start_step(guided=scale > 1)
                prediction = velocity(latents, t, scale)
                latents = scheduler.step(prediction, t, latents, return_dict=False, **noise_arguments)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "encoder_hidden_states": velocity.encoder_hidden_states}
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors.update(checked_replacements(callback_on_step_end(self, i, t, callback_kwargs), tensors))
                    latents = tensors["latents"]
                    velocity.encoder_hidden_states = tensors["encoder_hidden_states"]
                progress_bar.update()
        return latents

    @contextmanager
    def _in_stage(self, name: str) -> Iterator[None]:
        """Let callbacks see the stage and its timestep inside the `with` block, and nobody afterwards."""
        self._stage = name
        try:
            yield
        finally:
            self._stage = self._current_timestep = None

    def decode(self, stage: SparseStage, latents: Tensor, coords: Tensor, batch_size: int) -> Iterator[SparseTensor]:
        """
        Signed distances of one sample after the other, refined where the stage has a refiner.

        Args:
            stage: a sparse stage.
            latents: `[N, C]`, normalised, as the transformer gives them.
            coords: `[N, 4]` int32 (sample, x, y, z), their cells.
            batch_size: number of samples.

        Yields:
            `feats [V, 1]`, s / tau, positive outside, at `coords [V, 4]` with batch index 0: 512 samples for each
            cell, and with a sign refiner the samples around them.
        """
        with named_progress_bar(self, f"Decoding {stage.resolution}^3", batch_size) as progress_bar:
            for index in range(batch_size):
                yield stage.decode_latents(latents, coords, index)
                progress_bar.update()

    def extract_meshes(
        self,
        stage: SparseStage,
        latents: Tensor,
        coords: Tensor,
        batch_size: int,
        level: float,
        max_opening: float = 0.0,
    ) -> list[trimesh.Trimesh]:
        """
        The surface of every sample, by marching cubes on what `decode` yields.

        Args:
            stage, latents, coords, batch_size: as `decode` takes them.
            level: iso-level of the surface, 0 to 0.2 in units of the narrow band.
            max_opening: width of the openings behind which [`~geometry.cavities.fill_cavities`] fills.

        Returns:
            A mesh for each sample, in model space [-1, 1]^3; without faces where there is no surface, or no cell.
        """
        meshes, resolution, level = [], stage.resolution, stage.iso_level(level)
        for sdf in self.decode(stage, latents, coords, batch_size):
            rows = fill_cavities(sdf.feats, sdf.coords, resolution, level, max_opening)
            meshes.append(sparse_sdf_to_mesh(*rows, resolution, level))
        return meshes

    def find_cells(
        self,
        stage: SparseStage,
        finer_stage: SparseStage,
        latents: Tensor,
        coords: Tensor,
        batch_size: int,
        level: float,
        clean_up: MeshCleanUp,
        max_opening: float = 0.0,
    ) -> Tensor:
        """
        The cells of the next stage: those with a sample in the narrow band of the normalised surface of this stage.

        Args:
            stage, latents, coords, batch_size: as `decode` takes them.
            finer_stage: the stage whose cells to find.
            level, max_opening: of the surface, as `extract_meshes` takes them.
            clean_up: removes parts of the surface beforehand.

        Returns:
            `[N, 4]` int32 (sample, x, y, z), ascending, below `finer_stage.latent_resolution`. A warning names samples
            without a surface, which have no cells.

        Raises:
            ValueError: if no sample has a surface.
        """
        meshes = self.extract_meshes(stage, latents, coords, batch_size, level, max_opening)
        meshes = [clean_up.remove_parts(mesh) for mesh in meshes]
        empty = [index for index, mesh in enumerate(meshes) if len(mesh.faces) == 0]
        report_empty(
            empty,
            batch_size,
            "The first sparse stage left no surface for {} (index in the batch). Try another seed of `generator`, more"
            " `num_inference_steps` or a `guidance_scale` closer to the default.",
        )
        resolution, cell_size = finer_stage.resolution, finer_stage.vae.spatial_compression_ratio
        cells = []
        for index, mesh in enumerate(meshes):
            if index in empty:
                continue
            near = cells_near_surface(normalize_mesh(mesh)[0], resolution, cell_size, device=coords.device)
            cells.append(torch.nn.functional.pad(near, (1, 0), value=index))
        return torch.cat(cells)

    def make_output(
        self,
        output_type: str,
        stage: SparseStage,
        latents: Tensor,
        coords: Tensor,
        batch_size: int,
        level: float,
        clean_up: MeshCleanUp,
        max_opening: float = 0.0,
    ) -> Direct3DS2PipelineOutput:
        """
        The output of a call from the latents of the last stage.

        Args:
            output_type: "mesh", "sdf", "latent" or "pt".
            stage, latents, coords, batch_size, level, max_opening: as `extract_meshes` takes them.
            clean_up: of the meshes.
        """
        interrupted = True if self.interrupt else None
        if output_type == "pt":
            latents, coords = pad_samples(latents, coords, batch_size)
        if output_type in ("pt", "latent"):
            return Direct3DS2PipelineOutput(latents=latents, coords=coords, interrupted=interrupted)
        if output_type == "sdf":
            return Direct3DS2PipelineOutput(sdfs=list(self.decode(stage, latents, coords, batch_size)))
        meshes = self.extract_meshes(stage, latents, coords, batch_size, level, max_opening)
        meshes = [clean_up(mesh) for mesh in meshes]
        warn_of_meshes(meshes)
        return Direct3DS2PipelineOutput(meshes=meshes)

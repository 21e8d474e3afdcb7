"""The kernels of a pipeline, compiled before its first call: many at a time, where the call would wait for each.

`compile_stages` gives `ops.runtime.compile_ahead` an example of what each model of a stage does. Cells are those of a
sphere, of which there are about as many as of an object, so that the same kernels are chosen. What plans read from
coordinates is computed; the models themselves are called on tensors without values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor, nn

from ..geometry.cavities import fill_cavities
from ..models.cuda_graphs import differs_from_its_class
from ..models.refiner_patches import coarse_volume
from ..models.refiner_sdf import SIGN_DOWNSAMPLING
from ..ops.runtime.collection import Example
from ..ops.runtime.dispatch import HAS_TRITON
from ..ops.runtime.settings import current_settings
from .stages import DenseStage, SparseStage, Stage


logger = logging.get_logger(__name__)

# Blocks of a transformer are all alike, but for those of the sparse one, of which every second one shifts its windows.
_BLOCKS = 2
# Of the grid that the decoder of a sparse VAE is shown, whose kernels are the same for more cells.
_DECODER_CELLS = 32
# A picture of 518 pixels in patches of 14; of these, an object covers about a half.
_PATCHES = 37
_FIELD_RESOLUTION = 32


class StageCall(NamedTuple):
    """What a stage will be called for.

    Attributes:
        stage: its models.
        samples: in a call of the transformer, with those that are predicted without an image.
        unconditional: how many of them are.
        max_opening: as of the pipeline.
    """

    stage: Stage
    samples: int
    unconditional: int
    max_opening: float

    @property
    def key(self) -> str:
        """What tells calls with other kernels apart: kernels are compiled for one sample, and for any other number."""
        transformer = self.stage.transformer
        models = [transformer, self.stage.vae, getattr(self.stage, "refiner", None)]
        processors = sorted(
            {type(part.processor).__name__ for part in transformer.modules() if hasattr(part, "processor")}
        )
        numbers = (self.samples > 1, self.unconditional > 0, self.max_opening > 0)
        return repr((self.stage.name, [_description(model) for model in models], processors, numbers))

    def examples(self) -> Iterator[Example]:
        """What the stage does, from its noise to signed distances.

        Models on other devices, and those that have hooks, are compiled, quantised or run on several GPUs are left
        out: their calls may have effects.
        """
        stage, device = self.stage, self.stage.transformer.device
        if _is_plain(stage.transformer, device):
            yield lambda: dense_transformer(self) if isinstance(stage, DenseStage) else sparse_transformer(self)
        if _is_plain(stage.vae, device):
            yield lambda: dense_decoder(stage) if isinstance(stage, DenseStage) else sparse_decoder(stage)
        if isinstance(stage, SparseStage):
            if stage.refiner is not None and _is_plain(stage.refiner, device):
                yield lambda: refiner(stage)
            if self.max_opening > 0:
                yield lambda: cavities(device)


def compile_stages(
    calls: Sequence[StageCall], done: frozenset[str], show_progress: Callable[[int], Any]
) -> frozenset[str]:
    """Compile the kernels of calls, and wait for them. Does nothing on a CPU or with one processor.

    Args:
        calls: of the stages of a pipeline, which are on one device.
        done: keys of the calls whose kernels were compiled before.
        show_progress: as in `compile_ahead`.

    Returns:
        The keys of all calls whose kernels were compiled.
    """
    missing = {key: call for call in calls if (key := call.key) not in done}
    device = next((call.stage.transformer.device for call in missing.values()), torch.device("cpu"))
    settings = current_settings()
    if not (HAS_TRITON and device.type == "cuda" and settings.kernels and settings.compile_ahead):
        return done
    from ..ops.runtime.compile_ahead import CompiledBefore, can_compile_ahead, compile_ahead

    if can_compile_ahead(device):
        before = CompiledBefore(repr(sorted(missing)), device)
        if not before:
            examples = [example for call in missing.values() for example in call.examples()]
            result = compile_ahead(examples, device, show_progress)
            for error in result.errors:
                logger.info(f"Kernels that were not compiled ahead will be when they are needed: {error!r}")
            # With an error too: it would be the same again, and take as long.
            before.note()
    return done | missing.keys()


def _description(model: Any) -> Any:
    """What the kernels of a model depend on: not where its weights are from."""
    if model is None:
        return None
    config = sorted((name, value) for name, value in model.config.items() if not name.startswith("_"))
    return type(model).__name__, config, model.dtype, str(model.device)


def _is_plain(model: Any, device: torch.device) -> bool:
    """Whether a call of a model does nothing but compute, with weights that are plain tensors on a device."""
    # Of context parallelism, each call is an exchange with other processes.
    effects = (getattr(model, name, None) for name in ("hf_quantizer", "_parallel_config"))
    if model.device != device or any(effect is not None for effect in effects):
        return False
    return not any(differs_from_its_class(part) for part in model.modules())


def sphere_cells(resolution: int, samples: int, device: torch.device) -> Tensor:
    """`[N, 4]` int32 (sample, x, y, z): the cells near a sphere, the same for each sample."""
    axis = torch.arange(resolution, dtype=torch.int32, device=device)
    cells = torch.cartesian_prod(axis, axis, axis)
    distance = (cells - (resolution - 1) / 2).norm(dim=1) - 0.4 * resolution
    cells = cells[distance.abs() < 0.75]
    return torch.cat([F.pad(cells, (1, 0), value=sample) for sample in range(samples)])


def first_blocks(transformer: Any) -> Any:
    """A transformer with the first blocks of another one alone, and else its parts."""
    short = copy.copy(transformer)
    short._modules = dict(transformer._modules)
    short._modules["transformer_blocks"] = nn.ModuleList(list(transformer.transformer_blocks)[:_BLOCKS])
    return short


def dense_transformer(stage_call: StageCall) -> Callable[[], Any]:
    """A step of the dense stage."""
    original, samples, unconditional = stage_call.stage.transformer, stage_call.samples, stage_call.unconditional
    transformer, config = first_blocks(original), original.config
    place: dict[str, Any] = {"dtype": transformer.dtype, "device": transformer.device}

    def call() -> Any:
        latents = torch.empty(samples, config.in_channels, *(config.sample_size,) * 3, **place)
        tokens = torch.empty(samples - unconditional, 1 + _PATCHES**2, config.cross_attention_dim, **place)
        timestep = torch.empty(samples, device=transformer.device)
        return transformer(latents, timestep, tokens, num_unconditional=unconditional)

    return call


def dense_decoder(stage: DenseStage) -> Callable[[], Any]:
    """The decoding of a dense grid."""
    vae, config = stage.vae, stage.vae.config
    size = (1, config.latent_channels, *(stage.transformer.config.sample_size,) * 3)
    return lambda: vae.decode(torch.empty(size, dtype=vae.dtype, device=vae.device))


def sparse_transformer(stage_call: StageCall) -> Callable[[], Any]:
    """A step of a sparse stage."""
    original, samples = stage_call.stage.transformer, stage_call.samples
    transformer, config = first_blocks(original), original.config
    place: dict[str, Any] = {"dtype": transformer.dtype, "device": transformer.device}
    coords = sphere_cells(config.sample_size, samples, transformer.device)
    encoder_coords: Tensor | None = None
    tokens_shape: tuple[int, ...] = (samples, 1 + _PATCHES**2, config.cross_attention_dim)
    if config.sparse_conditioning:
        side = torch.arange(int(_PATCHES / 2**0.5), dtype=torch.int32, device=transformer.device)
        patches = F.pad(torch.cartesian_prod(side, side), (1, 1))
        encoder_coords = torch.cat([patches + patches.new_tensor([sample, 0, 0, 0]) for sample in range(samples)])
        tokens_shape = (len(encoder_coords), config.cross_attention_dim)
    cache, encoder_cache = transformer.plan(coords, samples, encoder_coords)

    def call() -> Any:
        return transformer(
            torch.empty(len(coords), config.in_channels, **place),
            cache.coords,
            torch.empty(samples, device=transformer.device),
            torch.empty(tokens_shape, **place),
            encoder_coords=None if encoder_cache is None else encoder_cache.coords,
            check_inputs=False,
            cache=cache,
            encoder_cache=encoder_cache,
        )

    return call


def sparse_decoder(stage: SparseStage) -> Callable[[], Any]:
    """The decoding of sparse latents."""
    vae = stage.vae
    coords = sphere_cells(min(_DECODER_CELLS, stage.latent_resolution), 1, vae.device)
    cache = vae.plan_decode(coords, 1)

    def call() -> Any:
        latents = torch.empty(len(coords), vae.config.latent_channels, dtype=vae.dtype, device=vae.device)
        options = {"return_features": stage.refiner_takes_features, "check_inputs": False, "cache": cache}
        return vae.decode(latents, cache.coords, **options)

    return call


def refiner(stage: SparseStage) -> Callable[[], Any]:
    """The refinement of a patch."""
    model: Any = stage.refiner
    config, place = model.config, {"dtype": model.dtype, "device": model.device}

    def patch(channels: int) -> Tensor:
        # The channels are last in memory, as `scatter_to_patches` lays them out.
        return torch.empty(1, *(config.patch_size,) * 3, channels, **place).movedim(-1, 1)

    if stage.refiner_takes_features:
        return lambda: model(patch(config.in_channels), patch(config.feature_channels))
    cells = sphere_cells(_FIELD_RESOLUTION, 1, model.device)
    coarse_volume(torch.zeros(len(cells), config.in_channels, **place), cells, SIGN_DOWNSAMPLING)
    return lambda: model(patch(config.in_channels))


def cavities(device: torch.device) -> None:
    """The filling of a hollow sphere, which is computed."""
    axis = torch.arange(_FIELD_RESOLUTION, dtype=torch.int32, device=device)
    coords = torch.cartesian_prod(axis, axis, axis)
    distance = (coords - (_FIELD_RESOLUTION - 1) / 2).norm(dim=1) - _FIELD_RESOLUTION / 3
    near = distance.abs() < 3
    # Balls of one sample: for others the kernels are the same.
    fill_cavities(distance[near].abs() / 3 - 0.5, coords[near], _FIELD_RESOLUTION, 0.0, 4 / _FIELD_RESOLUTION)

"""The kernels that a pipeline compiles ahead are those that its models launch. On a CPU, where nothing is compiled."""

import shutil

import pytest
import torch

from diffusers_sparse3d.geometry.sdf import block_grid
from diffusers_sparse3d.models import kernel_examples
from diffusers_sparse3d.models.attention_processors import WindowAttnProcessor
from diffusers_sparse3d.ops.runtime import compile_ahead, runtime_settings
from diffusers_sparse3d.pipelines import kernel_compilation
from diffusers_sparse3d.pipelines.kernel_compilation import StageCall, compile_stages
from tests.ops.kernel_testing import DEVICE, NATIVE, compiled_names, needs_gpu, without_gpu
from tests.ops.watched_launches import watched  # noqa: F401 - a fixture

from .tiny import tiny_coords, tiny_image, tiny_pipeline, tiny_refiners, tiny_second_stage


CPU = torch.device("cpu")


def examples_of(*calls: StageCall) -> list:
    return [example for call in calls for example in call.examples()]


@without_gpu
@torch.no_grad()
def test_models_launch_what_was_compiled_ahead(watched):  # noqa: F811
    refiners = tiny_refiners()
    for name, refiner in refiners.items():
        # Small patches, for the interpreter.
        refiners[name] = type(refiner).from_config({**refiner.config, "patch_size": 4, "patch_stride": 4}).eval()
    pipe = tiny_pipeline(**tiny_second_stage(), **refiners)
    dense, sparse, finer = pipe.stages
    calls = (StageCall(dense, 2, 1, 0.0), StageCall(sparse, 1, 0, 0.1), StageCall(finer, 1, 0, 0.0))
    result = compile_ahead.compile_ahead(examples_of(*calls), CPU)
    assert result.errors == [] and result.num_kernels > 30 and watched.launched == set()

    # Cells of a sphere, but another number of them than in the example.
    coords, few = kernel_examples.sphere_cells(5, 1, CPU)[1:], kernel_examples.sphere_cells(3, 1, CPU)[:9]
    dense.transformer(
        torch.randn(2, 2, 4, 4, 4), torch.tensor([500.0, 500]), torch.randn(1, 17, 16), num_unconditional=1
    )
    dense.vae.decode(torch.randn(1, 2, 4, 4, 4))
    tokens, token_coords = torch.randn(6, 16), torch.nn.functional.pad(torch.arange(6)[:, None], (1, 2)).int()
    sparse.transformer(torch.randn(len(coords), 4), coords, torch.tensor([500.0]), tokens, token_coords)
    decoded = sparse.vae.decode(torch.randn(len(few), 4), few, return_features=True)
    own = {"output_coords": decoded.coords[:1]}
    sparse.refiner.refine(decoded.sample, decoded.coords, decoded.features, **own)
    unknown = decoded.coords[:1] + 8
    finer.refiner.refine(decoded.sample, decoded.coords, output_coords=unknown)
    assert len(watched.launched) > 20 and watched.launched <= watched.ahead


def test_the_example_of_cavities_floods(monkeypatch):
    flooded, original = [], block_grid.BlockGrid.flood_from_outside
    flood = lambda *arguments: (flooded.append(1), original(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(block_grid.BlockGrid, "flood_from_outside", flood)
    kernel_compilation.cavities(CPU)
    assert flooded


def test_an_example_leaves_the_model_as_it_is():
    transformer = tiny_second_stage()["transformer_1024"]
    transformer.transformer_blocks.extend([transformer.transformer_blocks[0]] * 3)
    assert len(kernel_examples.first_blocks(transformer).transformer_blocks) == 2
    assert len(transformer.transformer_blocks) == 4


@without_gpu
def test_models_whose_calls_have_effects_are_left_out():
    pipe = tiny_pipeline(**tiny_second_stage(), **tiny_refiners())
    dense, sparse, finer = pipe.stages
    calls = StageCall(dense, 1, 0, 0.1), StageCall(sparse, 2, 1, 0.1), StageCall(finer, 2, 1, 0.0)
    assert [len([*call.examples()]) for call in calls] == [2, 4, 3]
    pipe.refiner.unet.register_forward_hook(lambda *_: None)
    pipe.dense_vae.to("meta")
    pipe.transformer_1024.hf_quantizer = object()
    pipe.dense_transformer._parallel_config = object()
    assert [len([*call.examples()]) for call in calls] == [0, 3, 2]


def test_keys_tell_calls_with_other_kernels_apart():
    sparse, alike, other = (
        tiny_pipeline(**parts).stages[1] for parts in ({}, {}, {"refiner": tiny_refiners()["refiner"]})
    )
    numbers = (1, 0, 0.0), (2, 0, 0.0), (2, 1, 0.0), (2, 1, 0.1)
    keys = {StageCall(stage, *own).key for stage in (sparse, alike, other) for own in numbers}
    assert len(keys) == 8 and StageCall(sparse, 4, 1, 0.05).key in keys
    alike.vae.register_to_config(_name_or_path="elsewhere")
    assert StageCall(alike, 1, 0, 0.0).key in keys
    alike.transformer.set_attn_processor(WindowAttnProcessor())
    sparse.transformer.to(torch.float16)
    other.vae.register_to_config(decoder_layers=3)
    assert not keys & {StageCall(stage, 1, 0, 0.0).key for stage in (sparse, alike, other)}


class Device(torch.nn.Module):
    """A model that says that it is on a GPU."""

    device, dtype = torch.device("cuda", 0), torch.float16

    def __init__(self, **config):
        super().__init__()
        self.config = config


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[int]:
    """How many examples were compiled ahead, at each time; on a GPU that there need not be."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    counts: list[int] = []

    def compile_examples(examples, device, show_progress):
        assert device == Device.device
        counts.append(len(examples))
        return compile_ahead.Compilation(0, [ValueError("not this one")])

    monkeypatch.setattr(compile_ahead, "compile_ahead", compile_examples)
    monkeypatch.setattr(compile_ahead, "can_compile_ahead", lambda device: True)
    return counts


def test_calls_are_compiled_once(compiled, monkeypatch, tmp_path):
    pipe = tiny_pipeline()
    stages = [type(stage)(**{**vars(stage), "transformer": Device(), "vae": Device()}) for stage in pipe.stages]
    first, second = (tuple(StageCall(stage, 1, 0, opening) for stage in stages) for opening in (0.0, 0.1))
    done = compile_stages(first, frozenset(), lambda total: None)
    assert done == {call.key for call in first} and compiled == [4]
    assert compile_stages(first, done, lambda total: None) == done and compiled == [4]
    with runtime_settings(compile_ahead=False):
        assert compile_stages(second, done, lambda total: None) == done
    with runtime_settings(kernels=False):
        assert compile_stages(second, done, lambda total: None) == done
    assert compiled == [4]
    done = compile_stages(second, done, lambda total: None)
    assert done == {call.key for call in first + second} and compiled == [4, 5]
    # A new process finds a note, until the kernels change or triton's cache is cleared.
    assert compile_stages(first, frozenset(), lambda total: None) == {call.key for call in first}
    assert compiled == [4, 5]
    monkeypatch.setattr(compile_ahead, "_source_hash", lambda: "other")
    compile_stages(first, frozenset(), lambda total: None)
    shutil.rmtree(tmp_path / "triton")
    compile_stages(first, frozenset(), lambda total: None)
    assert compiled == [4, 5, 4, 4]
    on_the_cpu = [StageCall(stage, 1, 0, 0.0) for stage in pipe.stages]
    assert compile_stages(on_the_cpu, done, lambda total: None) == done and compiled == [4, 5, 4, 4]


@pytest.mark.parametrize("scale, batched, expected", [(1.0, True, (2, 0)), (3.0, True, (2, 1)), (3.0, False, (2, 0))])
def test_a_pipeline_compiles_for_the_stages_of_a_call(scale, batched, expected, monkeypatch):
    pipe, seen = tiny_pipeline(default_guidance_scale=scale), []
    if not batched:
        pipe.disable_guidance_batching()

    def compile_seen(calls, done, show_progress):
        seen.append([(call.stage.name, call.samples, call.unconditional, call.max_opening) for call in calls])
        return done

    monkeypatch.setattr("diffusers_sparse3d.pipelines.steps.compile_stages", compile_seen)
    options = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    pipe([tiny_image()] * 2, coords=tiny_coords((3, 4)), max_opening=0.05, **options)
    assert seen == [[("sparse", *expected, 0.05)]]
    pipe.compile_kernels(batch_size=3)
    dense = (2, 1) if batched else (2, 0)
    with pytest.raises(ValueError, match="`batch_size`"):
        pipe.compile_kernels(batch_size=0)
    assert seen[1:] == [[("dense", *dense, 0.0), ("sparse", *expected, 0.0)]]


@needs_gpu
def test_a_call_on_a_gpu_compiles_little_more(monkeypatch):
    names = compiled_names(monkeypatch)
    pipe = tiny_pipeline(**tiny_second_stage(), **tiny_refiners(), default_max_opening=0.05).to(DEVICE, torch.float16)
    pipe.compile_kernels()
    ahead = len(names)
    # As many cells as an object has, since a few take other kernels.
    cells, finer_cells = (kernel_examples.sphere_cells(size, 1, DEVICE)[1:] for size in (8, 12))
    monkeypatch.setattr(pipe, "find_cells", lambda *_: finer_cells)
    for resolution in (64, None):
        pipe(tiny_image(), generator=torch.Generator(DEVICE).manual_seed(0), coords=cells, resolution=resolution)
    print(names[ahead:])
    assert NATIVE and len(names) - ahead <= ahead // 5, names[ahead:]

"""What a call of the pipeline leaves behind, and calls that are interrupted, fail, or meet in several threads."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from diffusers_sparse3d import Direct3DS2Pipeline
from tests.pipelines.tiny import tiny_coords, tiny_image, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def latents_of(pipe, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipe(tiny_image(), generator=generator, output_type="latent", **kwargs).latents


def test_the_same_seed_gives_the_same_bits_in_another_process(pipe):
    """Whatever was called before, and whatever order sets of names have there."""
    code = (
        "import torch; torch.set_num_threads(1);"
        "from tests.pipelines.test_calls import latents_of, tiny_pipeline;"
        "print(hash('a'), latents_of(tiny_pipeline(), seed=5).view(torch.int32).tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1234", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    other_hash, _, bits = run.stdout.strip().splitlines()[-1].partition(" ")
    assert int(other_hash) != hash("a")
    latents_of(pipe, seed=4)
    assert latents_of(pipe, seed=5).view(torch.int32).tolist() == json.loads(bits)


def interrupt_in(stage):
    def callback(pipeline, step, timestep, callback_kwargs):
        pipeline._interrupt = pipeline.stage == stage

    return callback


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("output_type", ["mesh", "sdf", "latent", "pt"])
def test_interrupted_calls_say_so_and_return_no_mesh_of_noise(pipe, stage, output_type):
    output = pipe(tiny_image(), callback_on_step_end=interrupt_in(stage), output_type=output_type)
    assert output.interrupted is True and output.meshes is None and output.sdfs is None
    has_latents = stage == "sparse" and output_type in ("latent", "pt")
    assert (output.latents is not None) == (output.coords is not None) == has_latents
    output = pipe(tiny_image(), output_type="latent")
    assert output.interrupted is None and len(output.to_tuple()) == 2


def test_a_call_that_fails_leaves_the_pipeline_as_it_was(pipe):
    expected = latents_of(pipe)

    def fail(pipeline, step, timestep, callback_kwargs):
        raise KeyError(pipeline.stage)

    with pytest.raises(KeyError, match="dense"):
        pipe(tiny_image(), callback_on_step_end=fail)
    assert pipe.stage is None and pipe.current_timestep is None
    assert torch.equal(latents_of(pipe), expected)


@pytest.mark.parametrize("returned", ["latents", ["latents"], {"noise": torch.zeros(1)}])
def test_what_a_callback_may_return(pipe, returned):
    with pytest.raises(ValueError, match="callback_on_step_end"):
        pipe(tiny_image(), callback_on_step_end=lambda *_: returned)
    assert torch.equal(latents_of(pipe, callback_on_step_end=lambda *_: None), latents_of(pipe))


@pytest.mark.parametrize("name", ["dense_guidance_scale", "guidance_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "5"])
def test_guidance_is_a_finite_number(pipe, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        pipe(tiny_image(), **{name: value})


@pytest.mark.parametrize("one_for_each", [False, True])
def test_noise_does_not_depend_on_the_order_of_cells(pipe, one_for_each):
    coords = tiny_coords((7, 5))
    coords = coords[(coords.long() @ torch.tensor([10**6, 10**4, 100, 1])).argsort()]
    permutation = torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))

    def noise(cells):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe.sparse_stages[0].prepare_latents(cells, generators if one_for_each else generators[0])

    expected = noise(coords)
    assert torch.equal(noise(coords[permutation]), expected[permutation])
    if one_for_each:
        first = coords[coords[:, 0] == 0]
        assert torch.equal(noise(first), expected[: len(first)])


def in_threads(*functions):
    """The results of functions that run at once, or the exceptions that they raise."""
    results = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def run(index, function):
        barrier.wait()
        try:
            results[index] = function()
        except RuntimeError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_one_pipeline_in_two_threads_is_refused(pipe):
    expected = latents_of(pipe)
    started, go_on = threading.Event(), threading.Event()

    def wait(*_):
        started.set()
        assert go_on.wait(60)

    def second_call():
        assert started.wait(60)
        try:
            return latents_of(pipe)
        finally:
            go_on.set()

    first, second = in_threads(lambda: latents_of(pipe, callback_on_step_end=wait), second_call)
    assert torch.equal(first, expected)
    assert isinstance(second, RuntimeError) and "from_pipe" in str(second)
    assert torch.equal(latents_of(pipe), expected)


def test_pipelines_that_share_weights_run_in_threads(pipe):
    other = Direct3DS2Pipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer and other.scheduler is not pipe.scheduler
    expected = [latents_of(pipe, seed) for seed in range(2)]
    found = in_threads(*(lambda p=p, seed=seed: latents_of(p, seed) for seed, p in enumerate((pipe, other))))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_call_inside_of_a_call_is_refused(pipe):
    with pytest.raises(RuntimeError, match="running already"):
        pipe(tiny_image(), callback_on_step_end=lambda pipeline, *_: pipeline(tiny_image()))
    latents_of(pipe)


class BiasCastingLinear(torch.nn.Linear):
    """A linear layer that keeps its weight in bytes and casts its bias at the first call, as bitsandbytes' does."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.full = [layer.weight.detach()]
        if layer.bias is not None:
            self.bias = layer.bias
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)

    def forward(self, rows):
        if self.bias is not None:
            self.bias.data = self.bias.data.half()
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(rows.float(), self.full[0], bias).to(rows.dtype)


def test_quantised_layers_that_cast_their_bias_leave_later_calls_as_the_first():
    pipe = tiny_pipeline()
    for name in ("transformer", "dense_transformer"):
        model = getattr(pipe, name)
        for path, layer in list(model.named_modules()):
            if type(layer) is torch.nn.Linear:
                model.set_submodule(path, BiasCastingLinear(layer))
        model.hf_quantizer = object()
    first, second = latents_of(pipe), latents_of(pipe)
    assert pipe.transformer.dtype == torch.float16, "the first floating-point parameter is no longer a bias"
    assert first.dtype == second.dtype == torch.float32
    assert torch.equal(first, second)

"""What a call of the pipeline leaves behind, and calls that are interrupted, fail, or meet in several threads."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

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


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"output_type": "mesh"}, 1),
        ({"output_type": "mesh", "select": "best"}, 2),
        ({"output_type": "sdf"}, 1),
        ({"output_type": "latent"}, 2),
        ({"output_type": "pt"}, 2),
    ],
)
def test_tuples_have_the_same_places_in_interrupted_calls(pipe, stage, options, fields):
    *values, interrupted = pipe(tiny_image(), callback_on_step_end=interrupt_in(stage), return_dict=False, **options)
    assert interrupted is True and len(values) == fields
    has_latents = stage == "sparse" and options["output_type"] in ("latent", "pt")
    assert all((value is not None) == has_latents for value in values)


@pytest.mark.parametrize(
    ("options", "names"),
    [({"select": "best"}, ["meshes", "scores"]), ({}, ["meshes"]), ({"output_type": "latent"}, ["latents", "coords"])],
)
def test_tuples_of_whole_calls(pipe, options, names):
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    call = {"coords": tiny_coords((2,)), "num_inference_steps": 1, **options}
    values = pipe(tiny_image(), return_dict=False, generator=seeds[0], **call)
    expected = pipe(tiny_image(), generator=seeds[1], **call)
    assert len(values) == len(names) and [*expected.keys()] == names
    if "latents" in names:
        assert all(torch.equal(value, expected[name]) for value, name in zip(values, names))
    else:
        assert (values[0][0].vertices == expected.meshes[0].vertices).all() and values[1:] == expected.to_tuple()[1:]


@torch.no_grad()
def test_steps_after_an_interrupted_call_run(pipe):
    """Also after one that failed; and an interruption that was asked for before a call does not concern it."""
    dense = pipe.dense_stage
    noise = dense.prepare_latents(1, torch.device("cpu"), torch.Generator().manual_seed(0))
    conditioning = pipe.encode_image(*pipe.image_processor.preprocess(tiny_image()))[0]
    expected = pipe.denoise(dense, noise, conditioning, 1, 2, 2.0)
    assert not torch.equal(expected, noise)

    def fail(pipeline, step, timestep, callback_kwargs):
        pipeline._interrupt = True
        raise KeyError

    assert pipe(tiny_image(), callback_on_step_end=interrupt_in("dense")).interrupted
    assert not pipe.interrupt and torch.equal(pipe.denoise(dense, noise, conditioning, 1, 2, 2.0), expected)
    with pytest.raises(KeyError):
        pipe(tiny_image(), callback_on_step_end=fail)
    assert not pipe.interrupt and torch.equal(pipe.denoise(dense, noise, conditioning, 1, 2, 2.0), expected)
    pipe._interrupt = True
    assert pipe(tiny_image(), output_type="latent").interrupted is None


class Keep(PipelineCallback):
    """Keeps the names of what it gets."""

    def __init__(self, tensor_inputs):
        super().__init__(cutoff_step_ratio=1.0)
        self.names, self._tensor_inputs = [], tensor_inputs

    @property
    def tensor_inputs(self):
        return self._tensor_inputs

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.names.append(sorted(callback_kwargs))
        return callback_kwargs


def test_callbacks_of_diffusers_say_which_tensors_they_take(pipe):
    call = {"coords": tiny_coords((2,)), "num_inference_steps": 1, "output_type": "latent"}
    both = Keep(["encoder_hidden_states", "latents"])
    latents = latents_of(pipe, callback_on_step_end=both, **{k: v for k, v in call.items() if k != "output_type"})
    assert both.names == [["encoder_hidden_states", "latents"]]
    assert torch.equal(latents, latents_of(pipe, coords=call["coords"], num_inference_steps=1))
    first, second = Keep(["latents"]), Keep(["encoder_hidden_states"])
    pipe(tiny_image(), callback_on_step_end=MultiPipelineCallbacks([first, second]), **call)
    assert first.names == second.names == [["encoder_hidden_states", "latents"]]
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs`"):
        pipe(tiny_image(), callback_on_step_end=Keep(["prompt_embeds"]), **call)


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


def test_pipelines_that_share_weights_leave_them_as_they_are():
    """Also while the other one runs; only a dtype that is asked for is another one."""
    pipe = tiny_pipeline().to(torch.bfloat16)
    pipe.image_encoder.float()
    pipe.disable_guidance_batching()
    pipe.enable_cuda_graphs(max_tokens=100)
    pipe.register_to_config(default_level=0.1)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {name: [parameter.data_ptr() for parameter in model.parameters()] for name, model in models.items()}
    expected, others = latents_of(pipe), []

    def share(pipeline, step, timestep, callback_kwargs):
        others.append(Direct3DS2Pipeline.from_pipe(pipeline))

    assert torch.equal(latents_of(pipe, callback_on_step_end=share), expected)
    other = others[0]
    assert type(other) is Direct3DS2Pipeline and other.config.default_level == 0.1 and not other.interrupt
    for name, model in models.items():
        assert getattr(other, name) is model
        assert model.dtype == (torch.float32 if name == "image_encoder" else torch.bfloat16)
        assert [parameter.data_ptr() for parameter in model.parameters()] == weights[name]
    assert not other._batches_guidance and other._max_graph_tokens == 100
    assert other._progress_bar_config == {"disable": True}
    other.set_progress_bar_config(disable=False)
    other.enable_guidance_batching()
    assert pipe._progress_bar_config == {"disable": True} and not pipe._batches_guidance
    assert torch.equal(latents_of(others[1]), expected)
    assert Direct3DS2Pipeline.from_pipe(pipe, torch_dtype=torch.float16).transformer.dtype == torch.float16
    assert pipe.image_encoder.dtype == torch.float16


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

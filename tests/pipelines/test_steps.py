"""The steps of the pipeline against plain reference computations, with settings that tell right from nearly right."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_sparse3d.models.transformer_dense import DenseAttnProcessor
from diffusers_sparse3d.pipelines import guidance
from diffusers_sparse3d.pipelines.conditioning import encode_image, sparse_conditioning
from diffusers_sparse3d.pipelines.guidance import GuidedVelocity
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.models.test_cuda_graphs import fake_captures
from tests.pipelines.tiny import LATENT_SIZE, tiny_components, tiny_coords, tiny_image, tiny_pipeline


IMAGES = [tiny_image("red"), tiny_image("blue", (0, 20, 63, 30))]
DENSE_STEPS, STEPS = 3, 2
DENSE_SCALE, SCALE = 2.5, 4.0


@pytest.fixture(scope="module")
def pipe():
    components = tiny_components()
    # Neither 1 nor 0, as in a trained pipeline.
    components["dense_vae"].register_to_config(scaling_factor=0.6, shift_factor=1.5)
    return tiny_pipeline(**components)


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference_loop(transformer, shift, latents, batch_size, steps, scale, tokens, **kwargs) -> Tensor:
    """Euler's method on the velocity, guided from the unconditional one, whose tokens are zeros."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    for sigma, next_sigma in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:]):
        timestep = torch.full((batch_size,), 1000 * float(sigma))
        conditional = transformer(latents, timestep=timestep, encoder_hidden_states=tokens, **kwargs).sample
        unconditional = transformer(latents, timestep=timestep, encoder_hidden_states=0 * tokens, **kwargs).sample
        latents = latents + (next_sigma - sigma) * (unconditional + scale * (conditional - unconditional))
    return latents


@pytest.fixture(params=["one call for both", "two calls"])
def either_guidance(request, pipe):
    """The pipeline with guidance from one call of the transformer, and from two."""
    if request.param == "two calls":
        pipe.disable_guidance_batching()
    yield pipe
    pipe.enable_guidance_batching()


@torch.no_grad()
def test_pipeline_equals_the_reference_loop(either_guidance):
    """Guidance, unconditional tokens, timesteps and cells of a whole call, computed once more in a few lines."""
    pipe, dense_noise = either_guidance, noise_like(2, 2, *(LATENT_SIZE // 2,) * 3)
    last = {}

    def keep(pipeline, step, timestep, callback_kwargs):
        last[pipeline.stage] = callback_kwargs["latents"]
        return {}

    output = pipe(
        IMAGES,
        dense_latents=dense_noise,
        dense_num_inference_steps=DENSE_STEPS,
        num_inference_steps=STEPS,
        dense_guidance_scale=DENSE_SCALE,
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=keep,
        output_type="latent",
    )

    pixel_values, mask = pipe.image_processor.preprocess(IMAGES)
    tokens = encode_image(pipe.image_encoder, pixel_values)
    dense = reference_loop(pipe.dense_transformer, 3.0, dense_noise, 2, DENSE_STEPS, DENSE_SCALE, tokens)
    torch.testing.assert_close(last["dense"], dense, atol=1e-4, rtol=1e-4)

    logits = pipe.dense_vae.decode(dense / 0.6 + 1.5).sample[:, 0]
    cells = (logits.sigmoid() >= pipe.config.occupancy_threshold).nonzero().int()
    assert torch.equal(output.coords, cells)

    sparse_noise = noise_like(len(cells), 4, seed=7)
    packed, encoder_coords = sparse_conditioning(tokens, mask, 14, 5)
    latents = reference_loop(
        pipe.transformer, 2.0, sparse_noise, 2, STEPS, SCALE, packed, coords=cells, encoder_coords=encoder_coords
    )
    torch.testing.assert_close(output.latents, latents, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tokens_of_a_callback_are_those_of_the_next_step(either_guidance):
    """The second of two steps has other tokens: as if it were a loop of its own."""
    pipe, sparse = either_guidance, either_guidance.stages[1]
    cells = tiny_coords((5, 7))
    latents = noise_like(len(cells), 4)
    pixel_values, mask = pipe.image_processor.preprocess(IMAGES)
    conditioning = pipe.encode_image(pixel_values, mask)[1]
    tokens = conditioning["encoder_hidden_states"]
    other_tokens, kwargs = tokens.flip(0), {"encoder_coords": conditioning["encoder_coords"], "coords": cells}

    def exchange(pipeline, step, timestep, callback_kwargs):
        return {"encoder_hidden_states": other_tokens}

    arguments = sparse.transformer_arguments(cells, conditioning, 2)
    found = pipe.denoise(sparse, latents, arguments, 2, 2, SCALE, callback_on_step_end=exchange)
    sigmas = FlowMatchEulerDiscreteScheduler(shift=2.0)
    sigmas.set_timesteps(2)
    for number, given in enumerate((tokens, other_tokens)):
        timestep, step = sigmas.timesteps[number].expand(2), sigmas.sigmas[number + 1] - sigmas.sigmas[number]
        conditional, unconditional = (
            pipe.transformer(latents, timestep=timestep, encoder_hidden_states=states, **kwargs).sample
            for states in (given, torch.zeros_like(given))
        )
        latents = latents + step * (unconditional + SCALE * (conditional - unconditional))
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("change", ["nothing", "a processor", "a cache"])
def test_dense_samples_without_the_image_have_no_tokens(pipe, change):
    """Unless others look at the tokens: then they are zeros. Exchanged tokens are those of the next step."""
    transformer, shapes = pipe.dense_transformer, []
    processor = transformer.transformer_blocks[0].attn2.processor
    if change == "a processor":
        transformer.transformer_blocks[0].attn2.set_processor(type("Other", (DenseAttnProcessor,), {})())
    elif change == "a cache":
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    hook = transformer.transformer_blocks[0].attn2.to_k.register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    tokens, latents = noise_like(2, 5, 16), noise_like(2, 2, *(LATENT_SIZE // 2,) * 3)
    with transformer.cache_context("none"):
        velocity = GuidedVelocity(transformer, {"encoder_hidden_states": 3 * tokens, "return_dict": False}, 2)
        velocity(latents, torch.tensor(500.0), 4.0)
        velocity.encoder_hidden_states = tokens
        found = velocity(latents, torch.tensor(500.0), 4.0)
    hook.remove()
    transformer.disable_cache()
    transformer.transformer_blocks[0].attn2.set_processor(processor)
    assert shapes == ([(2, 5), (1, 1)] * 2 if change == "nothing" else [(4, 5)] * 2)
    timestep = torch.full((2,), 500.0)
    conditional, unconditional = (
        transformer(latents, timestep, states).sample for states in (tokens, torch.zeros_like(tokens))
    )
    torch.testing.assert_close(found, unconditional + 4 * (conditional - unconditional), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dense_latents_are_scaled_and_shifted_back(pipe):
    """Other factors of the VAE give other cells: the comparison above would notice a factor left out."""
    dense = noise_like(1, 2, *(LATENT_SIZE // 2,) * 3)
    cells = pipe.dense_stage.find_cells(dense)
    logits = {
        name: pipe.dense_vae.decode(latents).sample[:, 0]
        for name, latents in {
            "right": dense / 0.6 + 1.5,
            "no shift": dense / 0.6,
            "no scale": dense + 1.5,
            "wrong order": (dense + 1.5) / 0.6,
        }.items()
    }
    found = {name: (x.sigmoid() >= pipe.config.occupancy_threshold).nonzero().int() for name, x in logits.items()}
    assert torch.equal(cells, found.pop("right"))
    assert not any(torch.equal(cells, other) for other in found.values())


def test_meshes_of_several_images_are_in_the_order_of_the_images(pipe):
    """Two meshes of the first image, then two of the second."""
    cells = tiny_coords((3, 4, 2, 5))
    latents = noise_like(len(cells), 4)
    batch = pipe(IMAGES, coords=cells, latents=latents, num_meshes_per_image=2, output_type="latent").latents
    for index in range(4):
        rows = cells[:, 0] == index
        own = cells[rows] * torch.tensor([0, 1, 1, 1], dtype=torch.int32)
        right, wrong = (
            pipe(image, coords=own, latents=latents[rows], output_type="latent").latents
            for image in (IMAGES[index // 2], IMAGES[1 - index // 2])
        )
        torch.testing.assert_close(batch[rows], right, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(batch[rows], wrong, atol=1e-2)


def test_dense_stage_keeps_the_order_of_the_images(pipe):
    noise = noise_like(4, 2, *(LATENT_SIZE // 2,) * 3)
    coords = pipe(IMAGES, dense_latents=noise, num_meshes_per_image=2, output_type="latent").coords
    for index in range(4):
        single = pipe(IMAGES[index // 2], dense_latents=noise[index : index + 1], output_type="latent").coords
        assert torch.equal(coords[coords[:, 0] == index, 1:], single[:, 1:])


@pytest.mark.parametrize("output_type", ["mesh", "sdf", "latent"])
def test_models_are_freed_after_the_last_use(pipe, monkeypatch, output_type):
    """A call ends with `maybe_free_model_hooks`, which moves the models back after offloading."""
    events = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: events.append("free"))
    for name, method in (("transformer", "forward"), ("vae", "decode")):
        model = getattr(pipe, name)
        function = getattr(model, method)
        monkeypatch.setattr(
            model, method, lambda *args, _name=name, _f=function, **kw: (events.append(_name), _f(*args, **kw))[1]
        )
    pipe(IMAGES[0], coords=tiny_coords((2,)), output_type=output_type)
    assert events.count("free") == 1 and events[-1] == "free"
    assert events[-2] == ("transformer" if output_type == "latent" else "vae")


@torch.no_grad()
def test_steps_called_one_by_one(pipe):
    """The public steps, as the documentation shows them, give what a call gives."""
    expected = pipe(IMAGES, generator=torch.Generator().manual_seed(3), output_type="sdf").sdfs
    generator, device = torch.Generator().manual_seed(3), torch.device("cpu")
    dense, sparse = pipe.stages
    dense_conditioning, conditioning = pipe.encode_image(*pipe.image_processor.preprocess(IMAGES))
    noise = dense.prepare_latents(2, device, generator)
    cells = dense.find_cells(pipe.denoise(dense, noise, dense_conditioning, 2, 2, 2.0))
    noise = sparse.prepare_latents(cells, generator)
    latents = pipe.denoise(sparse, noise, sparse.transformer_arguments(cells, conditioning, 2), 2, 2, 3.0)
    sdfs = list(pipe.decode(sparse, latents, cells, 2))
    assert len(sdfs) == len(expected) == 2
    for sdf, other in zip(sdfs, expected):
        assert torch.equal(sdf.coords, other.coords) and torch.equal(sdf.feats, other.feats)


def test_stage_is_known_before_a_call():
    fresh = tiny_pipeline()
    assert fresh.stage is None and not fresh.interrupt


def test_steps_are_captured_once_a_stage(monkeypatch):
    """The second step of each stage is captured, unless it has more tokens than the pipeline replays."""
    captured, pipe = fake_captures(monkeypatch), tiny_pipeline()

    def latents():
        seed = torch.Generator().manual_seed(0)
        return pipe(tiny_image(), generator=seed, output_type="latent", dense_num_inference_steps=3).latents

    pipe.disable_cuda_graphs()
    expected = latents()
    assert len(captured) == 0
    for enable, captures in ((pipe.enable_cuda_graphs, 2), (lambda: pipe.enable_cuda_graphs(2 * 4**3 - 1), 1)):
        enable()
        captured.clear()
        assert torch.equal(latents(), expected)
        assert len(captured) == captures
    with pytest.raises(ValueError, match="max_tokens"):
        pipe.enable_cuda_graphs(-1)


def test_both_predictions_share_a_cache_that_lasts():
    """The coordinates of both halves are planned once for all steps, with a cache that is given and without one."""
    coords = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 0]], dtype=torch.int32)
    cache = CoordinateCache(coords, 2)
    first, second = (guidance._arguments_of_both({"coords": coords, "cache": cache}, 2) for _ in range(2))
    assert first["cache"] is second["cache"] and first["coords"] is first["cache"].coords
    assert first["cache"].batch_size == 4
    assert first["coords"].tolist() == [[0, 1, 2, 3], [1, 0, 0, 0], [2, 1, 2, 3], [3, 0, 0, 0]]
    alone = guidance._arguments_of_both({"coords": coords, "x": 1}, 2)
    assert torch.equal(alone["coords"], first["coords"]) and alone["x"] == 1


def test_the_first_result_of_a_scheduler_is_taken(pipe, monkeypatch):
    """Schedulers of diffusers may return what they predict of the end as well."""
    arguments = {"coords": tiny_coords((3,)), "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(tiny_image(), generator=torch.Generator().manual_seed(1), **arguments).latents
    step = FlowMatchEulerDiscreteScheduler.step
    monkeypatch.setattr(
        FlowMatchEulerDiscreteScheduler, "step", lambda *args, **kwargs: (*step(*args, **kwargs), torch.zeros(()))
    )
    found = pipe(tiny_image(), generator=torch.Generator().manual_seed(1), **arguments).latents
    assert torch.equal(found, expected)

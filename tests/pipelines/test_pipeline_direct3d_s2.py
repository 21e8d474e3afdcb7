"""Direct3DS2Pipeline with real components of tiny size and random weights."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import ImageOps

from diffusers_sparse3d import Direct3DS2Pipeline, SparseDiT, SparseTensor, sparse_tensor
from diffusers_sparse3d.geometry.cavities import fill_cavities
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.ops.coordinates import partition_coords
from tests.pipelines.tiny import LATENT_SIZE, tiny_components, tiny_coords, tiny_image, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(path)
    return path


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sdf_of(pipe, **kwargs):
    return pipe(tiny_image(), coords=tiny_coords(), generator=generators(0), output_type="sdf", **kwargs).sdfs[0].feats


def test_image_to_mesh(pipe):
    mesh = pipe(tiny_image(), generator=generators(0)).meshes[0]
    assert len(mesh.faces) > 0
    assert np.abs(mesh.vertices).max() <= 1 + 1e-6


def test_same_generator_same_result(pipe):
    first, second, other = (pipe(tiny_image(), generator=generators(s), output_type="latent") for s in (0, 0, 1))
    assert torch.equal(first.latents, second.latents) and torch.equal(first.coords, second.coords)
    assert first.latents.shape != other.latents.shape or not torch.allclose(first.latents, other.latents)


def test_batch_equals_single_runs(pipe):
    images = [tiny_image("red"), tiny_image("blue", (20, 4, 60, 30)), tiny_image("green", (30, 30, 60, 60))]
    batch = pipe(images, generator=generators(0, 1, 2), output_type="sdf").sdfs
    assert len(batch) == 3
    for image, seed, expected in zip(images, (0, 1, 2), batch):
        single = pipe(image, generator=generators(seed), output_type="sdf").sdfs[0]
        assert torch.equal(single.coords, expected.coords)
        torch.testing.assert_close(single.feats, expected.feats, atol=1e-4, rtol=1e-4)


def test_one_mesh_per_image_and_repetition(pipe):
    meshes = pipe([tiny_image(), tiny_image("blue")], coords=tiny_coords((2, 1, 3, 2)), num_meshes_per_image=2).meshes
    assert len(meshes) == 4
    twice = pipe(tiny_image(), coords=tiny_coords((2, 2)), num_meshes_per_image=2, generator=generators(3, 4))
    assert len(twice.meshes) == 2 and len(twice.meshes[0].vertices) != len(twice.meshes[1].vertices)


def test_image_matters_in_both_stages(pipe):
    wide = tiny_image("blue", (0, 20, 63, 30))
    for kwargs in ({}, {"coords": tiny_coords()}):
        first = pipe(tiny_image(), generator=generators(0), output_type="latent", **kwargs)
        second = pipe(wide, generator=generators(0), output_type="latent", **kwargs)
        same_cells = torch.equal(first.coords, second.coords)
        assert not (same_cells and torch.allclose(first.latents, second.latents, atol=1e-3))


def test_row_order_of_coords_does_not_matter(pipe):
    coords, latents = tiny_coords((6, 9)), torch.randn(15, 4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    images = [tiny_image(), tiny_image("blue")]
    first = pipe(images, coords=coords, latents=latents, output_type="latent").latents
    second = pipe(images, coords=coords[order], latents=latents[order], output_type="latent").latents
    torch.testing.assert_close(second, first[order], atol=1e-4, rtol=1e-4)


def test_output_types(pipe):
    coords = tiny_coords((3, 5))
    images = [tiny_image(), tiny_image("blue")]

    def run(output_type, **kwargs):
        return pipe(images, coords=coords, generator=generators(0, 1), output_type=output_type, **kwargs)

    packed = run("latent")
    assert packed.latents.shape == (8, 4) and torch.equal(packed.coords, coords) and packed.meshes is None
    padded = run("pt")
    assert padded.latents.shape == (2, 5, 4) and padded.coords.shape == (2, 5, 3)
    assert torch.equal(padded.latents[1], packed.latents[3:]) and torch.equal(
        padded.latents[0, :3], packed.latents[:3]
    )
    assert (padded.latents[0, 3:] == 0).all() and (padded.coords[0, 3:] == -1).all()
    sdfs = run("sdf").sdfs
    assert [type(sdf) for sdf in sdfs] == [SparseTensor, SparseTensor]
    assert [sdf.feats.shape for sdf in sdfs] == [(3 * 512, 1), (5 * 512, 1)]
    vae = pipe.vae
    latents = packed.latents[:3] / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(vae.decode(latents, coords[:3]).sample, sdfs[0].feats)
    (meshes,) = run("mesh", return_dict=False)
    assert [len(mesh.vertices) for mesh in meshes] == [len(mesh.vertices) for mesh in run("mesh").meshes]


def test_given_noise_replaces_the_generator(pipe):
    noise = torch.randn(1, 2, *(LATENT_SIZE // 2,) * 3, generator=torch.Generator().manual_seed(5))
    first, second = (pipe(tiny_image(), dense_latents=noise, output_type="latent").coords for _ in range(2))
    assert torch.equal(first, second)
    latents = torch.randn(7, 4, generator=torch.Generator().manual_seed(5))
    first, second = (
        pipe(tiny_image(), coords=tiny_coords(), latents=latents, output_type="latent").latents for _ in range(2)
    )
    assert torch.equal(first, second)


def test_callbacks_see_and_change_both_stages(pipe):
    seen = []

    def callback(pipeline, step, timestep, callback_kwargs):
        seen.append((pipeline.stage, step, float(timestep), callback_kwargs["latents"].ndim, pipeline.guidance_scale))
        if pipeline.stage == "sparse" and step == pipeline.num_timesteps - 1:
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}
        return {}

    output = pipe(
        tiny_image(),
        dense_num_inference_steps=3,
        num_inference_steps=2,
        generator=generators(0),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "encoder_hidden_states"],
        output_type="latent",
    )
    assert [entry[:2] for entry in seen] == [("dense", 0), ("dense", 1), ("dense", 2), ("sparse", 0), ("sparse", 1)]
    assert [entry[3:] for entry in seen] == [(5, 2.0)] * 3 + [(2, 3.0)] * 2
    assert seen[0][2] == seen[3][2] == 1000
    assert (output.latents == 0).all() and pipe.stage is None


def test_interrupt_stops_the_stage(pipe):
    steps = []

    def callback(pipeline, step, timestep, callback_kwargs):
        steps.append(step)
        pipeline._interrupt = True
        return callback_kwargs

    pipe(tiny_image(), coords=tiny_coords(), num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0]


def test_guidance_is_skipped_up_to_one(pipe, monkeypatch):
    samples = []
    forward = SparseDiT.forward

    def counted(*args, **kwargs):
        samples.append(len(kwargs["timestep"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(SparseDiT, "forward", counted)
    unguided = sdf_of(pipe, guidance_scale=1.0)
    assert samples == [1, 1]
    guided = sdf_of(pipe, guidance_scale=5.0)
    assert samples[2:] == [2, 2]
    assert not torch.allclose(guided, unguided, atol=1e-3)
    pipe.disable_guidance_batching()
    try:
        torch.testing.assert_close(sdf_of(pipe, guidance_scale=5.0), guided, atol=1e-4, rtol=1e-4)
    finally:
        pipe.enable_guidance_batching()
    assert samples[4:] == [1] * 4


def test_attention_is_planned_once_for_all_steps(pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(sparse_tensor, "partition_coords", lambda *args: calls.append(1) or partition_coords(*args))
    planned = []
    for steps in (1, 3):
        calls.clear()
        pipe(tiny_image(), coords=tiny_coords(), num_inference_steps=steps, guidance_scale=3.0, output_type="latent")
        planned.append(len(calls))
    assert planned[0] == planned[1] > 0


def test_defaults_of_the_checkpoint(pipe, saved):
    steps = []
    pipe(
        tiny_image(), coords=tiny_coords(), callback_on_step_end=lambda pipe, step, t, kwargs: steps.append(step) or {}
    )
    assert steps == [0, 1]
    index = json.loads((saved / "model_index.json").read_text())
    assert index["default_num_inference_steps"] == 2 and index["occupancy_threshold"] == 0.72
    loaded = DiffusionPipeline.from_pretrained(saved, default_num_inference_steps=4)
    assert loaded.config.default_num_inference_steps == 4 and loaded.config.default_guidance_scale == 3.0


def test_level_is_the_iso_level_of_the_sdf(pipe):
    kwargs = {"coords": tiny_coords((2,)), "latents": torch.ones(2, 4)}
    sdf = pipe(tiny_image(), output_type="sdf", **kwargs).sdfs[0]
    for level in (0.0, 0.2):
        mesh = pipe(tiny_image(), level=level, **kwargs).meshes[0]
        expected = sparse_sdf_to_mesh(sdf.feats, sdf.coords, 8 * LATENT_SIZE, level)
        assert len(mesh.faces) > 0 and np.array_equal(mesh.vertices, expected.vertices)


def test_cavities_are_filled_by_the_call_or_the_checkpoint(pipe):
    """The cells of a hollow cube that lacks one of a side: decoded by random weights, they have holes of any kind."""
    places = torch.cartesian_prod(*[torch.arange(4, dtype=torch.int32)] * 3)
    hollow = places[((places == 0) | (places == 3)).any(1) & (places != torch.tensor([1, 1, 3])).any(1)]
    coords = torch.nn.functional.pad(hollow, (1, 0))
    kwargs = {"coords": coords, "latents": torch.ones(len(coords), 4)}
    sdf = pipe(tiny_image(), output_type="sdf", **kwargs).sdfs[0]
    open_, filled = (pipe(tiny_image(), max_opening=width, **kwargs).meshes[0] for width in (0.0, 0.5))
    rows = fill_cavities(sdf.feats, sdf.coords, 8 * LATENT_SIZE, 0.0, 0.5)
    expected = sparse_sdf_to_mesh(*rows, 8 * LATENT_SIZE)
    assert np.array_equal(filled.vertices, expected.vertices) and len(filled.faces) != len(open_.faces)
    pipe.register_to_config(default_max_opening=0.5)
    assert np.array_equal(pipe(tiny_image(), **kwargs).meshes[0].vertices, expected.vertices)
    assert np.array_equal(pipe(tiny_image(), max_opening=0.0, **kwargs).meshes[0].vertices, open_.vertices)
    pipe.register_to_config(default_max_opening=0.0)  # other tests have the same pipeline


def test_dense_conditioning_of_the_sparse_stage():
    pipe = tiny_pipeline(**tiny_components(sparse_conditioning=False))
    assert sdf_of(pipe).isfinite().all()


def test_saved_layout(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "Direct3DS2Pipeline"
    assert index["transformer"] == ["diffusers_sparse3d", "SparseDiT"]
    assert index["image_encoder"] == ["transformers", "Dinov2WithRegistersModel"]
    assert (saved / "vae" / "diffusion_pytorch_model.safetensors").exists()
    assert not list(saved.rglob("*.bin"))


def test_route_a_loads_by_name(pipe, saved):
    loaded = DiffusionPipeline.from_pretrained(saved)
    assert type(loaded) is Direct3DS2Pipeline and loaded.refiner is None
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sdf_of(loaded), sdf_of(pipe), atol=1e-4, rtol=1e-4)


def test_route_b_loads_without_importing_the_package_first(pipe, saved, tmp_path):
    code = f"""
import sys
from diffusers import DiffusionPipeline
assert "diffusers_sparse3d" not in sys.modules
pipe = DiffusionPipeline.from_pretrained({str(saved)!r}, custom_pipeline="pipeline", trust_remote_code=True)
import torch
from tests.pipelines.tiny import tiny_coords, tiny_image
output = pipe(tiny_image(), coords=tiny_coords(), generator=torch.Generator().manual_seed(0), output_type="latent")
torch.save(output.latents, {str(tmp_path / "latents.pt")!r})
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    expected = pipe(tiny_image(), coords=tiny_coords(), generator=generators(0), output_type="latent").latents
    torch.testing.assert_close(torch.load(tmp_path / "latents.pt", weights_only=True), expected)


def test_explicit_arguments_of_from_pretrained(pipe, saved, tmp_path):
    assert DiffusionPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    loaded = DiffusionPipeline.from_pretrained(saved, vae=pipe.vae, background_remover=ImageOps.invert)
    assert loaded.vae is pipe.vae and loaded.background_remover is ImageOps.invert
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert DiffusionPipeline.from_pretrained(tmp_path, variant="fp16").transformer.dtype == torch.float32


def test_half_precision_files_load_in_one_dtype(tmp_path):
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path)
    models = ("image_encoder", "dense_vae", "dense_transformer", "vae", "transformer")
    for asked, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        loaded = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=asked)
        assert {name: getattr(loaded, name).dtype for name in models} == dict.fromkeys(models, expected)


def test_half_precision_runs():
    pipe = tiny_pipeline().to(torch.bfloat16)
    output = pipe(tiny_image(), coords=tiny_coords(), generator=generators(0), output_type="latent")
    assert output.latents.dtype == torch.bfloat16
    mesh = pipe(tiny_image(), generator=generators(0)).meshes[0]
    assert np.isfinite(mesh.vertices).all()


def test_background_remover_is_used_and_not_saved(pipe, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pipe.background_remover = lambda image: tiny_image().getchannel("A")
    assert len(pipe(noise, coords=tiny_coords((1,))).meshes) == 1
    pipe.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).background_remover is None
    pipe.background_remover = None
    with pytest.raises(ValueError, match="background remover"):
        pipe(noise, coords=tiny_coords())
    assert len(pipe(noise, mask_image=tiny_image().getchannel("A"), coords=tiny_coords((1,))).meshes) == 1


def test_empty_dense_stage_says_what_to_do(pipe, monkeypatch):
    monkeypatch.setattr(pipe.dense_vae.decoder.conv_out, "bias", torch.nn.Parameter(torch.tensor([-100.0])))
    with pytest.raises(ValueError, match=r"no occupied cell for \[0, 1\].*`generator`.*`dense_guidance_scale`"):
        pipe([tiny_image(), tiny_image()])


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"resolution": 1024}, "`resolution`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"dense_num_inference_steps": 2.5}, "`dense_num_inference_steps`"),
        ({"num_meshes_per_image": 0}, "`num_meshes_per_image`"),
        ({"output_type": "glb"}, "`output_type`"),
        ({"level": 0.5}, "`level`"),
        ({"dense_latents": torch.zeros(1, 2, 5, 5, 5)}, "`dense_latents`"),
        ({"coords": tiny_coords(), "dense_latents": torch.zeros(1, 2, 4, 4, 4)}, "`dense_latents`"),
        ({"latents": torch.zeros(7, 4)}, "`coords`"),
        ({"coords": tiny_coords(), "latents": torch.zeros(6, 4)}, "`latents`"),
        ({"coords": tiny_coords(), "latents": torch.full((len(tiny_coords()), 4), torch.nan)}, "`latents`"),
        ({"coords": tiny_coords((2, 2))}, "`coords`"),
        ({"coords": tiny_coords() + 10}, "`coords`"),
        ({"coords": tiny_coords().long()}, "`coords`"),
        ({"generator": generators(0, 1)}, "`generator`"),
        ({"callback_on_step_end_tensor_inputs": ["coords"]}, "`callback_on_step_end_tensor_inputs`"),
        ({"image": tiny_image(box=(0, 0, 0, 0)).crop((9, 9, 20, 20))}, "`image`"),
    ],
)
def test_bad_arguments_are_named(pipe, kwargs, argument):
    with pytest.raises(ValueError, match=argument):
        pipe(**{"image": tiny_image(), **kwargs})


def test_components_that_do_not_belong_together():
    components = tiny_components()
    components["transformer"].register_to_config(sample_size=32)
    with pytest.raises(ValueError, match="do not belong together"):
        tiny_pipeline(**components)(tiny_image())

"""The second sparse stage of Direct3DS2Pipeline, with real components of tiny size and random weights."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_sparse3d import Direct3DS2Pipeline, SparseDiT
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import normalize_mesh
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface
from tests.pipelines.tiny import (
    LATENT_SIZE,
    SECOND_LATENT_SIZE,
    tiny_coords,
    tiny_image,
    tiny_pipeline,
    tiny_refiners,
    tiny_second_stage,
)


FIRST, SECOND = 8 * LATENT_SIZE, 8 * SECOND_LATENT_SIZE


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(**tiny_second_stage())


@pytest.fixture(scope="module")
def refined():
    return tiny_pipeline(**tiny_second_stage(), **tiny_refiners())


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_resolution_chooses_the_stages(pipe):
    assert pipe.resolutions == (FIRST, SECOND) and pipe.resolution == SECOND
    kwargs = {"coords": tiny_coords((1,)), "output_type": "latent"}
    outputs = {r: pipe(tiny_image(), generator=generators(0), resolution=r, **kwargs) for r in (None, FIRST, SECOND)}
    assert torch.equal(outputs[None].latents, outputs[SECOND].latents)
    assert outputs[SECOND].coords.max() >= LATENT_SIZE
    # The first resolution gives what a pipeline without the second stage does.
    expected = tiny_pipeline()(tiny_image(), generator=generators(0), **kwargs)
    assert torch.equal(outputs[FIRST].coords, expected.coords)
    torch.testing.assert_close(outputs[FIRST].latents, expected.latents)


def test_the_cells_are_those_near_the_normalised_mesh_of_the_first_stage(pipe):
    coords, level = tiny_coords((1, 1)), 0.05
    images = [tiny_image(), tiny_image("blue")]
    meshes = pipe(images, coords=coords, generator=generators(0, 1), resolution=FIRST, level=level).meshes
    expected = []
    for index, mesh in enumerate(meshes):
        cells = cells_near_surface(normalize_mesh(mesh)[0], SECOND)
        expected.append(torch.nn.functional.pad(cells, (1, 0), value=index))
    output = pipe(images, coords=coords, generator=generators(0, 1), level=level, output_type="latent")
    assert torch.equal(output.coords, torch.cat(expected)) and output.coords.dtype == torch.int32
    assert output.latents.shape == (len(output.coords), 4)


def test_second_stage_alone_from_given_cells(pipe):
    """The same result with the cells and the noise given: the stage sees nothing else of what came before."""
    generator = torch.Generator().manual_seed(3)
    full = pipe(tiny_image(), coords=tiny_coords((2,)), generator=generator, output_type="latent")
    generator.manual_seed(3)
    torch.randn(2, 4, generator=generator)  # the noise of the first stage
    noise = torch.randn(len(full.coords), 4, generator=generator)
    alone = pipe(tiny_image(), coords_1024=full.coords, latents_1024=noise, output_type="latent")
    assert torch.equal(alone.coords, full.coords)
    torch.testing.assert_close(alone.latents, full.latents)


def test_image_to_mesh_through_all_stages(pipe):
    mesh = pipe(tiny_image(), generator=generators(0)).meshes[0]
    assert len(mesh.faces) > 0 and np.abs(mesh.vertices).max() <= 1 + 1e-6
    # Vertices of marching cubes lie on the edges of the grid: two coordinates are samples of the finer one.
    samples = (mesh.vertices + 1) * (SECOND - 1) / 2
    # They are float32: some 1e-5 of a spacing.
    on_grid = (np.abs(samples - samples.round()) < 1e-4).sum(axis=1) >= 2
    assert on_grid.mean() > 0.9


def test_batch_equals_single_runs(pipe):
    images = [tiny_image("red"), tiny_image("blue", (20, 4, 60, 30))]
    coords = tiny_coords((2, 1))
    batch = pipe(images, coords=coords, generator=generators(0, 1), output_type="sdf").sdfs
    assert len(batch) == 2
    for index, (image, expected) in enumerate(zip(images, batch)):
        own = coords[coords[:, 0] == index] * torch.tensor([0, 1, 1, 1], dtype=torch.int32)
        single = pipe(image, coords=own, generator=generators(index), output_type="sdf").sdfs[0]
        assert torch.equal(single.coords, expected.coords)
        torch.testing.assert_close(single.feats, expected.feats, atol=1e-4, rtol=1e-4)


def test_output_types_are_of_the_second_stage(pipe):
    cells = torch.nn.functional.pad(tiny_coords((5,))[:, 1:] + 4, (1, 0))
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def run(output_type):
        return pipe(tiny_image(), coords_1024=cells, latents_1024=noise, output_type=output_type)

    packed, padded, sdf = run("latent"), run("pt"), run("sdf").sdfs[0]
    assert torch.equal(padded.latents[0], packed.latents) and torch.equal(padded.coords[0], packed.coords[:, 1:])
    vae = pipe.vae_1024
    latents = packed.latents / vae.config.scaling_factor + vae.config.shift_factor
    decoded = vae.decode(latents, cells)
    torch.testing.assert_close(sdf.feats, decoded.sample)
    assert torch.equal(sdf.coords, decoded.coords) and sdf.coords.max() >= FIRST
    assert len(run("mesh").meshes) == 1


def test_callbacks_see_every_stage_with_its_settings(pipe):
    seen = []

    def callback(pipeline, step, timestep, callback_kwargs):
        seen.append((pipeline.stage, step, pipeline.guidance_scale, pipeline.num_timesteps))
        return {}

    pipe(
        tiny_image(),
        generator=generators(0),
        num_inference_steps_1024=3,
        guidance_scale_1024=1.0,
        callback_on_step_end=callback,
        output_type="latent",
    )
    assert seen == [("dense", i, 2.0, 2) for i in range(2)] + [("sparse", i, 3.0, 2) for i in range(2)] + [
        ("sparse_1024", i, 1.0, 3) for i in range(3)
    ]
    seen.clear()
    pipe(tiny_image(), coords_1024=tiny_coords((2,)), callback_on_step_end=callback, output_type="latent")
    assert seen == [("sparse_1024", 0, 4.0, 1)]


def test_interrupted_first_stage_is_the_last(pipe):
    stages = []

    def callback(pipeline, step, timestep, callback_kwargs):
        stages.append(pipeline.stage)
        pipeline._interrupt = True
        return {}

    output = pipe(tiny_image(), coords=tiny_coords((2,)), callback_on_step_end=callback, output_type="latent")
    assert stages == ["sparse"] and torch.equal(output.coords, tiny_coords((2,)))


def test_image_matters_and_conditioning_may_differ_between_the_stages():
    pipe = tiny_pipeline(**tiny_second_stage(sparse_conditioning=False))
    assert pipe.transformer.config.sparse_conditioning and not pipe.transformer_1024.config.sparse_conditioning
    kwargs = {"coords_1024": tiny_coords((3,)), "latents_1024": torch.ones(3, 4), "output_type": "latent"}
    first, second = (pipe(tiny_image("blue", box), **kwargs).latents for box in ((8, 12, 40, 50), (0, 20, 63, 30)))
    assert not torch.allclose(first, second, atol=1e-3)


def test_without_the_components_the_error_says_what_to_do(pipe):
    components = tiny_second_stage()
    with pytest.raises(
        ValueError, match=r"`resolution`.*`vae_1024`, `transformer_1024`, `scheduler_1024`.*checkpoint"
    ):
        tiny_pipeline()(tiny_image(), resolution=1024)
    partial = tiny_pipeline(**{**components, "scheduler_1024": None})
    assert partial.resolutions == (FIRST,)
    with pytest.raises(ValueError, match="lacks `scheduler_1024`"):
        partial(tiny_image(), resolution=SECOND)
    with pytest.raises(ValueError, match=rf"`resolution` must be one of \[{FIRST}, {SECOND}\]"):
        pipe(tiny_image(), resolution=1000)
    with pytest.raises(ValueError, match="`coords_1024`"):
        tiny_pipeline()(tiny_image(), coords_1024=tiny_coords())


def test_components_that_do_not_belong_together():
    components = tiny_second_stage()
    components["transformer_1024"].register_to_config(sample_size=LATENT_SIZE)
    with pytest.raises(ValueError, match="do not belong together"):
        tiny_pipeline(**components)(tiny_image())


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"num_inference_steps_1024": 0}, "`num_inference_steps_1024`"),
        ({"latents_1024": torch.zeros(7, 4)}, "`coords_1024`"),
        ({"coords_1024": tiny_coords(), "latents_1024": torch.zeros(6, 4)}, "`latents_1024`"),
        ({"coords_1024": tiny_coords((2, 2))}, "`coords_1024`"),
        ({"coords_1024": tiny_coords() + 15}, "`coords_1024`"),
        ({"coords_1024": tiny_coords(), "coords": tiny_coords()}, "`coords_1024`"),
        ({"coords_1024": tiny_coords(), "resolution": FIRST}, "`coords_1024`"),
        ({"num_faces": 3}, "`num_faces`"),
    ],
)
def test_bad_arguments_are_named(pipe, kwargs, argument):
    with pytest.raises(ValueError, match=argument):
        pipe(tiny_image(), **kwargs)


def test_first_stage_without_a_surface(monkeypatch):
    pipe = tiny_pipeline(**tiny_second_stage())
    monkeypatch.setattr(pipe.vae.decoder.conv_out, "bias", torch.nn.Parameter(torch.tensor([100.0])))
    with pytest.raises(ValueError, match=r"no surface for \[0, 1\].*`generator`"):
        pipe([tiny_image(), tiny_image()], coords=tiny_coords((1, 1)))


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "all")
    index = json.loads((tmp_path / "all" / "model_index.json").read_text())
    assert index["vae_1024"] == ["diffusers_sparse3d", "SparseVAE"] and index["refiner"] == [None, None]
    assert index["default_num_inference_steps_1024"] == 1
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "all")
    loaded.set_progress_bar_config(disable=True)
    kwargs = {"coords_1024": tiny_coords(), "latents_1024": torch.ones(7, 4), "output_type": "latent"}
    torch.testing.assert_close(loaded(tiny_image(), **kwargs).latents, pipe(tiny_image(), **kwargs).latents)
    # Left out when loading, and given when loading.
    first = Direct3DS2Pipeline.from_pretrained(tmp_path / "all", vae_1024=None, transformer_1024=None)
    assert first.resolutions == (FIRST,) and first.transformer_1024 is None
    first.save_pretrained(tmp_path / "first")
    assert not (tmp_path / "first" / "vae_1024").exists()
    second = {name: getattr(pipe, name) for name in ("vae_1024", "transformer_1024", "scheduler_1024")}
    assert DiffusionPipeline.from_pretrained(tmp_path / "first", **second).resolutions == (FIRST, SECOND)


def test_offload_sequence_is_the_order_of_use(refined, monkeypatch):
    used = []
    for name, component in refined.components.items():
        if isinstance(component, torch.nn.Module):
            entry = "refine" if "refiner" in name else "decode" if "vae" in name else "forward"
            method = getattr(component, entry)
            monkeypatch.setattr(
                component, entry, lambda *args, _m=method, _n=name, **kwargs: (used.append(_n), _m(*args, **kwargs))[1]
            )
    refined(tiny_image(), generator=generators(0), output_type="sdf")
    assert list(dict.fromkeys(used)) == refined.model_cpu_offload_seq.split("->")


def test_the_refiner_takes_the_features_and_twice_the_level(refined):
    kwargs = {"coords": tiny_coords((1,)), "latents": torch.ones(1, 4), "resolution": FIRST}
    latents = refined(tiny_image(), output_type="latent", **kwargs).latents
    vae = refined.vae
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    decoded = vae.decode(latents, kwargs["coords"], return_features=True)
    with torch.no_grad():
        expected = refined.refiner.refine(decoded.sample, decoded.coords, decoded.features, FIRST)
    sdf = refined(tiny_image(), output_type="sdf", **kwargs).sdfs[0]
    assert torch.equal(sdf.coords, expected.coords) and not torch.allclose(sdf.feats, decoded.sample, atol=1e-3)
    torch.testing.assert_close(sdf.feats, expected.sample)
    mesh = refined(tiny_image(), level=0.1, **kwargs).meshes[0]
    surface = sparse_sdf_to_mesh(sdf.feats, sdf.coords, FIRST, 0.2)
    assert len(mesh.faces) > 0 and np.array_equal(mesh.vertices, surface.vertices)
    # The cells of the second stage come from this mesh.
    cells = refined(tiny_image(), **{**kwargs, "resolution": SECOND}, level=0.1, output_type="latent").coords
    assert torch.equal(cells[:, 1:], cells_near_surface(normalize_mesh(mesh)[0], SECOND))


def test_the_refiner_of_signs_keeps_the_level(refined):
    cells, noise = tiny_coords((1,)), torch.ones(1, 4)
    kwargs = {"coords_1024": cells, "latents_1024": noise}
    sdf = refined(tiny_image(), output_type="sdf", **kwargs).sdfs[0]
    latents = refined(tiny_image(), output_type="latent", **kwargs).latents
    vae = refined.vae_1024
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, cells)
    with torch.no_grad():
        expected = refined.refiner_1024.refine(decoded.sample, decoded.coords, SECOND)
    assert torch.equal(sdf.coords, expected.coords)
    torch.testing.assert_close(sdf.feats, expected.sample)
    mesh = refined(tiny_image(), level=0.1, **kwargs).meshes[0]
    assert np.array_equal(mesh.vertices, sparse_sdf_to_mesh(sdf.feats, sdf.coords, SECOND, 0.1).vertices)


def test_refiners_are_saved_and_loaded(refined, tmp_path):
    refined.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["refiner"] == ["diffusers_sparse3d", "SDFRefiner"]
    assert index["refiner_1024"] == ["diffusers_sparse3d", "SDFSignRefiner"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.refiner.conv_out.weight, refined.refiner.conv_out.weight)
    assert torch.equal(loaded.refiner_1024.conv_out.weight, refined.refiner_1024.conv_out.weight)


def test_half_precision_runs():
    pipe = tiny_pipeline(**tiny_second_stage()).to(torch.bfloat16)
    output = pipe(tiny_image(), coords=tiny_coords((2,)), generator=generators(0), output_type="sdf")
    assert output.sdfs[0].feats.dtype == torch.bfloat16 and output.sdfs[0].feats.isfinite().all()


def test_clean_up_of_the_mesh(pipe, monkeypatch):
    kwargs = {"coords": tiny_coords((1,)), "latents": torch.ones(1, 4), "resolution": FIRST}
    (mesh,) = pipe(tiny_image(), **kwargs).meshes
    (cleaned,) = pipe(tiny_image(), remove_floaters=True, remove_inner_parts=True, **kwargs).meshes
    assert 0 < len(cleaned.faces) < len(mesh.faces) and cleaned.body_count < mesh.body_count
    (simple,) = pipe(tiny_image(), remove_floaters=True, fill_holes=True, num_faces=500, **kwargs).meshes
    assert simple.is_watertight and len(simple.faces) < len(cleaned.faces)
    # A checkpoint may have floaters removed where a call does not say.
    pipe.register_to_config(default_remove_floaters=True)
    assert len(pipe(tiny_image(), remove_inner_parts=True, **kwargs).meshes[0].faces) == len(cleaned.faces)
    assert len(pipe(tiny_image(), remove_floaters=False, **kwargs).meshes[0].faces) == len(mesh.faces)
    pipe.register_to_config(default_remove_floaters=False)
    # A missing library is named before any model runs.
    monkeypatch.setattr("diffusers_sparse3d.geometry.clean_up.find_spec", lambda name: None)
    monkeypatch.setattr(SparseDiT, "forward", None)
    with pytest.raises(ImportError, match="`fill_holes`"):
        pipe(tiny_image(), fill_holes=True, **kwargs)


def test_parts_are_removed_before_the_second_stage_looks_for_cells(pipe, monkeypatch):
    kwargs = {"coords": tiny_coords((1,)), "latents": torch.ones(1, 4)}
    (mesh,) = pipe(tiny_image(), resolution=FIRST, **kwargs).meshes
    part = mesh.submesh([np.flatnonzero(mesh.triangles_center[:, 0] < -0.5)], append=True)
    monkeypatch.setattr("diffusers_sparse3d.geometry.clean_up.remove_floaters", lambda mesh: part)
    cells = pipe(tiny_image(), remove_floaters=True, output_type="latent", **kwargs).coords
    expected = cells_near_surface(normalize_mesh(part)[0], SECOND)
    assert torch.equal(cells[:, 1:], expected)
    assert not torch.equal(expected, cells_near_surface(normalize_mesh(mesh)[0], SECOND))

"""Generations with progress, without a page; and what the page refuses."""

import dataclasses
import functools
import itertools
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from diffusers_sparse3d import Direct3DS2Pipeline
from diffusers_sparse3d.app import generation
from diffusers_sparse3d.app.choices import FinishedMesh
from diffusers_sparse3d.app.files import FileStore
from diffusers_sparse3d.app.generation import GenerationError, Generator, Request
from diffusers_sparse3d.app.interface import AppSettings, Page
from diffusers_sparse3d.geometry.cell_mesh import cells_to_mesh
from diffusers_sparse3d.geometry.clean_up import MeshCleanUp
from diffusers_sparse3d.pipelines.background import BackgroundRemover
from diffusers_sparse3d.pipelines.selection import MeshScore, score_mesh
from tests.app.boxy import boxy_pipeline, make_boxy
from tests.pipelines.tiny import LATENT_SIZE, SECOND_LATENT_SIZE, tiny_image, tiny_pipeline, tiny_second_stage


SETTINGS = (str(8 * LATENT_SIZE), 1, 0, 1, 1, 2.0, 3.0, 0.0, [], 0)


def request(**kwargs):
    return Request((tiny_image(),), **{"seeds": (0,), "resolution": 8 * LATENT_SIZE, "steps": (2, 1), **kwargs})


def test_news_of_two_seeds_in_their_order():
    pipe = boxy_pipeline()
    clean_up = MeshCleanUp(num_faces=1000)
    masks = pipe.image_processor.preprocess(tiny_image())[1][:, 0].numpy()
    news = list(Generator(pipe).run(request(seeds=(0, 4), guidance_scales=(2.0, 1.0), clean_up=clean_up)))
    for seed in (0, 4):
        own = [item for item in news if item.seed == seed]
        assert [(item.text, item.share) for item in own] == [
            ("Looking at the picture", None),
            ("Finding the rough shape", 0.5),
            ("Finding the rough shape", 1.0),
            ("Adding detail", 1.0),
            ("Cleaning up", None),
            ("Done", 1.0),
        ]
        assert [item.finished for item in own] == [False] * 5 + [True]
        assert own[5].score == score_mesh(own[5].shape, masks).score
        generator = torch.Generator().manual_seed(seed)
        arguments = {"dense_num_inference_steps": 2, "num_inference_steps": 1, "guidance_scale": 1.0}
        expected = pipe(tiny_image(), generator=generator, dense_guidance_scale=2.0, **arguments).meshes[0]
        np.testing.assert_array_equal(own[4].shape.vertices, expected.vertices)
        assert len(own[5].shape.faces) < len(expected.faces)
        # The rough shape is made of the cells that the sparse stage works in.
        generator = torch.Generator().manual_seed(seed)
        cells = pipe(
            tiny_image(), generator=generator, output_type="latent", dense_guidance_scale=2.0, **arguments
        ).coords
        np.testing.assert_allclose(own[2].shape.volume, len(cells) * (2 / LATENT_SIZE) ** 3)
    assert [item.seed for item in news] == [0] * 6 + [4] * 6


def test_scores_are_those_of_the_pipeline_also_of_a_mask_with_haze():
    pipe = boxy_pipeline()
    hazy = np.array(tiny_image())
    hazy[..., 3] = np.maximum(hazy[..., 3], np.random.default_rng(0).integers(0, 11, (64, 64)))
    picture = Image.fromarray(hazy)
    request = Request((picture,), (0, 4), 8 * LATENT_SIZE, (2, 1), (2.0, 1.0))
    scores = [item.score for item in Generator(pipe).run(request) if item.finished]
    output = pipe(
        picture,
        num_meshes_per_image=2,
        generator=[torch.Generator().manual_seed(seed) for seed in request.seeds],
        dense_num_inference_steps=2,
        num_inference_steps=1,
        dense_guidance_scale=2.0,
        guidance_scale=1.0,
        select="ranked",
    )
    assert dict(enumerate(scores)) == {score.candidate: score.score for score in output.scores}


def test_meshes_of_several_photos_are_those_of_each_alone():
    pipe = boxy_pipeline()
    pictures = (tiny_image("red"), tiny_image("blue"))
    news = list(Generator(pipe).run(Request(pictures, (3, 4), 8 * LATENT_SIZE, (1, 1))))
    made = [item for item in news if item.finished]
    assert [(item.photo, item.seed) for item in made] == [(0, 3), (0, 4), (1, 3), (1, 4)]
    # All news of a mesh come together.
    assert [key for key, _ in itertools.groupby((item.photo, item.seed) for item in news)] == [
        (item.photo, item.seed) for item in made
    ]
    for item in made:
        alone = list(Generator(pipe).run(Request((pictures[item.photo],), (item.seed,), 8 * LATENT_SIZE, (1, 1))))
        np.testing.assert_array_equal(item.shape.vertices, alone[-1].shape.vertices)
    assert not np.array_equal(made[0].shape.vertices, made[2].shape.vertices)


@pytest.mark.parametrize(
    "error, said",
    [
        (GenerationError("The model found no shape in this photo."), "The model found no shape in this photo."),
        (ValueError("/home/somebody/secret"), "The generation failed."),
    ],
)
def test_one_that_fails_says_why_and_the_others_go_on(page, monkeypatch, error, said):
    find_cells = Generator._find_cells
    calls = []

    def fail_second(self, stage, latents):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return find_cells(self, stage, latents)

    monkeypatch.setattr(Generator, "_find_cells", fail_second)
    values = [*SETTINGS]
    values[1] = 3
    updates = list(page.generate(tiny_image(), None, False, *values))
    assert f"photo 1, seed 1: {said}" in updates[-1][0] and "secret" not in updates[-1][0]
    assert [made.seed for made in updates[-1][-2]] == [0, 2]


def test_when_time_is_up_what_is_finished_can_be_kept(page, monkeypatch):
    run = page.generator.run

    def late(request):
        yield from run(dataclasses.replace(request, seeds=request.seeds[:1]))
        raise GenerationError("The generation took longer than 5 seconds")

    monkeypatch.setattr(page.generator, "run", late)
    values = [*SETTINGS]
    values[1] = 2
    last = list(page.generate(tiny_image(), None, False, *values))[-1]
    assert "longer than 5 seconds" in last[0] and len(last[-2]) == 1


def test_photos_of_files(page, tmp_path):
    tiny_image("red").save(tmp_path / "a.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    path = str(tmp_path / "a.png")
    first, others, status = page.show_cut_outs(tiny_image(), [path, path], False)
    assert first.mode == "RGBA" and len(others["value"]) == 2 and others["visible"] and "Ready" in status
    first, others, _ = page.show_cut_outs(None, [path], False)
    assert first is None and len(others["value"]) == 1
    assert not page.show_cut_outs(tiny_image(), None, False)[1]["visible"]
    for files, message in (
        ([str(tmp_path / "large.png")], "too large"),
        ([str(tmp_path / "text.png")], r"^'?text.png is no picture"),
        ([path] * 9, "At most 8 photos"),
    ):
        with pytest.raises(gr.Error, match=message):
            page.show_cut_outs(None, files, False)
    values = [*SETTINGS]
    values[1] = 3
    with pytest.raises(gr.Error, match="At most 8 meshes"):
        next(page.generate(tiny_image(), [path, path], False, *values))


def test_the_first_surface_is_shown_while_the_second_stage_works():
    second = tiny_second_stage()
    make_boxy(second["vae_1024"])
    pipe = boxy_pipeline()
    coarse = pipe(tiny_image(), generator=torch.Generator().manual_seed(0), num_inference_steps=1).meshes[0]
    pipe = Direct3DS2Pipeline(**{**pipe.components, **second}, **pipe.parameters)
    pipe.set_progress_bar_config(disable=True)
    news = list(Generator(pipe).run(request(resolution=8 * SECOND_LATENT_SIZE)))
    shapes = [(item.text, item.shape) for item in news if item.shape is not None]
    assert [text for text, _ in shapes] == ["Finding the rough shape", "Adding detail", "Cleaning up", "Done"]
    np.testing.assert_array_equal(shapes[1][1].vertices, coarse.vertices)
    assert len(shapes[2][1].vertices) != len(coarse.vertices)


def test_closing_stops_the_work_and_frees_the_pipeline():
    pipe = boxy_pipeline()
    generator = Generator(pipe)
    run = generator.run(request(steps=(50, 50)))
    assert next(run).text == "Looking at the picture" and next(run).share == pytest.approx(0.02)
    run.close()
    assert all(thread.name != "generation" for thread in threading.enumerate())
    assert list(generator.run(request(steps=(1, 1))))[-1].finished


def test_time_limit_and_errors():
    with pytest.raises(GenerationError, match="longer than 0 seconds"):
        list(Generator(boxy_pipeline(), time_limit=0.0).run(request()))
    with pytest.raises(GenerationError, match="found no shape"):
        list(Generator(boxy_pipeline(occupancy_threshold=1.0)).run(request()))


@pytest.fixture(scope="module")
def page():
    return Page(Generator(boxy_pipeline()), BackgroundRemover(), AppSettings(max_pixels=5000))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, "4096", "resolution"),
        (1, 99, "Meshes"),
        (2, -1, "seeds"),
        (3, 10**9, "Steps"),
        (8, ["x"], "x"),
        (9, 2, "num_faces"),
    ],
)
def test_settings_from_other_programs_are_checked(page, place, value, message):
    values = [*SETTINGS]
    values[place] = value
    with pytest.raises(gr.Error, match=message):
        next(page.generate(tiny_image(), None, False, *values))


def test_the_page_says_which_mesh_fits_best(page, monkeypatch):
    scores = iter([0.3, 0.7, 0.5])
    monkeypatch.setattr(generation, "score_mesh", lambda *_: MeshScore(next(scores), 0.0, 1, ()))
    values = [*SETTINGS]
    values[1] = 3
    updates = list(page.generate(tiny_image(), None, False, *values))
    labels = [part["label"] for update in updates for part in update if isinstance(part, dict) and "label" in part]
    assert labels == ["Mesh 1, score 0.300", "Mesh 2, score 0.700", "Mesh 3, score 0.500"]
    assert "mesh 2 fits best" in updates[-1][0]


def test_unexpected_errors_say_nothing_of_the_server(page, monkeypatch):
    def fail(request):
        raise RuntimeError("/home/somebody/secret")
        yield

    monkeypatch.setattr(page.generator, "run", fail)
    with pytest.raises(gr.Error) as error:
        list(page.generate(tiny_image(), None, False, *SETTINGS))
    assert "secret" not in str(error.value) and "failed" in str(error.value)
    with pytest.raises(gr.Error, match="too large"):
        page.show_cut_outs(Image.new("RGB", (100, 100)), None, False)


def test_export_of_the_kept_mesh(page):
    mesh = cells_to_mesh(np.array([[0, 0, 0], [1, 0, 0]]), 4)
    with pytest.raises(gr.Error, match="first"):
        page.export([], "glb", "y", 0)
    one, other = FinishedMesh(0, 0, mesh), FinishedMesh(0, 1, mesh)
    with pytest.raises(gr.Error, match="Choose"):
        page.export([one, other], "glb", "y", 0)
    with pytest.raises(gr.Error, match="format"):
        page.export([one], "../x", "y", 0)
    path, _ = page.export([None, other], "stl", "z", 80)
    np.testing.assert_allclose(trimesh.load(path).extents, [80, 40, 40], rtol=1e-5)
    path, _ = page.export([one], "ply", "y", 0)
    np.testing.assert_allclose(trimesh.load(path).extents, [1, 0.5, 0.5], rtol=1e-5)


def test_export_of_the_meshes_of_several_photos(page):
    meshes = [cells_to_mesh(np.array([[0, 0, 0], [1, 0, 0]][:count]), 4) for count in (1, 2)]
    made = [FinishedMesh(0, 0, meshes[0]), None, FinishedMesh(2, 0, meshes[1])]
    paths, status = page.export(made, "stl", "y", 10)
    assert [Path(path).name for path in paths] == ["mesh_1.stl", "mesh_3.stl"] and "2 files" in status
    np.testing.assert_allclose(trimesh.load(paths[0]).extents, [10, 10, 10], rtol=1e-5)
    np.testing.assert_allclose(trimesh.load(paths[1]).extents, [10, 5, 5], rtol=1e-5)


def test_files_are_forgotten_after_their_lifetime():
    mesh, store = cells_to_mesh(np.zeros((1, 3), dtype=int), 2), FileStore(lifetime=3600)
    first = store.write(mesh, "mesh.glb")
    second = store.write(mesh, "mesh.glb")
    assert first != second
    store.lifetime = -1
    third = store.write(mesh, "mesh.stl")
    assert [str(path) for path in store.folder.rglob("*.*")] == [third]


@pytest.mark.parametrize("default", [False, True])
def test_floaters_go_as_the_page_says_which_begins_with_what_the_model_says(default):
    pipe = tiny_pipeline(default_remove_floaters=default)
    blocks = Page(Generator(pipe), BackgroundRemover(), AppSettings()).build()
    (boxes,) = (block for block in blocks.blocks.values() if getattr(block, "label", None) == "Clean up")
    assert boxes.value == ["Floating bits"] * default
    # Random weights leave many bits. The page has the last word, whatever the model says.
    made = list(Generator(pipe).run(request(guidance_scales=(2.0, 1.0))))[-1].shape
    settings = {"dense_num_inference_steps": 2, "num_inference_steps": 1, "guidance_scale": 1.0, "level": 0.0}
    call = functools.partial(pipe, tiny_image(), dense_guidance_scale=2.0, **settings)
    kept, clean = (
        call(generator=torch.Generator().manual_seed(0), remove_floaters=on).meshes[0] for on in (False, True)
    )
    assert len(made.faces) == len(kept.faces) > len(clean.faces)

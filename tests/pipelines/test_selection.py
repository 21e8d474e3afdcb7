"""The best of several meshes: the score, and what a call returns of them."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image, ImageDraw

from diffusers_sparse3d.pipelines.selection import MeshScore, score_mesh
from tests.pipelines.tiny import tiny_coords, tiny_image, tiny_pipeline


def bar(width: float) -> trimesh.Trimesh:
    return trimesh.creation.box((width, 1.0, width))


def bar_image(width: int) -> Image.Image:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((32 - width // 2, 4, 31 + width // 2, 59), fill="red")
    return image


def mask_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.getchannel("A")) > 0


def with_floater(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with another body inside, which no silhouette shows."""
    return trimesh.util.concatenate([mesh, trimesh.creation.icosphere(1, 0.05)])


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def made(pipe, monkeypatch):
    """Lets the pipeline make given meshes."""

    def make(meshes):
        monkeypatch.setattr(type(pipe), "extract_meshes", lambda *_: list(meshes))

    return make


def call(pipe, image, num_meshes, select, seeds=None):
    objects = len(image) if isinstance(image, list) else 1
    options = {"coords": tiny_coords((2,) * (objects * num_meshes)), "num_inference_steps": 1, "guidance_scale": 1.0}
    if seeds is not None:
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(image, num_meshes_per_image=num_meshes, select=select, **options)


def test_the_score_is_that_of_the_documents():
    mask = mask_of(bar_image(14))
    good, floater, wide = (score_mesh(mesh, [mask]) for mesh in (bar(0.25), with_floater(bar(0.25)), bar(0.8)))
    assert good.silhouette_iou > 0.9 and good.score == good.silhouette_iou and good.num_bodies == 1
    assert floater.num_bodies == 2 and floater.score == pytest.approx(floater.silhouette_iou - 0.01)
    assert wide.score < floater.score < good.score
    assert score_mesh(trimesh.Trimesh(), [mask]).score == -1
    both = score_mesh(bar(0.25), [mask, mask_of(bar_image(40))])
    assert both.silhouette_iou < good.silhouette_iou and len(both.views) == 2
    with pytest.raises(ValueError, match="`masks`"):
        score_mesh(bar(1.0), [])


def test_the_best_mesh_of_each_image_is_returned(pipe, made):
    narrow, wide = bar(0.25), bar(0.7)
    made([trimesh.Trimesh(), wide, with_floater(narrow), narrow, wide, narrow, trimesh.Trimesh(), with_floater(wide)])
    output = call(pipe, [bar_image(14), bar_image(40)], 4, "best")
    assert output.meshes == [narrow, wide]
    assert [score.candidate for score in output.scores] == [3, 0]
    assert all(isinstance(score, MeshScore) and score.num_bodies == 1 for score in output.scores)


def test_meshes_are_ranked(pipe, made):
    narrow, wide, nothing = bar(0.25), bar(0.7), trimesh.Trimesh()
    made([nothing, wide, with_floater(narrow), narrow])
    output = call(pipe, bar_image(14), 4, "ranked")
    assert [score.candidate for score in output.scores] == [3, 2, 1, 0]
    assert output.meshes[0] is narrow and output.meshes[2] is wide and output.meshes[3] is nothing
    assert sorted(score.score for score in output.scores) == [score.score for score in output.scores][::-1]
    assert output.to_tuple() == (output.meshes, output.scores)
    assert call(pipe, bar_image(14), 4, None).scores is None


def test_all_images_of_an_object_count(pipe, made):
    """A bar that is narrow from one side and wide from the other fits both pictures, the thin one only the first."""
    thin, flat = bar(0.25), trimesh.creation.box((0.25, 1.0, 0.7))
    made([thin, flat])
    assert call(pipe, bar_image(14), 2, "best").meshes == [thin]
    assert call(pipe, [[bar_image(14), bar_image(40)]], 2, "best").meshes == [flat]


def test_a_selection_is_of_the_meshes_that_there_would_be(pipe):
    plain, ranked = (call(pipe, tiny_image(), 2, select, seeds=(0, 1)) for select in (None, "ranked"))
    assert {score.candidate for score in ranked.scores} == {0, 1}
    for mesh, score in zip(ranked.meshes, ranked.scores):
        np.testing.assert_array_equal(mesh.vertices, plain.meshes[score.candidate].vertices)


def test_selections_need_meshes(pipe):
    with pytest.raises(ValueError, match=r"`select`.*'latent'"):
        pipe(tiny_image(), select="best", output_type="latent")
    interrupted = pipe(
        tiny_image(), select="best", callback_on_step_end=lambda pipe, *_: setattr(pipe, "_interrupt", True)
    )
    assert interrupted.interrupted and interrupted.scores is None

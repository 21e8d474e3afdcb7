"""Meshes side by side: which are kept, and what they are called."""

import pytest
import trimesh

from diffusers_sparse3d.app import choices
from diffusers_sparse3d.app.choices import FinishedMesh


BOX = trimesh.creation.box()


def made(*photos_and_seeds, scores=None):
    scores = scores or [None] * len(photos_and_seeds)
    return [FinishedMesh(photo, seed, BOX, score) for (photo, seed), score in zip(photos_and_seeds, scores)]


def test_keeping_one_leaves_those_of_other_photos():
    meshes = made((0, 0), (0, 1), (1, 0), (1, 1))
    assert choices.undecided(meshes) == {0, 1}
    first = choices.keep(meshes, 1)
    assert first == [None, *meshes[1:]] and choices.undecided(first) == {1}
    second = choices.keep(first, 2)
    assert second == [None, meshes[1], meshes[2], None] and choices.undecided(second) == set()
    assert choices.keep(second, 1) == second and choices.kept(second) == meshes[1:3]
    for place in (0, 4, -1):
        with pytest.raises(ValueError, match="no such mesh"):
            choices.keep(second, place)


@pytest.mark.parametrize(
    ("photos", "seeds", "titles"),
    [
        (1, 2, ["Mesh 1, score 0.500", "Mesh 2"]),
        (2, 1, ["Photo 1, score 0.500", "Photo 2"]),
        (2, 2, ["Photo 1, seed 7, score 0.500", "Photo 2, seed 9"]),
    ],
)
def test_titles(photos, seeds, titles):
    meshes = made((0, 7), (1, 9), scores=[0.5, None])
    assert [choices.title(meshes, place, photos, seeds) for place in (0, 1)] == titles


@pytest.mark.parametrize(
    ("meshes", "words"),
    [
        (made((0, 0)), "12 triangles"),
        (made((0, 0), (2, 0)), "2 meshes, one of each photo"),
        (made((0, 0), (0, 1), (0, 2), scores=[0.3, 0.7, 0.5]), "choose the one to keep, mesh 2 fits best"),
        (made((0, 0), (0, 1), (1, 0)), "choose the one to keep of each photo"),
    ],
)
def test_summary(meshes, words):
    assert choices.summary(meshes, []) == words
    assert choices.summary(meshes, ["one", "two"]) == f"{words}; one; two"

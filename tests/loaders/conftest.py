"""Tiny releases of random weights in the published layouts, and the folders that they convert to."""

import pytest

from diffusers_sparse3d.loaders.convert import convert
from diffusers_sparse3d.loaders.random_release import IMAGE_ENCODER_FILE, LAYOUTS, make_release


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """Folder of each layout."""
    folder = tmp_path_factory.mktemp("releases")
    for layout in LAYOUTS:
        make_release(folder / layout, layout, tiny=True)
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture(scope="session")
def converted(releases, tmp_path_factory):
    """Converted folder of each layout."""
    folder = tmp_path_factory.mktemp("converted")
    for layout, release in releases.items():
        convert(release, folder / layout, image_encoder=release / IMAGE_ENCODER_FILE)
    return {layout: folder / layout for layout in releases}

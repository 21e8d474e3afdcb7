import pytest

from tests.pipelines.tiny import tiny_image, tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny pipeline with random weights."""
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture
def image(tmp_path):
    """A picture with alpha."""
    tiny_image().save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")

"""The scripts of a release: what a wheel holds, and which models may be uploaded."""

import runpy
import sys
import zipfile
from pathlib import Path

import pytest

from tests.pipelines.tiny import tiny_pipeline


ROOT = Path(__file__).parents[1]


@pytest.fixture
def release():
    return runpy.run_path(str(ROOT / ".ci" / "check_release.py"))


def test_contents_of_wheels(release, tmp_path):
    wheel = tmp_path / "diffusers_sparse3d-0-py3-none-any.whl"
    needed = [f"diffusers_sparse3d/{name}" for name in release["NEEDED"]]
    # All of them but the configurations, which the build copies, are in the tree.
    assert all((ROOT / name).exists() for name in needed if "/configs/" not in name)

    def write(names):
        with zipfile.ZipFile(wheel, "w") as file:
            for name in names:
                file.writestr(name, "")
        return release["wheel_contents"](wheel)

    assert write(needed) == needed
    with pytest.raises(SystemExit, match=r"lacks py\.typed"):
        write(needed[1:])
    with pytest.raises(SystemExit, match="must not hold"):
        write([*needed, "tests/test_release.py"])


def test_models_to_upload(tmp_path, capsys, monkeypatch):
    upload = runpy.run_path(str(ROOT / ".ci" / "upload_model.py"))["main"]
    folder = tmp_path / "model"
    tiny_pipeline(weights_license="apache-2.0").save_pretrained(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # without `--yes`, the network is not asked for
    assert upload([str(folder), "owner/name"]) == 0
    out = capsys.readouterr().out
    assert "model_index.json" in out and "license: apache-2.0" in out

    def refused(words):
        assert upload([str(folder), "owner/name", "--yes"]) == 1
        assert words in capsys.readouterr().err

    (folder / "weights.ckpt").write_bytes(b"")
    refused("weights.ckpt")
    (folder / "weights.ckpt").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused("vae has no safetensors")
    tiny_pipeline().save_pretrained(tmp_path / "other")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        (tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n")
    refused("licence of the weights")


def test_container_gets_all_that_it_copies():
    """Every path that the Dockerfile copies exists, and .dockerignore lets it through."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert len(copied) >= 9
    for path in copied:
        assert (ROOT / path).exists() and f"!{path}" in allowed

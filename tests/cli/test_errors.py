"""Errors of the command line: one sentence, exit status 1, before the work, and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file

from diffusers_sparse3d import cli
from diffusers_sparse3d.cli import errors, generate, latents, models
from diffusers_sparse3d.pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline
from tests.pipelines.tiny import tiny_image


def run(*words):
    """The exit status of a command, whether it returns it or ends the program."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


@pytest.fixture
def no_work(monkeypatch):
    """Loading a model is an error: what is wrong must be told before."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generate, "load_pipeline", load)
    monkeypatch.setattr(latents, "_load_vae", load)


BAD = {
    "no picture": ("generate {folder}/none.png -o x.glb", "none.png"),
    "empty folder": ("generate {folder}/empty -o x.glb", "without pictures"),
    "no picture inside": ("generate {folder}/text.png -o x.glb", "text.png"),
    "suffix of the mesh": ("generate {image} -o x.xyz", "`--output`"),
    "folder as preview": ("generate {image} -o x.glb --preview {folder}/folder.png", "`--preview`"),
    "file as folder": ("generate {image} -o {folder}/text.png/x.glb", "`--output`"),
    "suffix of the preview": ("generate {image} -o x.glb --preview p.xyz", "`--preview`"),
    "suffix of the turntable": ("generate {image} -o x.glb --turntable p.avi", "`--turntable`"),
    "one file for two": ("generate {image} {image2} -o x.glb", "{{name}}"),
    "one preview for two": ("generate {image} --seeds 0,1 -o out --preview p.png", "{{name}}"),
    "twice the same": ("generate {image} {image} -o out", "photo"),
    "mask of two": ("generate {image} {image2} -o out --mask {image}", "`--mask`"),
    "no mask": ("generate {image} -o x.glb --mask {folder}/none.png", "`--mask`"),
    "folder as mask": ("generate {image} -o x.glb --mask {folder}/empty", "`--mask`"),
    "level": ("generate {image} -o x.glb --level 5", "--level"),
    "guidance nan": ("generate {image} -o x.glb --guidance-scale nan", "--guidance-scale"),
    "guidance inf": ("generate {image} -o x.glb --dense-guidance-scale inf", "--dense-guidance-scale"),
    "steps": ("generate {image} -o x.glb --steps 0", "--steps"),
    "seed": ("generate {image} -o x.glb --seed -1", "--seed"),
    "seeds": ("generate {image} -o out --seeds 3-1", "--seeds"),
    "select of one": ("generate {image} -o x.glb --select best", "`--seeds`"),
    "faces": ("generate {image} -o x.glb --num-faces 2", "--num-faces"),
    "resolution": ("generate {image} -o x.glb --resolution 1000000000", "--resolution"),
    "device": ("generate {image} -o x.glb --device gpu", "`--device`"),
    "no output": ("generate {image}", "--output"),
    "model": ("generate {image} -o x.glb --model {folder}/none", "`--model`"),
    "folder without a model": ("generate {image} -o x.glb --model {folder}/empty", "model_index.json"),
    "weight of a LoRA": ("generate {image} -o x.glb --lora style:much", "`--lora` must have a finite number"),
    "infinite weight of a LoRA": ("generate {image} -o x.glb --lora style:inf", "`--lora` must have a finite number"),
    "weight without a LoRA": ("generate {image} -o x.glb --lora :0.5", "`--lora`"),
    "no LoRA": ("generate {image} -o x.glb --lora {folder}/none", "`--lora`"),
    "LoRA without weights": ("generate {image} -o x.glb --lora {folder}/empty:0.5", "safetensors"),
    "level of decode": ("decode {folder}/cut.safetensors -o x.glb --level 5", "--level"),
    "cut latents": ("decode {folder}/cut.safetensors -o x.glb", "no whole safetensors"),
    "other tensors": ("decode {folder}/other.safetensors -o x.glb", "`encode`"),
    "no mesh": ("encode {folder}/none.ply -o x.safetensors", "none.ply"),
    "no triangles": ("encode {folder}/empty.glb -o x.safetensors", "empty.glb"),
    "suffix of latents": ("encode {folder}/empty.glb -o x.bin", ".safetensors"),
    "resolution of encode": ("encode {folder}/empty.glb -o x.safetensors --resolution 1000000000", "--resolution"),
    "mesh to view": ("view {folder}/text.png", "text.png"),
    "size of a print": ("print {folder}/box.ply --size 0", "--size"),
    "suffix of a print": ("print {folder}/box.ply -o x.obj", ".3mf"),
    "page to view": ("view {folder}/box.ply -o page.pdf", ".html"),
    "unknown command": ("generat", "generat"),
}


@pytest.mark.parametrize(("command", "expected"), BAD.values(), ids=BAD)
def test_one_sentence_before_any_work(command, expected, model, image, tmp_path, capsys, no_work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_image().save(tmp_path / "photo2.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.glb").write_bytes(b"glTF")
    trimesh.creation.box().export(tmp_path / "box.ply")
    save_file({"latents": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-2])
    before = sorted(tmp_path.rglob("*"))
    words = command.format(folder=tmp_path, image=image, image2=tmp_path / "photo2.png").split()
    if "--model" not in words and words[0] in ("generate", "encode", "decode"):
        words += ["--model", model]

    assert run(*words) == 1
    captured = capsys.readouterr()
    assert expected.format() in captured.err and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("diffusers-sparse3d")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lora_that_does_not_fit_is_told_once(model, image, tmp_path, capsys):
    """Not once for each picture, each time after loading the model."""
    tiny_image().save(tmp_path / "photo2.png")
    save_file({"transformer.none.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "style.safetensors")
    words = ("generate", image, tmp_path / "photo2.png", "-o", tmp_path / "out", "--model", model)
    assert run(*words, "--lora", tmp_path / "style.safetensors") == 1
    captured = capsys.readouterr()
    assert "`--lora`" in captured.err and "none" in captured.err and "style.safetensors" in captured.err
    assert captured.err.count("diffusers-sparse3d") == 1 and "[2/2]" not in captured.out


def test_debug_lets_the_traceback_through(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(["--debug", "view", str(tmp_path / "none.glb")])
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(["view", str(tmp_path / "none.glb"), "--debug"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of GPU memory; `--low-memory`"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory; "),
        (MemoryError(), "out of memory; `--low-memory`"),
        (KeyboardInterrupt(), "interrupted"),
        (KeyError("x"), "KeyError: 'x' (`--debug` shows where)"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines (`--debug` shows where)"),
    ],
)
def test_errors_during_the_work(error, expected, model, image, tmp_path, capsys, monkeypatch):
    def call(*args, **kwargs):
        raise error

    monkeypatch.setattr(Direct3DS2Pipeline, "__call__", call)
    output = tmp_path / "mesh.glb"
    output.write_text("old")
    assert run("generate", image, "-o", output, "--model", model, "--device", "cpu") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"diffusers-sparse3d generate: {expected}")
    assert output.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["mesh.glb", "photo.png"]


def test_advice_for_training_is_of_training():
    assert "gradient checkpointing" in errors.explain(MemoryError(), ["train", "dit"])


def test_a_killed_write_leaves_the_old_file(model, image, tmp_path, capsys, monkeypatch):
    """The mesh is written beside its place: an error half-way leaves neither a cut file nor a leftover."""

    def export(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trimesh.Trimesh, "export", export)
    output = tmp_path / "mesh.glb"
    output.write_text("old")
    words = ("generate", image, "-o", output, "--model", model, "--device", "cpu", "--steps", "1")
    assert run(*words) == 1
    assert "No space left" in capsys.readouterr().err
    assert output.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["mesh.glb", "photo.png"]


def test_one_bad_picture_does_not_stop_the_others(model, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    tiny_image().save(folder / "a.png")
    Image.new("RGBA", (32, 32)).save(folder / "b.png")  # nothing in it
    tiny_image("blue").save(folder / "c.png")
    words = ("generate", folder, "-o", tmp_path / "out", "--model", model, "--device", "cpu", "--steps", "1")
    assert run(*words) == 1
    captured = capsys.readouterr()
    assert sorted(os.listdir(tmp_path / "out")) == ["a.glb", "c.glb"]
    assert "b: " in captured.err and "1 of 3" in captured.err and "[3/3] c" in captured.out


def test_default_model_is_the_repository_s(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CHECKPOINTS", tmp_path)
    with pytest.raises(ValueError, match=r"`--model` is needed.*Hub"):
        models.resolve_model(None)
    path = tmp_path / "direct3d-s2-small"
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    assert models.resolve_model(None) == models.resolve_model("direct3d-s2-small") == str(path)
    assert models.resolve_model("owner/name") == "owner/name"
    for wrong in ("name", "./a/b", "/a/b", "a/b/c", "owner/"):
        with pytest.raises(ValueError, match="neither a folder"):
            models.resolve_model(wrong)


def test_a_model_of_another_kind_is_named(model, image, tmp_path, capsys):
    words = ("generate", image, "-o", tmp_path / "x.glb", "--model", model, "--device", "cpu", "--resolution", "512")
    assert run(*words) == 1
    assert "`--resolution` must be 64" in capsys.readouterr().err


def test_module_and_exit_status():
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "diffusers_sparse3d", "view", "none.glb"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "diffusers-sparse3d view: `mesh` 'none.glb' does not exist\n"

"""The command line, on a tiny pipeline with random weights."""

import gc
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file

import diffusers_sparse3d
from diffusers_sparse3d import cli
from diffusers_sparse3d.geometry import render
from diffusers_sparse3d.ops import spatial_sparse_attention
from tests.pipelines.tiny import LATENT_SIZE, SECOND_LATENT_SIZE, tiny_pipeline, tiny_second_stage


def test_generate(model, image, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(render, "preview", partial(render.preview, size=64))
    output, preview = tmp_path / "out" / "mesh.glb", tmp_path / "out" / "mesh.png"
    command = [
        "generate",
        image,
        "-o",
        str(output),
        "--model",
        model,
        "--device",
        "cpu",
        "--seed",
        "1",
        "--steps",
        "1",
    ]
    assert cli.main([*command, "--preview", str(preview)]) == 0
    mesh = trimesh.load_mesh(output)
    assert len(mesh.faces) > 0
    assert str(output) in capsys.readouterr().out
    pipe = tiny_pipeline()
    expected = pipe(image, num_inference_steps=1, generator=torch.Generator().manual_seed(1)).meshes[0]
    np.testing.assert_allclose(mesh.bounds, expected.bounds, atol=1e-3)
    picture = np.asarray(Image.open(preview).convert("RGB"))
    size = picture.shape[0]
    assert picture.shape[1] == 5 * size
    assert [bool((picture[:, i * size : (i + 1) * size] < 250).any()) for i in range(5)] == [True] * 5


def test_generate_at_a_chosen_resolution_with_clean_up(image, tmp_path, capsys):
    tiny_pipeline(**tiny_second_stage()).save_pretrained(tmp_path / "model")
    command = ["generate", image, "--model", str(tmp_path / "model"), "--device", "cpu", "--steps", "1"]
    command += ["--resolution", str(8 * LATENT_SIZE), "--remove-floaters", "--remove-inner-parts"]
    output = tmp_path / "mesh.ply"
    assert cli.main([*command, "--num-faces", "2000", "-o", str(output)]) == 0
    mesh = trimesh.load_mesh(output)
    assert 2000 <= len(mesh.faces) < 5000  # its many handles keep some; about 145,000 without
    # A model may have floaters removed where the command does not say.
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"default_remove_floaters": True}))
    plain, bodies = [word for word in command if not word.startswith("--remove")], []
    for words in ([], ["--no-remove-floaters"]):
        assert cli.main([*plain, *words, "-o", str(output)]) == 0
        bodies.append(trimesh.load_mesh(output).body_count)
    assert bodies[0] < bodies[1]
    command[command.index("--resolution") + 1] = "1024"
    assert cli.main([*command, "-o", str(tmp_path / "mesh.glb")]) == 1
    assert "`--resolution`" in capsys.readouterr().err
    assert cli.main(["info", "--model", str(tmp_path / "model")]) == 0
    assert f"{8 * LATENT_SIZE} or {8 * SECOND_LATENT_SIZE}" in capsys.readouterr().out


def test_encode_then_decode_restores_place_and_scale(model, tmp_path, capsys):
    box = trimesh.creation.box(extents=(4, 2, 3)).apply_translation((10, 20, 30))
    box.export(tmp_path / "box.ply")
    latents, mesh, normalized = tmp_path / "box.safetensors", tmp_path / "mesh.ply", tmp_path / "normalized.ply"
    common = ["--model", model, "--device", "cpu"]
    assert cli.main(["encode", str(tmp_path / "box.ply"), "-o", str(latents), *common]) == 0
    tensors = load_file(latents)
    assert tensors["latents"].shape == (len(tensors["coords"]), 4) and tensors["coords"].max() < LATENT_SIZE
    assert int(tensors["resolution"]) == 8 * LATENT_SIZE
    assert cli.main(["decode", str(latents), "-o", str(mesh), *common]) == 0
    assert cli.main(["decode", str(latents), "-o", str(normalized), "--normalized", *common]) == 0
    mesh, normalized = trimesh.load_mesh(mesh, process=False), trimesh.load_mesh(normalized, process=False)
    assert np.abs(normalized.vertices).max() <= 1.001
    np.testing.assert_allclose(mesh.bounds, normalized.bounds * 4 / 1.9 + (10, 20, 30), atol=1e-4)
    np.testing.assert_allclose(mesh.area, normalized.area * (4 / 1.9) ** 2, rtol=1e-4)


def test_info(model, capsys):
    assert cli.main(["info", "--model", model]) == 0
    out = capsys.readouterr().out
    for expected in ("torch", "SparseDiT", "default_num_inference_steps"):
        assert expected in out
    lines = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in out.splitlines() if line)
    modules = [part for part in tiny_pipeline().components.values() if isinstance(part, torch.nn.Module)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    assert lines["resolution"] == str(8 * LATENT_SIZE) and lines["licence of the weights"] == "unknown"
    assert lines["vae"].startswith(f"SparseVAE, {sum(p.numel() for p in tiny_pipeline().vae.parameters()):,} ")
    assert lines["memory of the weights"] == (
        f"float32 {4 * sum(sizes) / 1e6:.1f} MB, half precision {2 * sum(sizes) / 1e6:.1f} MB"
    )
    assert lines["with --low-memory, GPU"].startswith(f"float32 {4 * max(sizes) / 1e6:.1f} MB")


def test_the_app_compiles_kernels_before_it_serves(model, loras, monkeypatch):
    server = pytest.importorskip("diffusers_sparse3d.app.server")
    order: list[str] = []
    pipes = []
    monkeypatch.setattr(diffusers_sparse3d.Direct3DS2Pipeline, "compile_kernels", lambda pipe: order.append("kernels"))
    monkeypatch.setattr(server, "start_app", lambda pipe, *_: order.append("start") or pipes.append(pipe))
    assert cli.main(["app", "--model", model, "--device", "cpu", "--lora", loras[0]]) in (0, None)
    assert order == ["kernels", "start"]
    # With the LoRA weights in its own.
    weight, own = pipes[0].transformer.proj_out.weight, tiny_pipeline().transformer.proj_out.weight
    assert not torch.allclose(weight, own)


def test_tune(model, monkeypatch, capsys):
    if not torch.cuda.is_available():
        assert cli.main(["tune", "--model", model]) == 1
        assert "needs a GPU" in capsys.readouterr().err
    settings = {}
    monkeypatch.setattr(
        diffusers_sparse3d, "tune_spatial_sparse_attention", lambda **kwargs: settings.update(kwargs) or "the table"
    )
    assert cli.main(["tune", "--model", model, "--dtype", "float16", "--budget", "3"]) == 0
    assert "the table" in capsys.readouterr().out
    config = tiny_pipeline().transformer.config
    assert settings["num_heads"] == config.num_attention_heads and settings["topk"] == config.topk
    assert settings["dtype"] == torch.float16 and settings["budget"] == 3
    inspect.signature(spatial_sparse_attention.tune_spatial_sparse_attention).bind(**settings)


def test_help_and_version_need_neither_torch_nor_diffusers():
    code = """
import sys
from diffusers_sparse3d import cli
for option in ("--help", "--version"):
    try:
        cli.main([option])
    except SystemExit as end:
        assert end.code == 0
heavy = {"torch", "diffusers", "transformers", "trimesh", "numpy", "yaml"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    environment = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert all(
        command in run.stdout for command in ("generate", "prepare", "train", "evaluate", "assemble", "convert")
    )
    assert diffusers_sparse3d.__version__ in run.stdout


@pytest.mark.parametrize("words", cli.LIBRARY_COMMANDS)
def test_commands_of_the_scripts(words, capsys):
    """Each command has the arguments of its script; what follows the command is parsed by the library alone."""
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    assert f"usage: diffusers-sparse3d {' '.join(words)} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--no-such-option"])
    assert end.value.code == 1


def test_errors_of_the_scripts_are_told_without_a_traceback(tmp_path, capsys):
    assert cli.main(["prepare", "--input", str(tmp_path), "--output", str(tmp_path / "data")]) == 1
    assert "holds no mesh" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "dit", "--config", "small/dit_middle"])
    assert end.value.code == 1 and "small/dit_sparse" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is not a file"):
        cli.main(["convert", "--original", str(tmp_path), "--output", str(tmp_path / "converted")])


def test_scripts_run_the_same_code():
    """Every script of `training/` and `conversion/`, started by its path, calls the `main` of its command.

    That of the evaluation has an exit status.
    """
    root = Path(__file__).parents[2]
    scripts = {
        "training/prepare_data.py": ("prepare",),
        "training/train_dense_vae.py": ("train", "dense-vae"),
        "training/train_sparse_vae.py": ("train", "sparse-vae"),
        "training/train_dit.py": ("train", "dit"),
        "training/train_refiner.py": ("train", "refiner"),
        "training/train_lora.py": ("train", "lora"),
        "training/evaluate.py": ("evaluate",),
        "training/assemble_pipeline.py": ("assemble",),
        "conversion/convert_direct3d_s2.py": ("convert",),
    }
    assert set(scripts.values()) == set(cli.LIBRARY_COMMANDS)
    for script, words in scripts.items():
        module = import_module(f"diffusers_sparse3d.{cli.LIBRARY_COMMANDS[words][0]}")
        called, statuses = [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "main", lambda *arguments, called=called: called.append(arguments) or 7)
            try:
                runpy.run_path(str(root / script), run_name="__main__")
            except SystemExit as end:
                statuses.append(end.code)
        assert called == [()] and statuses == [7] * (words == ("evaluate",))


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_looked_for_rarely_during_a_command(fails, monkeypatch):
    before, seen = gc.get_threshold(), []

    def information(args):
        seen.append(gc.get_threshold())
        if fails:
            raise ValueError

    monkeypatch.setattr(import_module("diffusers_sparse3d.cli.information"), "info", information)
    assert cli.main(["info"]) == int(fails)
    assert seen[0][0] > 10 * before[0] and gc.get_threshold() == before


@pytest.mark.parametrize("status", [0, 1])
def test_the_program_ends_with_all_that_was_printed(status):
    """The status, what is in the buffers, and what others do at the end; nothing of the modules is taken apart."""
    code = f"""
import atexit, sys
from diffusers_sparse3d import cli

class Part:
    def __del__(self):
        print("taken apart")

sys.modules["part"] = Part()
atexit.register(print, "at the end")
cli.main = lambda: print("result", end=" ") or {status}
sys.argv = ["diffusers-sparse3d", "info"]
cli.run_program()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "result at the end\n", "")

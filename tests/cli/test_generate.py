"""Pictures, seeds and outputs of the command `generate`."""

import os
import re
from functools import partial

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from diffusers_sparse3d import cli
from diffusers_sparse3d.cli.models import add_loras, resolve_loras
from diffusers_sparse3d.cli.outputs import Job, output_paths, plan_jobs
from diffusers_sparse3d.cli.parser import seed_list
from diffusers_sparse3d.geometry import render, turntable
from diffusers_sparse3d.pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline
from diffusers_sparse3d.pipelines.pipeline_output import Direct3DS2PipelineOutput
from tests.pipelines.tiny import tiny_image, tiny_pipeline


COMMON = ("--device", "cpu", "--steps", "1", "--dense-steps", "1")


def test_folders_and_seeds(model, tmp_path, capsys):
    """Each file holds the mesh of its picture and seed, by the pipeline called by hand."""
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    pictures = {"a": tiny_image(), "b": tiny_image("blue", (2, 20, 60, 44))}
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no picture")
    command = ["generate", str(folder), "-o", str(output / "{name}.ply"), "--seeds", "3,5", "--model", model]
    assert cli.main([*command, *COMMON]) == 0
    assert sorted(os.listdir(output)) == ["a-3.ply", "a-5.ply", "b-3.ply", "b-5.ply"]
    pipe = tiny_pipeline()
    for name, seed in (("a", 5), ("b", 3)):
        generator = torch.Generator().manual_seed(seed)
        steps = {"num_inference_steps": 1, "dense_num_inference_steps": 1}
        expected = pipe(pictures[name], **steps, generator=generator).meshes[0]
        mesh = trimesh.load_mesh(output / f"{name}-{seed}.ply", process=False)
        np.testing.assert_allclose(mesh.vertices, expected.vertices, atol=1e-5)
    assert re.findall(r"\[(\d/4)\] (\S+)", capsys.readouterr().out) == [
        ("1/4", "a-3"),
        ("2/4", "a-5"),
        ("3/4", "b-3"),
        ("4/4", "b-5"),
    ]


@pytest.fixture
def seen(monkeypatch):
    """What the pipeline is called with; its mesh is a box."""
    calls = []

    def call(self, image, mask_image, **kwargs):
        calls.append((image, mask_image, kwargs))
        return Direct3DS2PipelineOutput(meshes=[trimesh.creation.box()])

    monkeypatch.setattr(Direct3DS2Pipeline, "__call__", call)
    return calls


def alpha(picture):
    return np.asarray(picture.getchannel("A"))


def test_masks_backgrounds_and_views(model, tmp_path, seen):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:30, 5:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    tiny_image().save(tmp_path / "other.png")
    photo, other = str(tmp_path / "photo.png"), str(tmp_path / "other.png")
    command = ["generate", photo, "-o", str(tmp_path / "x.stl"), "--model", model, *COMMON]

    assert cli.main([*command, "--mask", str(tmp_path / "mask.png")]) == 0
    np.testing.assert_array_equal(alpha(seen[-1][0][0][0]), mask)
    np.testing.assert_array_equal(np.asarray(seen[-1][1][0][0]), mask)
    assert cli.main([*command, "--keep-background"]) == 0
    assert alpha(seen[-1][0][0][0]).min() == 255
    assert cli.main(["generate", other, *command[1:], "--one-object", "--keep-background"]) == 0
    images, masks, _ = seen[-1]
    assert len(images) == len(masks) == 1 and len(images[0]) == len(masks[0]) == 2


def test_low_memory_and_dtype(model, image, tmp_path, seen, monkeypatch):
    from diffusers_sparse3d.cli import generate

    pipes, load = [], generate.load_pipeline
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pipes.append(load(*args)) or pipes[-1])
    command = ["generate", image, "-o", str(tmp_path / "x.glb"), "--model", model, "--device", "cpu"]
    assert cli.main([*command, "--low-memory", "--dtype", "bfloat16"]) == 0
    (pipe,) = pipes
    assert pipe.transformer.dtype == torch.bfloat16 and not pipe._batches_guidance and pipe.dense_vae.use_slicing


def test_lora(model, loras, image, tmp_path, monkeypatch):
    """The command's pipeline has these adapters, weighted as it says, in its own weights."""
    pipes, (one, both) = [], loras
    command = ["generate", image, "-o", str(tmp_path / "x.glb"), "--model", model, *COMMON]
    with monkeypatch.context() as patch:
        box = Direct3DS2PipelineOutput(meshes=[trimesh.creation.box()])
        patch.setattr(Direct3DS2Pipeline, "__call__", lambda self, *args, **kwargs: pipes.append(self) or box)
        file = f"{both}/pytorch_lora_weights.safetensors"
        assert cli.main([*command, "--lora", f"{one}:0.5", "--lora", file]) == 0
    (fused,) = pipes
    by_hand, without = tiny_pipeline(), tiny_pipeline()
    by_hand.load_lora_weights(one, adapter_name="one")
    by_hand.load_lora_weights(both, adapter_name="both")
    by_hand.set_adapters(["one", "both"], [0.5, 1.0])

    def latents(pipe, **kwargs):
        output = pipe(image, output_type="latent", generator=torch.Generator().manual_seed(0), **kwargs)
        return output.latents, output.coords

    (result, coords), (expected, expected_coords) = latents(fused), latents(by_hand)
    assert torch.equal(coords, expected_coords) and not torch.equal(coords, latents(without)[1])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    result, other = latents(fused, coords=coords)[0], latents(without, coords=coords)[0]
    assert (result - other).norm() > 0.01 * other.norm()
    # No layers besides: they would take time, and keep kernels and graphs of plain layers from being used.
    assert fused.get_list_adapters() == {} and not getattr(fused.transformer, "peft_config", None)


def test_loras_of_quantised_weights_stay_beside_them(loras):
    pipe = tiny_pipeline()
    pipe.transformer.hf_quantizer = object()
    add_loras(pipe, resolve_loras(f"{path}:0.5" for path in loras))
    assert pipe.get_active_adapters() == ["lora_0", "lora_1"]
    assert pipe.transformer.proj_out.scaling == {"lora_0": 0.5, "lora_1": 0.5}


def test_texts_of_loras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("style.safetensors", "a:b/x.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = {
        "style.safetensors": ("style.safetensors", 1.0),
        "./style.safetensors:-0.5": ("./style.safetensors", -0.5),
        "owner/name": ("owner/name", 1.0),
        "owner/name:2": ("owner/name", 2.0),
        "a:b/x.safetensors": ("a:b/x.safetensors", 1.0),
        "a:b:1": ("a:b", 1.0),
    }
    assert resolve_loras(expected) == list(expected.values())
    # The drive is of the path, which is not there.
    for text in (r"C:\style", r"C:\style:0.5", "C:/style/x"):
        with pytest.raises(ValueError, match=re.escape(f"{text.removesuffix(':0.5')!r} is neither")):
            resolve_loras([text])


def test_turntable_and_preview(model, image, tmp_path, seen, monkeypatch):
    monkeypatch.setattr(turntable, "write_turntable", partial(turntable.write_turntable, num_frames=4, size=32))
    monkeypatch.setattr(render, "preview", partial(render.preview, size=40))
    animation, preview = tmp_path / "{name}.gif", tmp_path / "{name}.webp"
    command = ["generate", image, "-o", str(tmp_path / "x.glb"), "--model", model, *COMMON]
    assert cli.main([*command, "--turntable", str(animation), "--preview", str(preview)]) == 0
    with Image.open(tmp_path / "photo.gif") as turn:
        assert turn.n_frames == 4 and turn.size == (32, 32)
    assert Image.open(tmp_path / "photo.webp").size == (5 * 40, 40)


def test_the_best_of_several_seeds(model, image, tmp_path, monkeypatch, capsys):
    """Of a bar and two discs, the better disc is written, and the scores name the seeds."""
    seeds, shapes = [], [trimesh.creation.box((0.1, 1, 0.1)), trimesh.creation.icosphere(2)]
    shapes.append(trimesh.util.concatenate([shapes[1], trimesh.creation.icosphere(1, 0.1)]))

    def extract_meshes(self, stage, latents, coords, batch_size, level, max_opening):
        return shapes

    def denoise(self, stage, latents, *args):
        seeds.append(latents)
        return latents

    monkeypatch.setattr(Direct3DS2Pipeline, "extract_meshes", extract_meshes)
    monkeypatch.setattr(Direct3DS2Pipeline, "denoise", denoise)
    command = ["generate", image, "-o", str(tmp_path / "x.ply"), "--model", model, "--seeds", "7,3,5"]
    assert cli.main([*command, "--select", "best"]) == 0
    assert trimesh.load_mesh(tmp_path / "x.ply").faces.shape == shapes[1].faces.shape
    assert re.findall(r"seed (\d): score (\S+), .* (\d) bodies", capsys.readouterr().out)[0][::2] == ("3", "1")
    noise = torch.randn(seeds[0].shape[1:], generator=torch.Generator().manual_seed(3))
    assert torch.equal(seeds[0][1], noise)


def test_names_of_jobs(tmp_path):
    from pathlib import Path

    a, b = Path("x/a.png"), Path("y/b.jpg")
    assert plan_jobs([a, b], [0]) == [Job((a,), (0,), "a"), Job((b,), (0,), "b")]
    assert plan_jobs([a, b], [0, 1], one_object=True) == [Job((a, b), (0,), "a-0"), Job((a, b), (1,), "a-1")]
    assert plan_jobs([a, b], [4, 1], select=True) == [Job((a,), (4, 1), "a"), Job((b,), (4, 1), "b")]
    with pytest.raises(ValueError, match=r"x/a.png.*z/a.jpg"):
        plan_jobs([a, Path("z/a.jpg")], [0])
    jobs = plan_jobs([a, b], [0])
    folder = output_paths("--output", tmp_path, jobs, (".glb", ".stl"), ".stl")
    assert folder == {"a": tmp_path / "a.stl", "b": tmp_path / "b.stl"}
    assert output_paths("--output", tmp_path / "{name}" / "m.glb", jobs, (".glb",))["b"] == tmp_path / "b" / "m.glb"


def test_seed_lists():
    assert seed_list("0,4-6,2") == [0, 4, 5, 6, 2]

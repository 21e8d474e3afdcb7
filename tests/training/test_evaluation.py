import functools
import json
import multiprocessing
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import trimesh
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from diffusers_sparse3d import DenseDiT, DenseVAE, Direct3DS2Pipeline, SDFRefiner, SparseDiT, SparseVAE, cli
from diffusers_sparse3d.geometry import metrics
from diffusers_sparse3d.models.outputs import SDFRefinerOutput
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.evaluation import command, comparison
from diffusers_sparse3d.training.evaluation.command import main, parse_arguments, read_train_rows
from diffusers_sparse3d.training.evaluation.comparison import compare, draw_baseline, run_parallel
from diffusers_sparse3d.training.evaluation.models import decode, read_samples, sample, save_samples
from diffusers_sparse3d.training.evaluation.shapes import dataset_mesh


def report(output, *arguments):
    main([*arguments, "--output", str(output), "--device", "cpu"])
    return json.loads((output / f"{arguments[0]}.json").read_text())


class PerfectVAE(SparseVAE):
    """Decodes to the values that it was given: the oracle of the evaluation's own arithmetic."""

    def encode(self, feats, coords, **kwargs):
        self.given = {tuple(key): value for key, value in zip(coords.tolist(), feats[:, 0].tolist())}
        return super().encode(feats, coords, **kwargs)

    def decode(self, latents, coords, **kwargs):
        output = super().decode(latents, coords, **kwargs)
        # What is not in the band is outside here, which closes the band's inner side with a second surface.
        values = [self.given.get(tuple(key), 1.0) for key in output.coords.tolist()]
        output.sample = torch.tensor(values)[:, None]
        return output


class Doubling(SDFRefiner):
    """Refines distances over tau to twice of them, as refiners are trained to give the true ones."""

    def refine(self, feats, coords, features, **kwargs):
        return SDFRefinerOutput(sample=2 * feats, coords=coords)


def test_reconstruction(tmp_path, small_data, sparse_vae_model, monkeypatch, few_samples):
    SparseVAE(**sparse_vae_model).save_pretrained(tmp_path / "vae")
    arguments = ["reconstruction", "--model", str(tmp_path / "vae"), "--data", str(small_data), "--num_workers", "0"]
    untrained = report(tmp_path / "a", *arguments, "--num_pictures", "0")
    one_in_two = report(tmp_path / "c", *arguments, "--num_pictures", "0", "--every", "2")
    assert [sample["id"] for sample in one_in_two["samples"]] == ["capsule"]
    assert untrained["summary"]["count"] == 2 and untrained["summary"]["f1_0.05"]["mean"] < 0.9
    monkeypatch.setattr(command, "SparseVAE", PerfectVAE)
    # A dataset may have no pictures: they are not needed.
    monkeypatch.setattr(SparseSDFDataset, "num_images", property(lambda data: np.zeros(len(data), int)))
    perfect = report(tmp_path / "b", *arguments, "--num_pictures", "1")
    # Recall is perfect; precision counts the second surface, two grid spacings (0.13) further in.
    assert 0.55 < perfect["summary"]["f1_0.05"]["mean"] <= 1
    assert [sample["id"] for sample in perfect["samples"]] == ["capsule", "torus"]
    sheet = Image.open(tmp_path / "b" / "reconstruction.png")
    assert sheet.width > 3 * 160 and len(np.unique(np.array(sheet))) > 20


def test_reconstruction_with_a_refiner(tmp_path, small_data, sparse_vae_model, monkeypatch, few_samples):
    """The refiner decides the surface, which lies at twice the level; thresholds are those asked for."""
    SparseVAE(**sparse_vae_model).save_pretrained(tmp_path / "vae")
    sizes = {"block_out_channels": [2, 4], "layers_per_block": 1, "mid_layers": 0, "norm_num_groups": 2}
    features = sparse_vae_model["decoder_channels"] // 16
    SDFRefiner(**sizes, feature_channels=features, feature_mlp_dim=8, patch_size=16).save_pretrained(tmp_path / "r")
    arguments = ["reconstruction", "--model", str(tmp_path / "vae"), "--data", str(small_data), "--num_workers", "0"]
    arguments += ["--num_pictures", "0", "--level", "0.2", "--thresholds", "0.07", "0.3"]
    monkeypatch.setattr(command, "SparseVAE", PerfectVAE)
    refined = [*arguments, "--refiner", str(tmp_path / "r")]
    decoded = report(tmp_path / "a", *arguments)["summary"]
    assert {name for name in decoded if name.startswith("f1")} == {"f1_0.07", "f1_0.3"}
    assert report(tmp_path / "b", *refined)["summary"] != decoded
    monkeypatch.setattr(command, "SDFRefiner", Doubling)
    assert report(tmp_path / "c", *refined)["summary"] == decoded


@pytest.fixture
def reconstruction(tmp_path, small_data, sparse_vae_model, few_samples):
    """The command that measures reconstructions of both meshes into `tmp_path`, in this process."""
    SparseVAE(**sparse_vae_model).save_pretrained(tmp_path / "vae")
    arguments = ["reconstruction", "--model", tmp_path / "vae", "--data", small_data, "--output", tmp_path]
    return ["evaluate", *map(str, arguments), "--num_workers", "0", "--device", "cpu"]


def test_a_mesh_that_cannot_be_compared_costs_no_other(tmp_path, small_data, reconstruction, capsys):
    """Nor one whose file is damaged. It is named, counted, and the exit status says so."""
    for path in (*small_data.parent.glob("*.ply"), small_data.parent / "index.csv"):
        (tmp_path / "meshes").mkdir(exist_ok=True)
        (tmp_path / "meshes" / path.name).write_bytes(path.read_bytes())
    command = [*reconstruction, "--meshes", str(tmp_path / "meshes"), "--picture_size", "16"]
    assert cli.main(command) == 0
    whole = json.loads((tmp_path / "reconstruction.json").read_text())
    assert whole["errors"] == [] and whole["summary"]["count"] == 2 and "lack" not in capsys.readouterr().err
    (tmp_path / "meshes" / "capsule.ply").write_text("no mesh")
    assert cli.main([*command, "--name", "some"]) == 1
    some = json.loads((tmp_path / "some.json").read_text())
    assert some["samples"] == whole["samples"][1:] and some["samples"][0]["id"] == "torus"
    assert some["summary"]["count"] == 1 and some["summary"]["f1_0.05"]["mean"] == some["samples"][0]["f1_0.05"]
    ((error),) = some["errors"]
    assert (error["id"], error["part"]) == ("capsule", "figures") and "capsule.ply" in error["error"]
    lines = capsys.readouterr().err.splitlines()
    assert f"capsule: no figures: {error['error']}" in lines and "1 of 2 meshes lack something" in lines
    assert Image.open(tmp_path / "some.png").size == Image.open(tmp_path / "reconstruction.png").size


def test_figures_do_not_need_pictures(tmp_path, reconstruction, monkeypatch, capsys):
    """Where one cannot be rendered, all figures are there, and the picture of the other mesh."""
    assert cli.main([*reconstruction, "--num_pictures", "0"]) == 0
    expected = json.loads((tmp_path / "reconstruction.json").read_text())
    assert not (tmp_path / "reconstruction.png").exists()
    calls, render = [], comparison.render_mesh_views

    def render_some(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("too large a picture")
        return render(*args)

    monkeypatch.setattr(comparison, "render_mesh_views", render_some)
    assert cli.main([*reconstruction, "--picture_size", "16", "--columns", "1"]) == 1
    found = json.loads((tmp_path / "reconstruction.json").read_text())
    assert found["samples"] == expected["samples"] and found["summary"] == expected["summary"]
    assert found["errors"] == [{"id": "capsule", "part": "pictures", "error": "MemoryError: too large a picture"}]
    assert "capsule: no pictures: MemoryError: too large a picture\n1 of 2 meshes lack" in capsys.readouterr().err
    sheet = np.array(Image.open(tmp_path / "reconstruction.png"))
    # Below the captions.
    capsule, torus = sheet[16:32], sheet[48:]
    assert capsule.min() == 255 and torus.min() < 200


def test_figures_without_the_package_that_renders(tmp_path, reconstruction, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "embreex", None)
    assert cli.main(reconstruction) == 1
    assert "`--num_pictures` above 0 needs embreex" in capsys.readouterr().err
    assert cli.main([*reconstruction, "--num_pictures", "0"]) == 0
    assert json.loads((tmp_path / "reconstruction.json").read_text())["summary"]["count"] == 2


def test_figures_are_written_before_the_sheet(tmp_path, reconstruction):
    (tmp_path / "reconstruction.png").mkdir()
    assert cli.main([*reconstruction, "--picture_size", "16"]) == 1
    assert json.loads((tmp_path / "reconstruction.json").read_text())["summary"]["count"] == 2


@pytest.mark.parametrize(
    "options",
    [["generation", "--refiner", "x"], ["reconstruction", "--thresholds", "0.05", "0.01"]],
)
def test_options_that_do_not_fit_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*options, "--model", "x", "--data", "x", "--output", "x"])
    assert options[1] in capsys.readouterr().err


class OraclePipeline:
    """Generates for each image the latents of its mesh, found by the image, and decodes them to its very SDF."""

    resolution = 32
    calls: ClassVar[list] = []
    config = SimpleNamespace(default_level=0.0, default_max_opening=0.0, default_remove_floaters=False)

    def __init__(self, data):
        self.data = data
        self.sparse_stages = [self]

    def to(self, device):
        return self

    def set_progress_bar_config(self, disable):
        pass

    def __call__(self, images, generator, **options):
        self.calls.append(([each.initial_seed() for each in generator], options))
        shown = [self.data.picture(index, 0).tobytes() for index in range(len(self.data))]
        rows = []
        for place, image in enumerate(images):
            index = shown.index(image.tobytes())
            rows.append(torch.tensor([[place, index, 0, 0]]))
        coords = torch.cat(rows).int()
        return SimpleNamespace(coords=coords, latents=coords[:, 1:2].float())

    def decode_latents(self, latents, coords, index):
        band, feats, _ = self.data.blocks(int(latents[0, 0]), 32).band()
        return SimpleNamespace(feats=feats, coords=torch.nn.functional.pad(band, (1, 0)))

    def iso_level(self, level):
        return level


@pytest.fixture
def few_samples(monkeypatch):
    """Far fewer samples on surfaces: enough to tell shapes apart, and fast."""
    monkeypatch.setattr(metrics, "ALIGNMENT_SAMPLES", 500)
    monkeypatch.setattr(
        comparison, "compare_surfaces", functools.partial(comparison.compare_surfaces, num_samples=2000)
    )


def test_generation_of_an_oracle(tmp_path, small_data, monkeypatch, few_samples):
    """Perfect meshes have perfect metrics, through latents, files and alignment; random training shapes do not."""
    pipeline = OraclePipeline(SparseSDFDataset(small_data, "val", 32))
    pipeline.calls.clear()
    monkeypatch.setattr(Direct3DS2Pipeline, "from_pretrained", lambda path, **options: pipeline)
    arguments = [
        "generation",
        "--model",
        "none",
        "--data",
        str(small_data),
        "--num_workers",
        "0",
        "--picture_size",
        "32",
    ]
    steps = ["--dense_steps", "3", "--steps", "2", "--guidance_scale", "1.5", "--seed", "5"]
    result = report(tmp_path, *arguments, *steps, "--num_baseline", "1", "--num_pictures", "1")
    assert [sample["id"] for sample in result["samples"]] == ["capsule", "torus"]
    assert [sample["f1_0.01"] for sample in result["samples"]] == [1, 1]
    assert [sample["yaw"] % 180 for sample in result["samples"]] == [0, 0]
    assert result["summary"]["count"] == result["baseline"]["count"] == 2
    assert 0 < result["baseline"]["f1_0.05"]["mean"] < 0.9
    assert result["baseline"]["f1_0.05"]["mean"] == pytest.approx(
        np.mean([sample["baseline"]["f1_0.05"] for sample in result["samples"]])
    )
    assert Image.open(tmp_path / "generation.png").width >= 4 * 32
    # The seed of a sample follows from its place in the split.
    assert [seeds for seeds, _ in pipeline.calls] == [[5, 6]]
    options = pipeline.calls[0][1]
    assert (options["dense_num_inference_steps"], options["num_inference_steps"]) == (3, 2)
    assert (options["dense_guidance_scale"], options["guidance_scale"]) == (None, 1.5)

    # In two steps: the latents first.
    main(["sample", *arguments[1:], *steps, "--output", str(tmp_path / "two"), "--device", "cpu"])
    pipeline.calls.clear()
    samples = tmp_path / "two" / "samples.safetensors"
    again = report(
        tmp_path / "two", *arguments, "--samples", str(samples), "--num_baseline", "0", "--num_pictures", "0"
    )
    assert again["summary"]["f1_0.01"]["mean"] == 1 and not pipeline.calls
    assert again["command"]["samples"] == str(samples)


@pytest.mark.parametrize("fails", [0, 1])
def test_a_mesh_that_cannot_be_decoded_costs_no_other(tmp_path, small_data, monkeypatch, few_samples, fails):
    """An error at the first mesh may be of the settings, and is raised; one in the middle leaves those after it."""
    pipeline = OraclePipeline(SparseSDFDataset(small_data, "train", 32))
    monkeypatch.setattr(Direct3DS2Pipeline, "from_pretrained", lambda path, **options: pipeline)
    decoded = []

    def decode_some(latents, coords, index):
        decoded.append(latents)
        if len(decoded) == fails + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return OraclePipeline.decode_latents(pipeline, latents, coords, index)

    monkeypatch.setattr(pipeline, "decode_latents", decode_some, raising=False)
    options = ["--num_workers", "0", "--num_baseline", "1", "--picture_size", "16", "--device", "cpu"]
    options += ["--split", "train"]
    command = ["generation", "--model", "none", "--data", str(small_data), "--output", str(tmp_path), *options]
    if fails == 0:
        with pytest.raises(torch.OutOfMemoryError):
            main(command)
        assert len(decoded) == 1 and not (tmp_path / "generation.json").exists()
        return
    assert main(command) == 1
    found = json.loads((tmp_path / "generation.json").read_text())
    names = list(pipeline.data.ids)
    assert [row["id"] for row in found["samples"]] == [names[0], *names[2:]] and len(names) == 4
    assert all(row["f1_0.02"] == 1 and "baseline" in row for row in found["samples"])
    assert found["summary"]["count"] == found["baseline"]["count"] == 3
    reason = "OutOfMemoryError: CUDA out of memory"
    assert found["errors"] == [{"id": names[1], "part": "figures", "error": reason}]


def test_a_picture_that_cannot_be_sampled_costs_no_other(tmp_path, small_data, monkeypatch, few_samples, capsys):
    """Nor one of its batch; the file of `sample` tells it from an empty mesh."""
    pipeline = OraclePipeline(SparseSDFDataset(small_data, "train", 32))
    monkeypatch.setattr(Direct3DS2Pipeline, "from_pretrained", lambda path, **options: pipeline)
    names, bad = list(pipeline.data.ids), pipeline.data.picture(2, 0).tobytes()
    call = OraclePipeline.__call__

    def call_some(self, images, generator, **options):
        if any(image.tobytes() == bad for image in images):
            raise RuntimeError("too large a picture")
        return call(self, images, generator, **options)

    monkeypatch.setattr(OraclePipeline, "__call__", call_some)
    pipeline.calls.clear()
    shared = ["--model", "none", "--data", str(small_data), "--split", "train", "--output", str(tmp_path)]
    shared += ["--device", "cpu", "--batch_size", "2"]
    assert cli.main(["evaluate", "sample", *shared]) == 1
    # The same noise alone as in a batch.
    assert [seeds for seeds, _ in pipeline.calls] == [[0, 1], [3]]
    reason = "RuntimeError: too large a picture"
    assert f"{names[2]}: no latents: {reason}\n1 of 4 meshes lack something" in capsys.readouterr().err
    options = ["--num_workers", "0", "--num_baseline", "0", "--num_pictures", "0"]
    for samples in (["--samples", str(tmp_path / "samples.safetensors")], []):
        assert main(["generation", *shared, *options, *samples]) == 1
        found = json.loads((tmp_path / "generation.json").read_text())
        assert [(row["id"], row["f1_0.01"]) for row in found["samples"]] == [(names[k], 1) for k in (0, 1, 3)]
        assert found["errors"] == [{"id": names[2], "part": "figures", "error": reason}]


def test_a_mesh_that_cannot_be_reconstructed_costs_no_other(tmp_path, reconstruction, monkeypatch):
    command = [*reconstruction, "--split", "train", "--batch_size", "2", "--num_pictures", "0"]
    assert cli.main(command) == 0
    whole = json.loads((tmp_path / "reconstruction.json").read_text())["samples"]
    calls, encode = [], SparseVAE.encode

    def encode_some(self, feats, coords):
        calls.append(int(coords[:, 0].max()) + 1)
        # The second batch, then the first mesh of it.
        if len(calls) in (2, 3):
            raise MemoryError("too large a mesh")
        return encode(self, feats, coords)

    monkeypatch.setattr(SparseVAE, "encode", encode_some)
    assert cli.main(command) == 1
    found = json.loads((tmp_path / "reconstruction.json").read_text())
    assert calls == [2, 2, 1, 1] and [row["id"] for row in found["samples"]] == [whole[k]["id"] for k in (0, 1, 3)]
    assert found["samples"][2]["f1_0.05"] == pytest.approx(whole[3]["f1_0.05"], abs=0.01)
    reason = "MemoryError: too large a mesh"
    assert found["errors"] == [{"id": whole[2]["id"], "part": "figures", "error": reason}]


def test_a_baseline_that_cannot_be_compared_is_left_out(tmp_path, small_data, monkeypatch, few_samples, capsys):
    pipeline = OraclePipeline(SparseSDFDataset(small_data, "val", 32))
    monkeypatch.setattr(Direct3DS2Pipeline, "from_pretrained", lambda path, **options: pipeline)
    # The sphere has no surface to be aligned; it is all that is drawn for the capsule, and one of two for the torus.
    drawn = functools.partial(trimesh.Trimesh, vertices=np.zeros((3, 3)), faces=[[0, 1, 2]], process=False)

    def shape(root, split, name, resolution):
        return dataset_mesh(root, split, name, resolution) if split == "val" or name == "box" else drawn()

    monkeypatch.setattr(command, "dataset_mesh", shape)
    names = SparseSDFDataset(small_data, "train", 32).ids
    box, sphere = list(names).index("box"), list(names).index("sphere")
    places = {"capsule": [sphere], "torus": [box, sphere]}
    monkeypatch.setattr(command, "draw_baseline", lambda rows, row, number, seed: places[row["id"]])
    options = ["--num_workers", "0", "--num_baseline", "1", "--num_pictures", "0", "--device", "cpu"]
    assert main(["generation", "--model", "none", "--data", str(small_data), "--output", str(tmp_path), *options]) == 1
    found = json.loads((tmp_path / "generation.json").read_text())
    assert [("baseline" in sample) for sample in found["samples"]] == [False, True]
    assert (found["summary"]["count"], found["baseline"]["count"]) == (2, 1)
    assert [(error["id"], error["part"]) for error in found["errors"]] == [
        ("capsule", "baseline"),
        ("torus", "baseline"),
    ]
    err = capsys.readouterr().err
    assert "torus: a shape of its baseline is left out: " in err and "no baseline" not in err


def test_baselines_without_training_shapes_are_refused_before_a_mesh_is_generated(tmp_path, capsys, monkeypatch):
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    trimesh.creation.box().export(meshes / "box.ply")
    (meshes / "index.csv").write_text("id,mesh,split,license\nbox,box.ply,val,CC0-1.0\n")
    options = ["--resolutions", "32", "--num_views", "1", "--image_size", "32", "--num_workers", "0"]
    assert cli.main(["prepare", "--input", str(meshes), "--output", str(tmp_path / "data"), *options]) == 0
    pipeline = OraclePipeline(SparseSDFDataset(tmp_path / "data", "val", 32))
    pipeline.calls.clear()
    monkeypatch.setattr(Direct3DS2Pipeline, "from_pretrained", lambda path, **options: pipeline)
    command = ["generation", "--model", "none", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert cli.main(["evaluate", *command, "--device", "cpu"]) == 1
    assert "`num_baseline` must be 0 without training shapes, got 3" in capsys.readouterr().err
    assert not pipeline.calls
    # What else is wrong with a dataset is said as it is.
    options = parse_arguments(["generation", "--model", "none", "--data", str(meshes), "--output", "out"])
    with pytest.raises(ValueError, match="`root` must be a dataset"):
        read_train_rows(options)


def pipeline_at_32(dense_vae_model: dict, sparse_vae_model: dict) -> Direct3DS2Pipeline:
    """A tiny pipeline with random weights, of the resolution of the data."""
    torch.manual_seed(0)
    transformer = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    encoder = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14, num_register_tokens=2
    )
    return Direct3DS2Pipeline(
        image_encoder=Dinov2WithRegistersModel(encoder),
        dense_vae=DenseVAE(**dense_vae_model),
        dense_transformer=DenseDiT(**transformer, sample_size=2, in_channels=2),
        dense_scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=SparseVAE(**sparse_vae_model),
        transformer=SparseDiT(
            **transformer, sample_size=4, in_channels=4, num_key_value_heads=1, norm_num_groups=4, window_size=2
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        default_level=0.1,
        default_max_opening=0.25,
        default_remove_floaters=True,
    )


def test_samples_of_a_pipeline(tmp_path, small_data, dense_vae_model, sparse_vae_model):
    """The meshes that `sample` and `decode` make are those of a call of the pipeline with the same seeds."""
    pipeline = pipeline_at_32(dense_vae_model, sparse_vae_model)
    pipeline.save_pretrained(tmp_path / "pipeline")
    steps = ["--dense_steps", "2", "--steps", "2", "--seed", "3"]
    arguments = ["sample", "--model", str(tmp_path / "pipeline"), "--data", str(small_data), *steps]
    args = parse_arguments([*arguments, "--output", str(tmp_path), "--device", "cpu"])
    command.evaluate(args)
    decoded = [
        make() for make in decode(args, pipeline, read_samples(tmp_path / "samples.safetensors", ["capsule", "torus"]))
    ]
    data = SparseSDFDataset(small_data, "val", 32)
    for index, mesh in enumerate(decoded):
        expected = pipeline(
            data.picture(index, 0),
            dense_num_inference_steps=2,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(3 + index),
        ).meshes[0]
        # Latents are kept in half precision.
        assert len(mesh.faces) == pytest.approx(len(expected.faces), rel=0.02)
        np.testing.assert_allclose(mesh.bounds, expected.bounds, atol=0.01)


def test_comparisons_in_processes_are_those_in_this_one():
    def box(*extents):
        return functools.partial(trimesh.creation.box, extents)

    common = {"reference": box(1, 2, 3), "align": False, "outer_resolution": None, "picture_size": None}
    tasks = [(number, {**common, "prediction": box(1, 2, number)}) for number in (2, 3)]
    results = dict(run_parallel(tasks, num_workers=1))
    assert results == dict(run_parallel(tasks, num_workers=0))
    assert results[3]["f1_0.05"] == 1 > results[2]["f1_0.05"]


@pytest.fixture
def processes(monkeypatch):
    """Real processes, of a server that has imported what they need; the pools that are made of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([comparison.__name__])
    pools = []
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: pools.append(method) or context)
    return pools


def tasks_that_end_their_process(*numbers):
    """Six comparisons, of which some end their process."""
    box, end = functools.partial(trimesh.creation.box, (1, 2, 3)), functools.partial(os._exit, 1)
    common = {"reference": box, "align": False, "outer_resolution": None, "picture_size": None}
    return [(number, {**common, "prediction": end if number in numbers else box}) for number in range(6)]


# The first one, too: the process had started.
@pytest.mark.parametrize("deadly", [{1}, {0, 2}])
def test_a_process_that_dies_costs_its_own_comparison_alone(processes, deadly):
    """Those that it takes along are made again, and the ones after it are made."""
    results = dict(run_parallel(iter(tasks_that_end_their_process(*deadly)), num_workers=1))
    assert sorted(results) == list(range(6))
    for number, result in results.items():
        if number in deadly:
            assert "its process died, as one does that needs too much memory or crashes" in result["error"]
        else:
            assert result["f1_0.05"] == 1
    # A pool for all, one after each death, and one for what was not taken yet: a start takes longer than a comparison.
    assert len(processes) <= 2 + 2 * len(deadly)


def test_processes_that_cannot_start_are_no_meshes_that_take_too_much_memory(processes, monkeypatch):
    monkeypatch.setattr(comparison, "start_worker", functools.partial(os._exit, 1))
    with pytest.raises(BrokenProcessPool, match=r"cannot start.* `if __name__ == .*too much memory"):
        list(run_parallel(tasks_that_end_their_process(), num_workers=2))
    assert len(processes) == 1


def test_processes_that_die_one_after_the_other_end_the_evaluation(processes):
    with pytest.raises(BrokenProcessPool, match=r"cannot start.* `if __name__ == .*too much memory"):
        list(run_parallel(tasks_that_end_their_process(*range(6)), num_workers=1))
    # All of them, and two of one.
    assert len(processes) == 3


def test_bodies_are_counted():
    def boxes(count):
        parts = [trimesh.creation.box((1, 1, 1), trimesh.transformations.translation_matrix((2 * k, 0, 0)))
                 for k in range(count)]  # fmt: skip
        return trimesh.util.concatenate(parts)

    shapes = functools.partial(boxes, 3), functools.partial(boxes, 2)
    result = compare(*shapes, align=False, outer_resolution=None, picture_size=None)
    assert (result["bodies"], result["reference_bodies"]) == (3, 2)


@pytest.mark.parametrize("empty", [[0], [0, 1]])
def test_samples_of_which_nothing_is_left(empty, dense_vae_model, sparse_vae_model, monkeypatch):
    pipeline = pipeline_at_32(dense_vae_model, sparse_vae_model)
    pipeline.set_progress_bar_config(disable=True)
    decoded = pipeline.dense_vae.decode

    def decode_some(latents, **options):
        logits = decoded(latents, **options)[0].abs() + 1
        logits[empty] = -20
        return (logits,)

    monkeypatch.setattr(pipeline.dense_vae, "decode", decode_some)
    options = {"dense_steps": 1, "steps": 1, "dense_guidance_scale": 1.0, "guidance_scale": 1.0}
    args = SimpleNamespace(**options, device="cpu", seed=0, batch_size=2)
    picture = Image.new("RGB", (56, 56), "white")
    picture.paste("red", (14, 14, 42, 42))
    pictures = [picture] * 2
    found = list(sample(args, pipeline, pictures))
    assert [index for index, each in enumerate(found) if each is None] == empty
    assert all(len(each[0]) == len(each[1]) > 0 for each in found if each is not None)
    # What is wrong with a call is no empty mesh.
    args.guidance_scale = float("nan")
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number"):
        list(sample(args, pipeline, pictures))


def test_samples_survive_the_file(tmp_path):
    samples = [(torch.randn(3, 2).half(), torch.arange(9).view(3, 3).short()), None]
    save_samples(tmp_path / "samples.safetensors", ["a", "b"], samples)
    first, second = read_samples(tmp_path / "samples.safetensors", ["a", "b"])
    assert second is None and all(torch.equal(*pair) for pair in zip(first, samples[0]))


def test_samples_of_another_choice_are_refused(tmp_path):
    """A mesh that was not sampled is not counted as an empty one."""
    save_samples(tmp_path / "samples.safetensors", ["a"], [None])
    with pytest.raises(ValueError, match=r"`samples` must hold all 2 meshes .* lacks 1 of them, such as 'b'"):
        read_samples(tmp_path / "samples.safetensors", ["a", "b"])


def test_a_shape_compared_with_itself(small_data, few_samples):
    shape = functools.partial(dataset_mesh, str(small_data), "val", "torus", 32)
    result = compare(shape, shape, align=True, outer_resolution=None, picture_size=None)
    assert result["f1_0.01"] == 1 and result["yaw"] % 180 == 0 and result["watertight"]
    other = functools.partial(dataset_mesh, str(small_data), "val", "capsule", 32)
    assert compare(other, shape, align=True, outer_resolution=None, picture_size=None)["f1_0.05"] < 0.9


def test_references_follow_the_rows(small_data):
    data = SparseSDFDataset(small_data, "val", 32)
    data = data.select([1])
    arguments = ["reconstruction", "--model", "", "--data", str(small_data), "--output", ""]
    (reference,) = command.make_references(parse_arguments(arguments), data, 32)
    torus, capsule = (dataset_mesh(str(small_data), "val", name, 32) for name in ("torus", "capsule"))
    assert np.array_equal(reference().vertices, torus.vertices)
    assert not np.array_equal(torus.vertices, capsule.vertices)


def test_no_surface_counts_as_zero(small_data):
    shape = functools.partial(dataset_mesh, str(small_data), "val", "torus", 32)
    result = compare(trimesh.Trimesh, shape, align=True, outer_resolution=None, picture_size=64)
    assert result["f1_0.05"] == 0 and result["empty"] is True and result["watertight"] is False
    full = compare(shape, shape, align=False, outer_resolution=None, picture_size=None)
    assert full["empty"] is False and full["watertight"] is True
    summary = comparison.summarize([result, result, full, result])
    assert summary["empty"]["mean"] == 0.75 and summary["watertight"]["mean"] == summary["f1_0.05"]["mean"] == 0.25
    # The distance is that of one mesh, and says so.
    assert summary["chamfer_l1"]["count"] == 1 and summary["count"] == 4 and "count" not in summary["empty"]


def test_baseline_is_drawn_from_the_same_category():
    rows = [{"id": str(i), "source": "a" if i < 6 else "b", "category": str(i % 3)} for i in range(9)]
    drawn = draw_baseline(rows, {"id": "x", "source": "a", "category": "1"}, 5, seed=0)
    assert sorted(drawn) == [1, 4]
    assert drawn == draw_baseline(rows, {"id": "x", "source": "a", "category": "1"}, 5, seed=0)
    alone = draw_baseline(rows, {"id": "x", "source": "b", "category": "9"}, 2, seed=0)
    assert len(alone) == 2 and all(index >= 6 for index in alone)

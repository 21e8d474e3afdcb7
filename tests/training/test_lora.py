"""Fine-tuning of a tiny pipeline on a folder of meshes, from the command line to what the pipeline loads."""

import copy
import shutil
import sys
from types import ModuleType, SimpleNamespace

import accelerate.tracking
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import trimesh
from accelerate.utils import LoggerType
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_sparse3d import Direct3DS2Pipeline
from diffusers_sparse3d.loaders.lora import LORA_COMPONENTS
from diffusers_sparse3d.training import lora, lora_card, lora_data, lora_trainer
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.lora_options import parse_arguments
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.preparation.index import MeshEntry
from diffusers_sparse3d.training.preparation.report import read_rows
from tests.pipelines.test_lora import close, predictions
from tests.pipelines.tiny import tiny_image, tiny_pipeline, tiny_second_stage


peft = pytest.importorskip("peft")
FILE = "pytorch_lora_weights.safetensors"
STEPS = 12
REQUIRED = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x", "--output_dir", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with both sparse stages, meshes in a folder without a split, and a picture of one of them."""
    root = tmp_path_factory.mktemp("lora")
    tiny_pipeline(**tiny_second_stage()).save_pretrained(root / "pipeline")
    (root / "meshes" / "boxes").mkdir(parents=True)
    trimesh.creation.box((1, 2, 1)).export(root / "meshes" / "boxes" / "tall.ply")
    trimesh.creation.box((2, 1, 1)).export(root / "meshes" / "boxes" / "long.ply")
    trimesh.creation.icosphere(subdivisions=2).export(root / "meshes" / "ball.ply")
    (root / "meshes" / "torn.ply").write_text("no mesh")
    (root / "pictures" / "boxes").mkdir(parents=True)
    photo = Image.new("RGB", (60, 80), "white")
    photo.paste("blue", (20, 10, 40, 70))
    photo.save(root / "pictures" / "boxes" / "tall.jpg", quality=95)
    tiny_image().save(root / "photo.png")
    return root


def arguments(folder, output, *options):
    return [
        "--pretrained_model_name_or_path", str(folder / "pipeline"), "--instance_data_dir", str(folder / "meshes"),
        "--output_dir", str(output), "--num_views", "1", "--preparation_workers", "0", "--dataloader_num_workers", "0",
        "--rank", "2", "--max_train_steps", str(STEPS), "--train_batch_size", "3", "--learning_rate", "3e-2", "--cpu",
        "--logging_steps", "1", "--num_pictures", "1", "--ema_decay", "0.5", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder):
    """LoRA of all three transformers, with one mesh held back."""
    output = folder / "all"
    lora.main(
        arguments(
            folder, output, "--components", *LORA_COMPONENTS, "--instance_images_dir", str(folder / "pictures"),
            "--num_validation_meshes", "1", "--lora_alpha", "3", "--checkpointing_steps", "8",
        )
    )  # fmt: skip
    return output


@pytest.fixture
def data(trained):
    """The meshes as the fixture `trained` prepared them."""
    return ["--instance_data_dir", str(trained / "data")]


def losses(folder):
    return [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]


def test_the_pipeline_takes_the_weights(folder, trained):
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    before = predictions(pipe)
    pipe.load_lora_weights(trained)
    assert pipe.get_list_adapters() == {name: ["default_0"] for name in LORA_COMPONENTS}
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 3
    after = predictions(pipe)
    assert not any(close(before, {**before, name: after[name]}) for name in LORA_COMPONENTS)
    for name in LORA_COMPONENTS:
        curve = losses(trained / name)
        assert len(curve) == STEPS and np.mean(curve[-4:]) < 0.97 * np.mean(curve[:4])
        assert "validation/loss" in read_metrics(trained / name)[-1]
        assert (trained / name / "pictures" / f"{STEPS:07d}.png").is_file()
    card = (trained / "README.md").read_text()
    assert "base_model" not in card and 'load_lora_weights("all")' in card and "| rank, alpha | 2, 3 |" in card


def test_adapters_alone_are_trained_averaged_and_kept(trained):
    weights = load_file(trained / FILE)
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    for name in LORA_COMPONENTS:
        checkpoint = trained / name / f"checkpoint-{STEPS}"
        own = {key.partition(".")[2]: tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
        expected = {f"transformer.{key.replace('.weight', '.default.weight')}" for key in own}
        current, average = (load_file(checkpoint / file) for file in ("model.safetensors", "average-0.5.safetensors"))
        assert current.keys() == expected and average.keys() == expected
        for key, tensor in own.items():
            other = f"transformer.{key.replace('.weight', '.default.weight')}"
            assert torch.equal(tensor, average[other]) and not torch.equal(tensor, current[other])


def test_data_of_a_folder_without_a_split(trained):
    rows = {row["id"]: row for row in parquet.read_table(trained / "data" / "index.parquet").to_pylist()}
    assert sorted(row["split"] for row in rows.values()) == ["train", "train", "val"]
    assert {name: (row["num_images"], row["num_given"]) for name, row in rows.items()} == {
        "ball": (1, 0), "boxes-long": (1, 0), "boxes-tall": (2, 1),
    }  # fmt: skip
    assert [row["id"] for row in read_rows(trained / "data" / "failures.csv")] == ["torn"]
    data = SparseSDFDataset(trained / "data")
    index = data.find("boxes-tall")
    photo = np.array(data.picture(index, -1 % 2).resize((60, 60)))
    inside = photo[..., 3] > 250
    # The picture had no alpha: its plain background is none of the object.
    assert 0.2 < inside.mean() < 0.5 and photo[inside][:, 2].mean() > 240 and photo[inside][:, 0].mean() < 20


def test_resumed_fine_tuning_is_the_same(folder, trained, tmp_path):
    output = tmp_path / "all"
    shutil.copytree(trained, output)
    shutil.rmtree(output / "dense_transformer" / f"checkpoint-{STEPS}")
    (output / FILE).unlink()
    options = ["--lora_alpha", "3", "--checkpointing_steps", "8", "--components", *LORA_COMPONENTS]
    options += ["--num_validation_meshes", "1", "--instance_images_dir", str(folder / "pictures")]
    checkpoint = output / "dense_transformer" / "checkpoint-8"
    lora.main(arguments(folder, output, *options, "--resume_from_checkpoint", str(checkpoint)))
    for name in LORA_COMPONENTS:
        assert losses(output / name) == losses(trained / name)
    expected = load_file(trained / FILE)
    for name, tensor in load_file(output / FILE).items():
        assert torch.equal(tensor, expected[name])


def test_dora(folder, tmp_path, data):
    options = ["--components", "dense_transformer", "--use_dora", "--max_train_steps", "2", "--ema_decay", "0"]
    lora.main(arguments(folder, tmp_path / "out", *data, *options, "--lora_layers", "to_q", "ff.net.2"))
    weights = load_file(tmp_path / "out" / FILE)
    assert {name.split(".", 4)[-1].partition(".lora")[0] for name in weights} == {"to_q", "net.2"}
    assert any(name.endswith("lora_magnitude_vector") for name in weights)
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    before = predictions(pipe)
    pipe.load_lora_weights(tmp_path / "out")
    assert pipe.dense_transformer.peft_config["default_0"].use_dora
    assert not close(predictions(pipe), before)


def test_trackers_are_asked_for_before_the_download(folder, tmp_path, data, monkeypatch):
    monkeypatch.setattr(lora, "find_pipeline", None)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ImportError, match=r"`report_to`.*pip install wandb"):
        lora.main(arguments(folder, tmp_path / "out", *data, "--report_to", "wandb"))


def test_data_that_are_prepared_need_no_packages(folder, trained, tmp_path, data, monkeypatch):
    """Neither a dataset nor what was prepared before of the meshes."""
    for name in ("embreex", "igl"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "data").mkdir()
    shutil.copy(trained / "data" / "index.parquet", tmp_path / "data")
    lora.check_support(parse_arguments(arguments(folder, tmp_path)))
    lora.check_support(parse_arguments(arguments(folder, tmp_path / "new", *data)))
    with pytest.raises(ImportError, match=r"^preparing the meshes needs embreex and igl"):
        lora.check_support(parse_arguments(arguments(folder, tmp_path / "new")))
    # Which says nothing of options of `prepare`, where it finds a mesh that is left: one failed.
    options = arguments(folder, trained, "--num_validation_meshes", "1", "--components", *LORA_COMPONENTS)
    options += ["--instance_images_dir", str(folder / "pictures")]
    with pytest.raises(ImportError, match=r"^rendering the meshes needs embreex: `pip install '[^']*'`$"):
        lora.prepare_data(parse_arguments(options), folder / "pipeline")


@pytest.mark.skipif(not hasattr(LoggerType, "TRACKIO"), reason="needs an accelerate that knows trackio")
def test_all_weights_with_validation_images_and_trackers(folder, tmp_path, data, monkeypatch):
    """Of everything that is logged, a stand-in for trackio, which is not installed, gets what it would get."""
    logged, pictures = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    trackio = ModuleType("trackio")
    trackio.init = lambda project: pictures.append(project) or run
    trackio.config, trackio.Image = {}, lambda picture: picture
    trackio.config = SimpleNamespace(update=lambda values, allow_val_change: logged.append(values))
    options = ["--components", "dense_transformer", "--full", "--max_train_steps", "2", "--validation_image"]
    options = arguments(folder, tmp_path / "out", *data, *options, str(folder / "photo.png"), "--report_to", "trackio")
    with pytest.raises(ImportError, match=r"`report_to`.*pip install trackio"):
        lora.main(options)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TRACKIO])
    lora.main(options)

    pipe, base = (
        DiffusionPipeline.from_pretrained(path) for path in (tmp_path / "out" / "pipeline", folder / "pipeline")
    )
    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            same = [torch.equal(a, b) for a, b in zip(model.parameters(), base.components[name].parameters())]
            assert not any(same) if name == "dense_transformer" else all(same)
    # Of the place, not of the folder beside it that was filled.
    assert "\n# pipeline\n" in (tmp_path / "out" / "pipeline" / "README.md").read_text()

    output = tmp_path / "out" / "dense_transformer"
    mesh = trimesh.load_mesh(output / "meshes" / "0000002" / "photo.glb")
    # The pipeline with the averaged weights, from the seed of the training, makes the same of the picture.
    expected = pipe(str(folder / "photo.png"), generator=torch.Generator().manual_seed(0)).meshes[0]
    np.testing.assert_allclose(mesh.bounds, expected.bounds, atol=1e-3)
    picture = Image.open(output / "pictures" / "validation-0000002.png")
    settings, *entries, end = logged
    assert pictures == ["direct3d-s2-lora"] and settings["learning_rate"] == 3e-2 and end == "end"
    assert [step for step, values in entries if "train/loss" in values] == [1, 2]
    assert any("validation/loss" in values for _, values in entries)
    (shown,) = [values["validation images"] for _, values in entries if "validation images" in values]
    assert np.array_equal(np.array(shown), np.array(picture)) and len(np.unique(np.array(picture))) > 10


@pytest.mark.parametrize("failing", ["picture", "mesh", "pipeline"])
def test_validation_images_that_fail_do_not_end_the_training(folder, tmp_path, data, monkeypatch, caplog, failing):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (tmp_path / "torn.png").write_text("no picture")
    picture = tmp_path / "torn.png" if failing == "picture" else folder / "photo.png"
    options = ["--components", "dense_transformer", "--max_train_steps", "1", "--validation_image", str(picture)]
    if failing == "mesh":
        monkeypatch.setattr(Direct3DS2Pipeline, "__call__", fail)
    if failing == "pipeline":
        monkeypatch.setattr(lora_trainer, "DiffusionPipeline", SimpleNamespace(from_pretrained=fail))
    lora.main(arguments(folder, tmp_path / "out", *data, *options))
    assert (tmp_path / "out" / FILE).is_file()
    one, all_of_them = f"No mesh of the validation image {picture}: ", "No meshes of the validation images: CUDA out"
    assert (all_of_them if failing == "pipeline" else one) in caplog.text


def test_upload(tmp_path, monkeypatch):
    options = ["--pretrained_model_name_or_path", "someone/base", "--instance_data_dir", "x", "--use_dora"]
    args = parse_arguments([*options, "--output_dir", str(tmp_path / "style"), "--hub_private_repo", "--push_to_hub"])
    for name in (FILE, "transformer/pictures/1.png", "transformer/checkpoint-1/model.safetensors", "data/index.csv"):
        (tmp_path / "style" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "style" / name).write_text("x")
    lora_card.write_card(args)
    assert "base_model: someone/base\n" in (tmp_path / "style" / "README.md").read_text()
    calls = {}
    repository = SimpleNamespace(repo_id="me/style")
    monkeypatch.setattr(
        lora_card, "create_repo", lambda name, **options: calls.update(options, name=name) or repository
    )
    monkeypatch.setattr(lora_card, "upload_folder", lambda **options: calls.update(options))
    lora_card.push_to_hub(args)
    assert calls["name"] == "style" and calls["repo_id"] == "me/style" and calls["private"] and calls["exist_ok"]
    from huggingface_hub.utils import filter_repo_objects

    files = [
        path.relative_to(tmp_path / "style").as_posix() for path in (tmp_path / "style").rglob("*") if path.is_file()
    ]
    sent = filter_repo_objects(files, allow_patterns=calls["allow_patterns"], ignore_patterns=calls["ignore_patterns"])
    assert sorted(sent) == ["README.md", FILE, "transformer/pictures/1.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pretrained_model_name_or_path", "MESHES"], "`pretrained_model_name_or_path`.*model_index.json"),
        (["--lora_layers", "to_nothing"], "`lora_layers`"),
        (["--instance_data_dir", "EMPTY"], "holds no mesh"),
        (["--instance_data_dir", "TORN"], "`instance_data_dir`.*torn"),
        (["--instance_images_dir", "EMPTY"], "`instance_images_dir`"),
        (["--num_validation_meshes", "4"], "`num_validation_meshes`"),
        (["--instance_data_dir", "DATA", "--components", "transformer_1024"], "resolution"),
    ],
)
def test_bad_arguments_are_named(folder, tmp_path, small_data, options, message):
    (tmp_path / "torn").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn" / "torn.ply").write_text("no mesh")
    places = {"MESHES": folder / "meshes", "EMPTY": tmp_path / "empty", "TORN": tmp_path / "torn", "DATA": small_data}
    options = [str(places.get(option, option)) for option in options]
    with pytest.raises(ValueError, match=message):
        lora.main(arguments(folder, tmp_path / "out", *options))


def test_component_that_the_pipeline_lacks(folder, tmp_path):
    shutil.copytree(folder / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("vae_1024"))
    with pytest.raises(ValueError, match=r"`components`.*vae_1024"):
        lora.find_pipeline(str(tmp_path / "pipeline"), None, ["transformer", "transformer_1024"])


@pytest.mark.parametrize(
    "options",
    [["--rank", "0"], ["--full", "--use_dora"], ["--validation_image", "none.png"], ["--optimizer", "sgd"]],
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(
            ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x", "--output_dir", "x", *options]
        )
    assert options[-2 if options[-1] in ("0", "none.png", "sgd") else 0].removeprefix("--") in capsys.readouterr().err


def test_help_explains_every_option_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for group in ("model", "data", "adapter", "training", "optimizer", "checkpoints and logs", "validation", "hub"):
        assert f"\n{group}:\n" in text
    options = parse_arguments(
        ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "x", "--output_dir", "x"]
    )
    assert {"rank", "use_dora", "report_to", "push_to_hub", "resume_from_checkpoint"} <= set(vars(options))
    assert options.optimizer == "adamw"
    assert parse_arguments([*REQUIRED, "--use_8bit_adam"]).optimizer == "adamw_8bit"


def test_meshes_that_are_held_back():
    def entries(count, **options):
        return [MeshEntry(str(number), f"{number}.ply", **options) for number in range(count)]

    for count, wanted, expected in ((20, None, 2), (9, None, 0), (9, 3, 3), (1, None, 0)):
        meshes = entries(count)
        lora_data.hold_back(meshes, wanted)
        assert sum(entry.split == "val" for entry in meshes) == expected
        again = copy.deepcopy(entries(count))[::-1]
        lora_data.hold_back(again, wanted)
        assert {entry.id: entry.split for entry in again} == {entry.id: entry.split for entry in meshes}
    # A split that the index has stays.
    meshes = [*entries(20), MeshEntry("x", "x.ply", split="val")]
    lora_data.hold_back(meshes, None)
    assert [entry.id for entry in meshes if entry.split == "val"] == ["x"]

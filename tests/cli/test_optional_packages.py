"""Packages that are optional: a command asks for all that it will need before its work, and says what to install."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from diffusers_sparse3d import cli
from diffusers_sparse3d.checks import INSTALLED_BY, check_packages
from diffusers_sparse3d.cli import generate, latents
from tests.pipelines.tiny import LATENT_SIZE, tiny_image, tiny_pipeline


GENERATE = "generate {image} -o x.glb --model {model}"
PREPARE = "prepare --input {folder}/meshes --output out"
TRAIN = "train dit --config small/dit_dense --data none --output_dir out"
LORA = "train lora --pretrained_model_name_or_path none --instance_data_dir {folder}/meshes --output_dir out"
EVALUATE = "evaluate generation --model {folder}/none --data none --output out"
# Commands that would do all of their work, or that of one mesh after the other, before they need a module.
LATE = {
    "preview": (f"{GENERATE} --preview x.png", "embreex", "`--preview` needs embreex: `pip install"),
    "turntable": (f"{GENERATE} --turntable x.gif", "embreex", "`--turntable` needs embreex: `pip install"),
    "LoRA": (f"{GENERATE} --lora owner/name", "peft", "`--lora` needs peft: `pip install peft`"),
    "encode": ("encode {folder}/box.ply -o x.safetensors --model {model}", "igl", "`encode` needs igl"),
    "print": ("print {folder}/box.ply", "embreex", "`print` needs embreex"),
    "print to 3MF": ("print {folder}/box.ply -o x.3mf", "lxml", ".3mf files need lxml"),
    "app": ("app --model {model}", "gradio", "the app needs gradio"),
    "renders": (PREPARE, "embreex", "rendering the meshes needs embreex"),
    "distances": (f"{PREPARE} --renderer raster", "igl", "the distance to a mesh needs igl"),
    "Ray": (f"{PREPARE} --runner ray", "ray", "`--runner ray` needs ray"),
    "loss curve": (TRAIN, "matplotlib", "training needs matplotlib"),
    "logs": (TRAIN, "tensorboard", "training needs tensorboard"),
    "optimizer": (f"{TRAIN} --override optimizer=adamw_8bit", "bitsandbytes", "`optimizer` 'adamw_8bit' needs bits"),
    "adapters": (LORA, "peft", "LoRA needs peft"),
    "loss curve of LoRA": (LORA, "matplotlib", "training needs matplotlib"),
    "optimizer of LoRA": (f"{LORA} --use_8bit_adam", "bitsandbytes", "`optimizer` 'adamw_8bit' needs bitsandbytes"),
    "renders of LoRA": (LORA, "embreex", "preparing the meshes needs embreex"),
    "distances of LoRA": (f"{LORA} --num_views 0", "igl", "preparing the meshes needs igl"),
    "validation images": (f"{LORA} --validation_image {{image}}", "embreex", "`--validation_image` needs embreex"),
    "sheet": (
        EVALUATE,
        "embreex",
        "`--num_pictures` above 0 needs embreex: `pip install 'diffusers_sparse3d[render]'`",
    ),
    "figures": (EVALUATE, "igl", "the distance to a mesh needs igl"),
    "LoRA to measure": (f"{EVALUATE} --lora x", "peft", "`--lora` needs peft"),
    "LoRA to sample": (EVALUATE.replace("generation", "sample") + " --lora x", "peft", "`--lora` needs peft"),
}


@pytest.mark.parametrize(("command", "module", "expected"), LATE.values(), ids=LATE)
def test_a_missing_package_is_told_before_any_work(
    command, module, expected, model, image, tmp_path, capsys, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generate, "load_pipeline", load)
    monkeypatch.setattr(latents, "_load_vae", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meshes").mkdir()
    for path in ("box.ply", "meshes/box.ply"):
        trimesh.creation.box().export(tmp_path / path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(command.format(folder=tmp_path, image=image, model=model).split()) == 1
    captured = capsys.readouterr()
    assert expected in captured.err and "pip install" in captured.err and captured.out == ""
    assert captured.err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


def test_packages_are_asked_for_where_they_are_needed_alone(tmp_path, monkeypatch, capsys):
    """The rasteriser casts no rays."""
    (tmp_path / "meshes").mkdir()
    trimesh.creation.box().export(tmp_path / "meshes" / "box.ply")
    monkeypatch.setitem(sys.modules, "embreex", None)
    words = PREPARE.format(folder=tmp_path).replace(" out", f" {tmp_path / 'out'}").split()
    options = ["--renderer", "raster", "--num_views", "1", "--image_size", "32", "--resolutions", "16"]
    assert cli.main([*words, *options, "--num_workers", "0", "--val_fraction", "0"]) == 0
    assert "1 meshes are in" in capsys.readouterr().out


def test_what_the_messages_name_brings_the_modules():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    distributions = packages_distributions()
    for module, words in INSTALLED_BY.items():
        name, _, extra = words.strip("']").partition("[")
        assert name == project["name"]
        if module in distributions:
            (distribution,) = set(distributions[module])
            packages = project["optional-dependencies"][extra]
            assert any(package.startswith(f"{distribution}>") for package in packages), module


def test_all_that_is_missing_is_told_at_once(monkeypatch):
    for name in ("igl", "embreex", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    check_packages("this", "numpy")
    expected = r"^this needs matplotlib and tensorbored: `pip install 'diffusers_sparse3d\[train\]' tensorbored`$"
    with pytest.raises(ImportError, match=expected):
        check_packages("this", "matplotlib", "numpy", "tensorbored")


@pytest.mark.parametrize("module", ["embreex", "igl"])
def test_a_broken_package_is_told_as_one_that_is_missing(module, model, image, tmp_path, capsys, monkeypatch):
    """Of these two, which take no time to import."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("raise ImportError('libembree4.so: no such file')")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    expected = f"this needs {module}, which is installed but cannot be imported: ImportError: libembree4.so"
    with pytest.raises(ImportError, match=expected):
        check_packages("this", "numpy", module)
    if module == "embreex":
        monkeypatch.setattr(generate, "load_pipeline", None)
        words = GENERATE.format(image=image, model=model).split()
        assert cli.main([*words, "--preview", str(tmp_path / "x.png")]) == 1
        assert "`--preview` needs embreex, which is installed but" in capsys.readouterr().err


def test_a_photo_that_takes_a_missing_network_does_not_stop_the_others(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers_sparse3d.pipelines.background.find_spec", lambda name: None)
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name, picture in {"a": tiny_image(), "b": Image.fromarray(noise), "c": tiny_image("blue")}.items():
        picture.save(folder / f"{name}.png")
    words = ["generate", str(folder), "-o", str(tmp_path / "out"), "--model", model, "--device", "cpu"]
    assert cli.main([*words, "--steps", "1", "--dense-steps", "1"]) == 1
    assert sorted(path.name for path in Path(tmp_path / "out").iterdir()) == ["a.glb", "c.glb"]
    err = capsys.readouterr().err
    assert "b: a photo with a busy background needs rembg" in err and "1 of 3" in err


def test_the_page_says_before_the_work_that_it_cannot_draw_several_meshes(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from diffusers_sparse3d.app.generation import Generator
    from diffusers_sparse3d.app.interface import Page
    from diffusers_sparse3d.pipelines.background import BackgroundRemover

    page = Page(Generator(tiny_pipeline()), BackgroundRemover())
    monkeypatch.setitem(sys.modules, "embreex", None)
    settings = (0, 1, 1, 2.0, 3.0, 0.0, [], 0)
    assert page._request([tiny_image()], str(8 * LATENT_SIZE), 1, *settings).seeds == (0,)
    with pytest.raises(gradio.Error, match="several meshes needs embreex"):
        page._request([tiny_image()], str(8 * LATENT_SIZE), 2, *settings)

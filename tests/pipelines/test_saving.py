"""Folders of saved pipelines and models: loading them in all ways, and the model card."""

import io
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_sparse3d import Direct3DS2Pipeline, SDFRefiner, SDFSignRefiner, SparseDiT
from diffusers_sparse3d.models.compatibility import dtype_argument
from diffusers_sparse3d.pipelines.image_processor import load_images
from tests.pipelines.tiny import (
    tiny_components,
    tiny_coords,
    tiny_image,
    tiny_pipeline,
    tiny_refiners,
    tiny_second_stage,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tiny-pipeline"
    tiny_pipeline(**tiny_second_stage(), **tiny_refiners(), weights_license="cc-by-4.0").save_pretrained(path)
    return path


def run_without_import(code, tmp_path):
    """Runs code in a process that starts without the package."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    code = f"import sys\nassert 'diffusers_sparse3d' not in sys.modules\n{code}"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_trust_is_enough_without_the_import(saved, tmp_path):
    """The pipeline, and a model by `AutoModel`; without the trust neither loads, and the message asks for it."""
    result = run_without_import(
        f"""
from diffusers import AutoModel, DiffusionPipeline
for load in (
    lambda: DiffusionPipeline.from_pretrained({str(saved)!r}),
    lambda: AutoModel.from_pretrained({str(saved / "transformer")!r}),
):
    try:
        load()
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without trust")
assert "diffusers_sparse3d" not in sys.modules
model = AutoModel.from_pretrained({str(saved / "transformer")!r}, trust_remote_code=True)
pipe = DiffusionPipeline.from_pretrained({str(saved)!r}, trust_remote_code=True)
print(type(model).__name__, type(pipe).__name__, pipe.resolutions)
""",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "SparseDiT Direct3DS2Pipeline (64, 96)"


def test_with_the_import_no_trust_is_needed(saved, tmp_path):
    """The installed class is taken, and the code in the folder is not run."""
    for name in ("pipeline.py", "None.py"):
        assert (saved / name).exists()
    code = (saved / "None.py").read_text()
    try:
        (saved / "None.py").write_text("raise RuntimeError('run')\n")
        for pipeline_class in (DiffusionPipeline, Direct3DS2Pipeline):
            assert type(pipeline_class.from_pretrained(saved)) is Direct3DS2Pipeline
    finally:
        (saved / "None.py").write_text(code)


def test_models_do_not_show_their_auto_map(saved, caplog):
    config = json.loads((saved / "vae" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "modeling.SparseVAE"}
    model = SparseDiT.from_pretrained(saved, subfolder="transformer")
    assert not caplog.records and "auto_map" not in model.config
    assert type(SparseDiT.from_config(SparseDiT.load_config(saved / "transformer"))) is SparseDiT
    assert type(AutoModel.from_pretrained(str(saved), subfolder="transformer")) is SparseDiT

    class Derived(SparseDiT):
        __module__ = "elsewhere"

    assert "auto_map" not in json.loads(Derived.from_config(model.config).to_json_string())


def test_pickled_files_are_not_opened(saved, tmp_path):
    model = SparseDiT.from_pretrained(saved, subfolder="transformer")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        SparseDiT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`use_safetensors`"):
        SparseDiT.from_pretrained(tmp_path, use_safetensors=False)
    # As a component, too, for which diffusers gives None.
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="`safe_serialization`"):
        pipe.save_pretrained(tmp_path / "refused", safe_serialization=False)
    assert not (tmp_path / "refused").exists()
    pipe.save_pretrained(tmp_path / "pipeline")
    (weights,) = (tmp_path / "pipeline" / "transformer").glob("*.safetensors")
    weights.unlink()
    pipe.transformer.save_pretrained(tmp_path / "pipeline" / "transformer", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        DiffusionPipeline.from_pretrained(tmp_path / "pipeline", image_encoder=pipe.image_encoder)


def test_model_card(saved):
    card = ModelCard.load(saved / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "image-to-3d"
    for text in ("64^3 and 96^3", "| dense | 8^3 occupied cells | 2 | 2 |", "| sparse | 64^3", "| sparse_1024 | 96^3"):
        assert text in card.text
    transformer = SparseDiT.from_pretrained(saved, subfolder="transformer")
    assert f"| `transformer` | SparseDiT | {transformer.num_parameters():,} |" in card.text


def test_example_of_the_model_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("tiny")
    tiny_image().save("object.png")
    (example,) = re.findall(r"```python\n(.*?)```", (tmp_path / "tiny" / "README.md").read_text(), flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "object.glb").stat().st_size > 1000


def test_model_cards_of_others_are_kept(saved, tmp_path):
    pipe = tiny_pipeline()
    (tmp_path / "README.md").write_text("# Mine\n")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").unlink()
    pipe.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license == "unknown"
    pipe.register_to_config(weights_license="mit")
    pipe.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


def test_loading_is_quiet(saved, recwarn, caplog):
    DiffusionPipeline.from_pretrained(saved, **dtype_argument(torch.bfloat16))
    assert [str(w.message) for w in recwarn if issubclass(w.category, FutureWarning)] == []
    assert [record.message for record in caplog.records] == []


def test_casts_are_quiet(caplog):
    """diffusers warns at each cast of modules that should stay in float32, even where there are none."""
    pipe = tiny_pipeline()
    pipe.to(torch.bfloat16)
    pipe.to("cpu", torch.float64)
    pipe.vae.to(dtype=torch.float32, device="cpu")
    pipe.transformer.to(device="cpu", dtype=torch.float16, non_blocking=True).to(torch.float32)
    assert [record.message for record in caplog.records if "float32" in record.message] == []
    assert (pipe.dense_vae.dtype, pipe.vae.dtype, pipe.transformer.dtype) == (
        torch.float64,
        torch.float32,
        torch.float32,
    )


def test_float16_on_a_cpu_warns(caplog):
    pipe = tiny_pipeline()
    for dtype, expected in ((torch.float32, 0), (torch.float16, 1)):
        caplog.clear()
        pipe.to(dtype)
        pipe(tiny_image(), coords=tiny_coords((2,)), num_inference_steps=1, output_type="latent")
        assert sum("slower than float32" in record.message for record in caplog.records) == expected


@pytest.mark.parametrize("refiner_class", [SDFRefiner, SDFSignRefiner])
def test_blocks_that_join_skips_are_not_split(refiner_class):
    """Whatever the sizes of the devices, each block that concatenates is on one of them."""
    accelerate = pytest.importorskip("accelerate")
    name = "refiner" if refiner_class is SDFRefiner else "refiner_1024"
    refiner = tiny_refiners()[name]
    size = sum(parameter.numel() * 4 for parameter in refiner.parameters())
    for share in (0.3, 0.5, 0.7):
        memory = {0: int(share * size), 1: int(0.8 * size), "cpu": size}
        device_map = accelerate.infer_auto_device_map(refiner, memory, refiner._no_split_modules)
        assert len(set(device_map.values())) > 1
        for place in device_map:
            assert not re.search(r"(up|down)_blocks\.\d+\.|filter_\w+\.", place), device_map


def test_kinds_of_images(tmp_path):
    image, path, buffer = tiny_image(), tmp_path / "image.png", io.BytesIO()
    image.save(path)
    image.save(buffer, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(buffer.getvalue() if self.path == "/image.png" else b"<html>")

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server, path.open("rb") as file:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        sources = [path, str(path), buffer.getvalue(), bytearray(buffer.getvalue()), file, f"{address}/image.png"]
        for loaded in load_images(sources):
            assert loaded.mode == "RGBA" and loaded.tobytes() == image.tobytes()
        for source in (b"no image", io.BytesIO(b"no image"), f"{address}/page"):
            with pytest.raises(ValueError, match="`image` must be an image in a format"):
                load_images(source)
        server.shutdown()
    with pytest.raises(ValueError, match="path, URL, bytes, file"):
        load_images(3)


def test_number_of_meshes_by_the_name_of_diffusers():
    pipe = tiny_pipeline(**tiny_components())
    kwargs = {"coords": tiny_coords((2, 3)), "output_type": "sdf"}
    assert len(pipe(tiny_image(), num_images_per_prompt=2, **kwargs).sdfs) == 2
    assert len(pipe(tiny_image(), num_images_per_prompt=2, num_meshes_per_image=2, **kwargs).sdfs) == 2
    for arguments in ({"num_images_per_prompt": 0}, {"num_images_per_prompt": 2, "num_meshes_per_image": 3}):
        with pytest.raises(ValueError, match="`num_images_per_prompt`"):
            pipe(tiny_image(), **arguments, **kwargs)


class Payload:
    """What a hostile pickle does when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_no_component_is_loaded_from_a_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="`use_safetensors`"):
        Direct3DS2Pipeline.from_pretrained(tmp_path / "pipe", use_safetensors=False)
    for component, name in (("image_encoder", "pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin")):
        folder = tmp_path / "pipe" / component
        (weights,) = folder.glob("*.safetensors")
        kept = weights.rename(tmp_path / weights.name)
        torch.save({"weight": Payload()}, folder / name)
        with pytest.raises(OSError, match="safetensors"):
            Direct3DS2Pipeline.from_pretrained(tmp_path / "pipe")
        kept.rename(weights)
    assert not (tmp_path / "ran").exists()

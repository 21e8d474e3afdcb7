"""Conversion of published checkpoints: what comes out is what went in, and nothing half-finished ever does."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import diffusers_sparse3d
from diffusers_sparse3d.loaders import convert as converter
from diffusers_sparse3d.loaders.convert import convert, convert_scheduler
from diffusers_sparse3d.loaders.original_config import CHECKPOINT_KEYS, MODEL_ENTRIES
from diffusers_sparse3d.loaders.original_names import convert_state_dict
from diffusers_sparse3d.loaders.random_release import IMAGE_ENCODER_FILE, LAYOUTS, release_config
from diffusers_sparse3d.pipelines.conditioning import encode_image
from tests.golden import load_golden, relative_error
from tests.pipelines.tiny import tiny_image


GOLDEN_ENTRIES = {
    "dense_vae": ("dense_vae", "DenseShapeVAE"),
    "dense_dit": ("dense_dit", "DenseDiT"),
    "sparse_vae": ("sparse_vae_512", "SparseSDFVAE"),
    "sparse_dit": ("sparse_dit_512", "SparseDiT"),
}


def edit_release(release, folder, edit_config=lambda config: None, edit_checkpoint=None, file="model_refiner.ckpt"):
    """A copy of a release with another config.yaml, or other contents of one file."""
    shutil.copytree(release, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    edit_config(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if edit_checkpoint is not None:
        checkpoint = torch.load(folder / file, weights_only=True)
        edit_checkpoint(checkpoint)
        torch.save(checkpoint, folder / file)
    return folder


def assert_fails(release, match, folder, **kwargs):
    """The conversion raises, and what was in the folder around the output is all that is in it afterwards."""
    folder.mkdir()
    (folder / "other").touch()
    kwargs = {"image_encoder": release / IMAGE_ENCODER_FILE, **kwargs}
    with pytest.raises(ValueError, match=match):
        convert(release, folder / "output", **kwargs)
    assert [path.name for path in folder.iterdir()] == ["other"]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_converted_pipeline_is_the_original(layout, releases, converted):
    config = yaml.safe_load((releases[layout] / "config.yaml").read_text())
    pipe = DiffusionPipeline.from_pretrained(converted[layout])
    assert type(pipe) is diffusers_sparse3d.Direct3DS2Pipeline
    for entry, (component, file) in MODEL_ENTRIES.items():
        model = getattr(pipe, component)
        model_name = type(model).__name__
        checkpoint = torch.load(releases[layout] / file, weights_only=True)
        expected = convert_state_dict(model_name, checkpoint[CHECKPOINT_KEYS[model_name]])
        assert model.state_dict().keys() == expected.keys(), entry
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert pipe.transformer.config.compression_version == config["sparse_dit_512"]["params"]["compression_version"]
    assert pipe.transformer.config.topk == config["sparse_dit_512"]["params"]["topk"]
    assert pipe.transformer.config.sparse_conditioning == (layout == "v1.0")
    assert pipe.transformer.config.qk_norm and pipe.dense_transformer.config.qk_norm
    assert (pipe.transformer.config.coord_scale, pipe.transformer_1024.config.coord_scale) == (1.0, 0.5)
    assert [s.config.shift for s in (pipe.dense_scheduler, pipe.scheduler, pipe.scheduler_1024)] == [6.0, 6.0, 8.0]
    assert pipe.dense_vae.config.sample_size == pipe.vae.config.sample_size == pipe.transformer.config.sample_size == 8
    assert pipe.vae_1024.config.sample_size == pipe.transformer_1024.config.sample_size == 16
    assert pipe.config.default_level == 0.2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_pipeline_computes_what_the_original_files_say(layout, releases, converted):
    pipe = DiffusionPipeline.from_pretrained(converted[layout])
    originals = {
        component: type(getattr(pipe, component)).from_single_file(releases[layout] / file)
        for component, file in MODEL_ENTRIES.values()
        if "refiner" not in component
    }
    inputs = {"image": tiny_image(), "dense_num_inference_steps": 1, "num_inference_steps": 1, "resolution": 64}
    inputs["coords"] = torch.tensor([[0, 1, 2, 3], [0, 4, 4, 4], [0, 7, 0, 5]], dtype=torch.int32)
    sdfs = []
    for pipeline in (pipe, DiffusionPipeline.from_pretrained(converted[layout], **originals)):
        pipeline.set_progress_bar_config(disable=True)
        sdfs.append(pipeline(**inputs, generator=torch.Generator().manual_seed(0), output_type="sdf").sdfs[0])
    assert sdfs[0].feats.std() > 0.05
    torch.testing.assert_close(sdfs[0].feats, sdfs[1].feats, rtol=1e-4, atol=1e-5)
    assert torch.equal(sdfs[0].coords, sdfs[1].coords)


def test_pipeline_for_code_that_does_not_import_the_package(converted):
    pipe = DiffusionPipeline.from_pretrained(converted["v1.1"], custom_pipeline="pipeline", trust_remote_code=True)
    assert type(pipe).__name__ == "Direct3DS2Pipeline" and pipe.config.default_level == 0.2


@torch.no_grad()
def test_the_card_names_the_folder(converted):
    """Not the one beside its place in which it was filled."""
    for folder in converted.values():
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f"\n# {folder.name}\n" in card and f'from_pretrained("{folder.name}"' in card


def test_golden_weights(tmp_path):
    config, tensors = {}, {}
    for case, (entry, class_name) in GOLDEN_ENTRIES.items():
        golden = load_golden(case)
        config[entry] = {"target": f"direct3d_s2.{class_name}", "params": golden.config}
        file = tmp_path / MODEL_ENTRIES[entry].file
        checkpoint = torch.load(file, weights_only=True) if file.exists() else {}
        model_name = {"DenseShapeVAE": "DenseVAE", "SparseSDFVAE": "SparseVAE"}.get(class_name, class_name)
        torch.save({**checkpoint, CHECKPOINT_KEYS[model_name]: golden.state_dict}, file)
        tensors[case] = golden.tensors
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "output"
    convert(tmp_path, output)

    vae = diffusers_sparse3d.DenseVAE.from_pretrained(output, subfolder="dense_vae")
    assert (
        relative_error(vae.encode(tensors["dense_vae"]["input"]).latent_dist.mean, tensors["dense_vae"]["latent_mean"])
        < 1e-5
    )
    case = tensors["dense_dit"]
    transformer = diffusers_sparse3d.DenseDiT.from_pretrained(output, subfolder="dense_transformer")
    assert relative_error(transformer(case["input"], case["timestep"], case["cond"]).sample, case["output"]) < 1e-5
    for case, component in (("sparse_vae", "vae"), ("sparse_dit", "transformer")):
        weights = load_file(output / component / "diffusion_pytorch_model.safetensors")
        model_name = json.loads((output / component / "config.json").read_text())["_class_name"]
        expected = convert_state_dict(model_name, load_golden(case).state_dict)
        assert weights.keys() == expected.keys() and all(
            torch.equal(weights[name], expected[name]) for name in expected
        )


def test_absent_entries_are_left_out(releases, tmp_path):
    keep = ("sparse_vae_512", "sparse_scheduler_512")
    release = edit_release(
        releases["v1.0"], tmp_path / "release", lambda c: [c.pop(name) for name in list(c) if name not in keep]
    )
    (release / "model_dense.ckpt").unlink()
    convert(release, tmp_path / "output")
    folders = {path.name for path in (tmp_path / "output").iterdir() if path.is_dir()}
    assert folders == {"vae", "scheduler"}
    index = json.loads((tmp_path / "output" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers_sparse3d", "SparseVAE"] and index["transformer"] == [None, None]
    with pytest.raises(ValueError, match="dense_transformer"):
        DiffusionPipeline.from_pretrained(tmp_path / "output")


def test_without_second_stage(releases, tmp_path):
    def edit(config):
        for name in [name for name in config if "1024" in name or "refiner" in name]:
            config.pop(name)

    release = edit_release(releases["v1.1"], tmp_path / "release", edit)
    convert(release, tmp_path / "output", image_encoder=release / IMAGE_ENCODER_FILE)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "output")
    assert pipe.vae is not None and pipe.vae_1024 is None and pipe.refiner is None


def test_latent_statistics(releases, tmp_path):
    release = edit_release(
        releases["v1.1"],
        tmp_path / "release",
        lambda config: config["sparse_vae_512"]["params"].update(latents_scale=0.25, latents_shift=-0.5),
    )
    convert(release, tmp_path / "output", image_encoder=release / IMAGE_ENCODER_FILE)
    config = diffusers_sparse3d.SparseVAE.load_config(tmp_path / "output", subfolder="vae")
    assert (config["scaling_factor"], config["shift_factor"]) == (0.25, -0.5)


def test_fp16_variant(releases, converted, tmp_path):
    convert(releases["v1.1"], tmp_path / "output", "fp16", image_encoder=converted["v1.1"] / "image_encoder")
    files = {path.name for path in (tmp_path / "output").rglob("*.safetensors")}
    assert files == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    half = DiffusionPipeline.from_pretrained(tmp_path / "output", variant="fp16", torch_dtype=torch.float16)
    full = DiffusionPipeline.from_pretrained(converted["v1.1"])
    for name in ("image_encoder", "dense_vae", "transformer", "vae", "transformer_1024", "refiner_1024"):
        expected = getattr(full, name).state_dict()
        for key, tensor in getattr(half, name).state_dict().items():
            assert torch.equal(tensor, expected[key].half()), key


def test_blocks_of_fp16(releases, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "BLOCK_NUMEL", 1000)
    convert(releases["v1.1"], tmp_path / "output", "fp16", image_encoder=converted["v1.1"] / "image_encoder")
    half = load_file(tmp_path / "output" / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    full = load_file(converted["v1.1"] / "vae" / "diffusion_pytorch_model.safetensors")
    assert half.keys() == full.keys() and all(torch.equal(half[name], full[name].half()) for name in full)


def test_large_models_are_sharded(releases, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "MAX_SHARD_SIZE", "200KB")
    convert(releases["v1.1"], tmp_path / "output", image_encoder=converted["v1.1"] / "image_encoder")
    assert len(list((tmp_path / "output" / "vae").glob("*.safetensors"))) > 1
    sharded = diffusers_sparse3d.SparseVAE.from_pretrained(tmp_path / "output", subfolder="vae").state_dict()
    whole = diffusers_sparse3d.SparseVAE.from_pretrained(converted["v1.1"], subfolder="vae").state_dict()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_parameters_that_do_not_fit_are_listed(releases, tmp_path):
    def edit(checkpoint):
        state_dict = checkpoint["dit"]
        del state_dict["input_layer.bias"], state_dict["blocks.1.cross_attn.to_kv.weight"]
        state_dict["blocks.7.norm2.weight"] = torch.zeros(32)
        state_dict["extra"] = torch.zeros(1)
        state_dict["out_layer.bias"] = torch.zeros(3)

    release = edit_release(releases["v1.1"], tmp_path / "release", edit_checkpoint=edit, file="model_sparse_1024.ckpt")
    match = (
        r"model_sparse_1024.ckpt.*2 missing: input_layer.bias, blocks.1.cross_attn.to_kv.weight;"
        r" 2 unexpected: extra, blocks.7.norm2.weight; 1 wrongly shaped: out_layer.bias \[3\]"
    )
    assert_fails(release, match, tmp_path / "here")


def test_truncated_file(releases, tmp_path):
    release = edit_release(releases["v1.1"], tmp_path / "release")
    content = (release / "model_refiner_1024.ckpt").read_bytes()
    (release / "model_refiner_1024.ckpt").write_bytes(content[: len(content) // 2])
    assert_fails(release, "model_refiner_1024.ckpt.* is truncated", tmp_path / "here")


class Foreign:
    """Not a tensor; unpickling it would run code."""

    def __reduce__(self):
        return (sys.exit, ("code of a checkpoint ran",))


@pytest.mark.parametrize("content", [Foreign(), [1, 2], {"vae": {}, "dit": {"a": 1}}, {"refiner": {}}])
def test_foreign_file(content, releases, tmp_path):
    release = edit_release(releases["v1.1"], tmp_path / "release")
    torch.save(content, release / "model_sparse_512.ckpt")
    assert_fails(release, "model_sparse_512.ckpt", tmp_path / "here")


def test_file_that_is_not_there(releases, tmp_path):
    release = edit_release(releases["v1.1"], tmp_path / "release")
    (release / "model_dense.ckpt").unlink()
    assert_fails(release, "model_dense.ckpt` is not a file", tmp_path / "here")


def test_value_too_large_for_fp16(releases, tmp_path):
    def edit(checkpoint):
        checkpoint["refiner"]["conv_out.bias"].fill_(1e6)

    release = edit_release(releases["v1.1"], tmp_path / "release", edit_checkpoint=edit)
    assert_fails(release, "fp16 cannot hold.*conv_out.bias", tmp_path / "here", variant="fp16")


@pytest.mark.parametrize(
    ("entry", "edit", "match"),
    [
        ("sparse_dit_512", lambda e: e["params"].update(colour="red"), "lacks: .'colour'"),
        ("sparse_dit_512", lambda e: e["params"].pop("resolution"), "sparse_dit_512.* lacks .'resolution'"),
        ("sparse_dit_512", lambda e: e["params"].update(pe_mode="rope"), "pe_mode='rope'"),
        ("sparse_dit_512", lambda e: e["params"].update(use_shift=False), "use_shift=False"),
        ("sparse_dit_512", lambda e: e.update(target="somewhere.UNet"), "names UNet"),
        ("sparse_dit_512", lambda e: e.pop("target"), "has no `target`"),
        ("dense_scheduler", lambda e: e.update(target="diffusers.UNet2DModel"), "not a scheduler"),
        ("dense_scheduler", lambda e: e["params"].update(colour="red"), "dense_scheduler.*colour"),
        ("dense_image_encoder", lambda e: e["params"].update(size=1), "differ"),
    ],
)
def test_configuration_that_does_not_fit(entry, edit, match, releases, tmp_path):
    release = edit_release(releases["v1.1"], tmp_path / "release", lambda config: edit(config[entry]))
    assert_fails(release, match, tmp_path / "here")


@pytest.mark.parametrize("text", [None, "a: [", "", "diffusion: {target: x.Y, params: {}}"])
def test_configuration_that_is_none(text, tmp_path):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    assert_fails(tmp_path, "config.yaml", tmp_path / "here")


def test_output_that_is_there(releases, tmp_path):
    (tmp_path / "output").mkdir()
    kwargs = {"image_encoder": releases["v1.1"] / IMAGE_ENCODER_FILE}
    convert(releases["v1.1"], tmp_path / "output", **kwargs)
    before = sorted(path.name for path in (tmp_path / "output").iterdir())
    with pytest.raises(ValueError, match="is there already"):
        convert(releases["v1.1"], tmp_path / "output", **kwargs)
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == before


def test_any_scheduler_of_diffusers():
    entry = {"target": "diffusers.schedulers.FlowMatchHeunDiscreteScheduler", "params": {"shift": 2.0}}
    scheduler = convert_scheduler(entry, "dense_scheduler")
    assert type(scheduler) is FlowMatchHeunDiscreteScheduler and scheduler.config.shift == 2.0


def dinov2_tokens(state_dict, pixel_values, num_heads):
    """The tokens before the final norm, from torch.hub's parameters: DINOv2 (arXiv 2304.07193) with registers."""

    def linear(name, x):
        return F.linear(x, state_dict[f"{name}.weight"], state_dict[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state_dict[f"{name}.weight"], state_dict[f"{name}.bias"], eps=1e-6)

    projection = state_dict["patch_embed.proj.weight"]
    x = F.conv2d(pixel_values, projection, state_dict["patch_embed.proj.bias"], stride=projection.shape[-1])
    x = torch.cat([state_dict["cls_token"], x.flatten(2).transpose(1, 2)], dim=1) + state_dict["pos_embed"]
    x = torch.cat([x[:, :1], state_dict["register_tokens"], x[:, 1:]], dim=1)
    block = 0
    while f"blocks.{block}.ls1.gamma" in state_dict:
        name = f"blocks.{block}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x)).unflatten(-1, (3, num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + state_dict[f"{name}.ls1.gamma"] * linear(f"{name}.attn.proj", attention)
        hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x)))
        x = x + state_dict[f"{name}.ls2.gamma"] * linear(f"{name}.mlp.fc2", hidden)
        block += 1
    return x


@torch.no_grad()
def test_image_encoder_of_torch_hub(releases, converted):
    state_dict = torch.load(releases["v1.1"] / IMAGE_ENCODER_FILE, weights_only=True)
    model = Dinov2WithRegistersModel.from_pretrained(converted["v1.1"] / "image_encoder").eval()
    pixel_values = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = dinov2_tokens(state_dict, pixel_values, num_heads=2)
    torch.testing.assert_close(
        encode_image(model, pixel_values), F.layer_norm(expected, expected.shape[-1:]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("version", "hub_id"),
    [
        ("dinov2_vits14_reg", "facebook/dinov2-with-registers-small"),
        ("dinov2_vitb14_reg", "facebook/dinov2-with-registers-base"),
        ("dinov2_vitl14_reg", "facebook/dinov2-with-registers-large"),
    ],
)
def test_image_encoder_that_the_configuration_names(version, hub_id, tmp_path, monkeypatch):
    asked = []
    encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=12, num_hidden_layers=1))

    def load(source, variant=None):
        asked.append(source)
        return encoder

    monkeypatch.setattr(converter, "load_image_encoder", load)
    config = {"dense_image_encoder": {"target": "x.DinoEncoder", "params": {"version": version}}}
    converter.convert_image_encoder(config, None, tmp_path, None)
    assert asked == [hub_id]
    assert (tmp_path / "image_encoder" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="'dinov2_vitg14_reg'"):
        config["dense_image_encoder"]["params"]["version"] = "dinov2_vitg14_reg"
        converter.convert_image_encoder(config, None, tmp_path, None)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("patch_embed.proj.weight", (63, 3, 14, 14)), ("pos_embed", (17, 128)), ("register_tokens", (1, 0, 128))],
)
def test_shapes_of_the_image_encoder(releases, name, shape):
    state_dict = torch.load(releases["v1.1"] / IMAGE_ENCODER_FILE, weights_only=True)
    converter.image_encoder_config(state_dict)
    with pytest.raises(ValueError, match="must have 64 channels a head and DINOv2's parameters"):
        converter.image_encoder_config({**state_dict, name: torch.zeros(shape)})


def test_command_line_needs_a_source_and_an_output(capsys):
    for arguments in (["--original", "x"], ["--output", "x"]):
        with pytest.raises(SystemExit):
            converter.main(arguments)
        assert "required" in capsys.readouterr().err


def test_image_encoder_that_does_not_fit(releases, tmp_path):
    release = releases["v1.1"]
    state_dict = torch.load(release / IMAGE_ENCODER_FILE, weights_only=True)
    torch.save({**state_dict, "extra": torch.zeros(1)}, tmp_path / "extra.pth")
    assert_fails(release, "extra", tmp_path / "1", image_encoder=tmp_path / "extra.pth")
    del state_dict["blocks.1.norm1.weight"]
    torch.save(state_dict, tmp_path / "missing.pth")
    assert_fails(release, "missing_keys.*1.norm1.weight", tmp_path / "2", image_encoder=tmp_path / "missing.pth")
    assert_fails(release, "register_tokens", tmp_path / "3", image_encoder=release / "model_dense.ckpt")
    tiny = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "plain")
    assert_fails(release, "model type is dinov2", tmp_path / "4", image_encoder=tmp_path / "plain")
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**tiny)).save_pretrained(tmp_path / "narrow")
    assert_fails(
        release, "128 channels, but the image encoder has 64", tmp_path / "5", image_encoder=tmp_path / "narrow"
    )
    assert_fails(release, "is not a Dinov2WithRegistersModel", tmp_path / "6", image_encoder=tmp_path / "nowhere")


def test_files_of_old_torch(releases, converted, tmp_path):
    release = edit_release(releases["v1.1"], tmp_path / "release")
    checkpoint = torch.load(release / "model_refiner.ckpt", weights_only=True)
    torch.save(checkpoint, release / "model_refiner.ckpt", _use_new_zipfile_serialization=False)
    convert(release, tmp_path / "output", image_encoder=release / IMAGE_ENCODER_FILE)
    file = Path("refiner", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "output" / file).read_bytes() == (converted["v1.1"] / file).read_bytes()


def test_documentation(releases, converted, tmp_path, monkeypatch):
    """The Python in docs/conversion.md runs, on tiny models in the folders that it names."""
    (tmp_path / "direct3d-s2-v-1-1").symlink_to(releases["v1.1"])
    (tmp_path / "direct3d-s2").symlink_to(converted["v1.1"])
    text = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    for block in blocks:
        # A generation in the noise of random weights takes half a minute; its call is that of the README.
        if "pipe.to(" not in block:
            exec(block, names)
    assert names["pipe"].dtype == torch.bfloat16
    assert names["transformer"].dtype == torch.float16 and names["vae"].config.sample_size == 8
    assert names["pipe"].transformer.config.topk == 8
    for entry, (component, file) in MODEL_ENTRIES.items():
        assert all(f"`{name}`" in text for name in (entry, component, file)), entry


def test_command_line(releases, tmp_path, monkeypatch):
    release = releases["v1.1"]
    arguments = ["convert", "--original", str(release), "--output", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--image_encoder", str(release / IMAGE_ENCODER_FILE)])
    converter.main()
    assert (tmp_path / "output" / "model_index.json").is_file()
    with pytest.raises(SystemExit, match=r"error: .*is there already"):
        converter.main()


def test_tiny_releases_have_the_structure_of_full_ones():
    config = release_config("v1.0")
    assert list(config) == list(release_config("v1.1", tiny=True))
    assert (
        config["sparse_dit_512"]["params"]["topk"] == 32
        and config["dense_vae"]["params"]["num_res_blocks_decoder"] == 4
    )

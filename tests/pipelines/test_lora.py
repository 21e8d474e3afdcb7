"""LoRA on the pipeline, in the manner of diffusers' tester of LoRA, with real transformers at tiny size."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from diffusers_sparse3d.loaders import lora_files
from diffusers_sparse3d.loaders.lora import LORA_COMPONENTS

from .tiny import tiny_coords, tiny_image, tiny_pipeline, tiny_second_stage


peft = pytest.importorskip("peft")
FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "gate", "proj_out"]


@pytest.fixture(scope="module")
def base():
    return tiny_pipeline(**tiny_second_stage())


@pytest.fixture
def pipe(base):
    """The pipeline with transformers of its own, as LoRA changes nothing else."""
    copies = {name: copy.deepcopy(getattr(base, name)) for name in LORA_COMPONENTS}
    return tiny_pipeline(**{**base.components, **copies})


@torch.no_grad()
def predict(name, model, **kwargs):
    """The velocity that a transformer predicts of fixed noise."""
    generator = torch.Generator().manual_seed(0)
    timestep, tokens = torch.tensor([300.0]), torch.randn(1, 5, 16, generator=generator)
    if name == "dense_transformer":
        return model(torch.randn(1, 2, 4, 4, 4, generator=generator), timestep, tokens, **kwargs).sample
    feats, places = torch.randn(9, 4, generator=generator), tiny_coords((5,), seed=1)
    return model(feats, tiny_coords((9,)), timestep, tokens[0], encoder_coords=places, **kwargs).sample


def predictions(pipe, **kwargs):
    return {name: predict(name, getattr(pipe, name), **kwargs) for name in LORA_COMPONENTS}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in LORA_COMPONENTS)


def close(first, second):
    errors = [(first[name] - second[name]).norm() / first[name].norm() for name in LORA_COMPONENTS]
    return max(errors) < 1e-5


class Adapter:
    """Random LoRA weights of a transformer as a training leaves them, and what it predicts with them."""

    def __init__(self, pipe, name, seed=0, rank=2, **options):
        model = copy.deepcopy(getattr(pipe, name))
        torch.manual_seed(seed)
        options = {"lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **options}
        model.add_adapter(peft.LoraConfig(r=rank, **options), "mine")
        for key, parameter in model.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        self.layers = peft.get_peft_model_state_dict(model, adapter_name="mine")
        self.settings = model.peft_config["mine"].to_dict()
        self.prediction = predict(name, model)


def write(folder, pipe, *names, seed=0, **options):
    """A LoRA file of some transformers; returns what the pipeline must predict with it."""
    arguments, expected = {}, predictions(pipe)
    for name in names:
        adapter = Adapter(pipe, name, seed, **options)
        assert not torch.equal(adapter.prediction, expected[name])
        arguments[f"{name}_lora_layers"] = adapter.layers
        arguments[f"{name}_lora_adapter_metadata"] = adapter.settings
        expected[name] = adapter.prediction
    type(pipe).save_lora_weights(folder, **arguments)
    return expected


def test_all_methods_of_diffusers_are_there(pipe):
    assert isinstance(pipe, LoraBaseMixin)
    assert pipe._lora_loadable_modules == ["transformer", "dense_transformer", "transformer_1024"]
    for name in ("load_lora_weights", "save_lora_weights", "lora_state_dict", "fuse_lora", "unfuse_lora"):
        assert name in dir(pipe) and getattr(type(pipe), name) is not getattr(LoraBaseMixin, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"transformer_blocks.0.attn1.to_v": 7, "to_q": 5}},
        {"use_rslora": True},
        {"use_dora": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_loaded_weights_predict_as_those_trained(tmp_path, pipe, options):
    before = predictions(pipe)
    expected = write(tmp_path, pipe, *LORA_COMPONENTS, **options)
    pipe.load_lora_weights(tmp_path, adapter_name="mine")
    assert close(predictions(pipe), expected)
    assert pipe.get_active_adapters() == ["mine"]
    assert pipe.get_list_adapters() == {name: ["mine"] for name in LORA_COMPONENTS}
    pipe.unload_lora_weights()
    assert same(predictions(pipe), before) and pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []


def test_components_are_kept_apart(tmp_path, pipe):
    before = predictions(pipe)
    for name in LORA_COMPONENTS:
        expected = write(tmp_path / name, pipe, name)
        pipe.load_lora_weights(tmp_path / name / FILE)
        assert close(predictions(pipe), expected)
        assert pipe.get_list_adapters() == {name: ["default_0"]}
        pipe.unload_lora_weights()
    assert same(predictions(pipe), before)


def test_pipeline_generates_with_lora(tmp_path, pipe):
    write(tmp_path, pipe, "transformer")

    def latents(**kwargs):
        generator = torch.Generator().manual_seed(0)
        coords = tiny_coords((6,))
        return pipe(
            tiny_image(), coords=coords, resolution=64, generator=generator, output_type="latent", **kwargs
        ).latents

    before = latents()
    pipe.load_lora_weights(tmp_path)
    active = latents()
    assert not torch.allclose(active, before, atol=1e-3)
    assert torch.equal(latents(attention_kwargs={"scale": 0.0}), before)
    pipe.fuse_lora()
    assert torch.allclose(latents(), active, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("use_dora", [False, True])
def test_fused_weights_predict_as_active_ones(tmp_path, pipe, scale, use_dora):
    before = predictions(pipe)
    expected = write(tmp_path, pipe, *LORA_COMPONENTS, use_dora=use_dora)
    pipe.load_lora_weights(tmp_path)
    pipe.set_adapters("default_0", scale)
    scaled = predictions(pipe)
    assert not close(scaled, before)
    pipe.set_adapters("default_0")
    pipe.fuse_lora(lora_scale=scale)
    assert pipe.num_fused_loras == 1 and pipe.fused_loras == {"default_0"}
    assert close(predictions(pipe), scaled)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert close(predictions(pipe), expected)
    # Fused and unloaded, the weights stay in those of the model.
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    assert close(predictions(pipe), scaled)


def test_fusing_some_components(tmp_path, pipe):
    expected = write(tmp_path, pipe, *LORA_COMPONENTS)
    weights = pipe.transformer.proj_out.weight.clone(), pipe.dense_transformer.proj_out.weight.clone()
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora(["transformer"])
    assert not torch.equal(pipe.transformer.proj_out.weight, weights[0])
    assert torch.equal(pipe.dense_transformer.proj_out.weight, weights[1])
    assert close(predictions(pipe), expected)
    with pytest.raises(ValueError, match=r"vae"):
        pipe.fuse_lora(["vae"])
    with pytest.raises(ValueError, match=r"vae"):
        pipe.unfuse_lora(["vae"])


def test_several_adapters_and_scales_by_component(tmp_path, pipe):
    before = predictions(pipe)
    one = write(tmp_path / "one", pipe, *LORA_COMPONENTS)
    two = write(tmp_path / "two", pipe, "transformer", "dense_transformer", seed=1)
    pipe.load_lora_weights(tmp_path / "one", adapter_name="one")
    pipe.load_lora_weights(tmp_path / "two", adapter_name="two")
    pipe.set_adapters("one")
    assert close(predictions(pipe), one) and pipe.get_active_adapters() == ["one"]
    pipe.set_adapters(["two"])
    assert close(predictions(pipe), {**two, "transformer_1024": before["transformer_1024"]})
    pipe.set_adapters(["one", "two"], [0.0, 1.0])
    assert close(predictions(pipe), {**two, "transformer_1024": before["transformer_1024"]})
    assert pipe.get_active_adapters() == ["one", "two"]

    # A dictionary holds for all adapters; components that it does not name have the weight 1.
    pipe.set_adapters(["one", "two"], {"transformer": 0.0, "dense_transformer": 0.0})
    assert close(predictions(pipe), {**before, "transformer_1024": one["transformer_1024"]})
    pipe.set_adapters(["one", "two"], [{"transformer": 0.0}, {"dense_transformer": 0.0}])
    mixed = {"transformer": two["transformer"], "dense_transformer": one["dense_transformer"]}
    assert close(predictions(pipe), {**one, **mixed})

    pipe.disable_lora()
    assert same(predictions(pipe), before)
    pipe.enable_lora()
    assert close(predictions(pipe), {**one, **mixed})
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters() == {name: ["one"] for name in LORA_COMPONENTS}
    pipe.set_adapters("one")
    assert close(predictions(pipe), one)
    with pytest.raises(ValueError, match="two"):
        pipe.set_adapters("two")
    with pytest.raises(ValueError, match=r"adapter_weights.*unet"):
        pipe.set_adapters("one", {"unet": 1.0})
    with pytest.raises(ValueError, match="length"):
        pipe.set_adapters("one", [1.0, 2.0])


def test_lora_device(tmp_path, pipe):
    write(tmp_path, pipe, *LORA_COMPONENTS, use_dora=True)
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    pipe.set_lora_device(["a"], "meta")
    assert {p.device.type for n, p in pipe.transformer.named_parameters() if "lora_" in n} == {"meta"}
    assert {p.device.type for n, p in pipe.transformer.named_parameters() if "lora_" not in n} == {"cpu"}


def test_hotswap_in_place_and_to_another_rank(tmp_path, pipe):
    write(tmp_path / "small", pipe, *LORA_COMPONENTS, rank=2)
    expected = write(tmp_path / "large", pipe, *LORA_COMPONENTS, seed=1, rank=3, lora_alpha=5)
    write(tmp_path / "part", pipe, "transformer", seed=2)
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(tmp_path / "small", adapter_name="a")
    parameters = {id(p) for p in pipe.transformer.parameters()}
    pipe.load_lora_weights(tmp_path / "large", adapter_name="a", hotswap=True)
    assert close(predictions(pipe), expected)
    assert {id(p) for p in pipe.transformer.parameters()} == parameters
    for name, folder in (("a", "part"), ("b", "large"), (None, "large")):
        with pytest.raises(ValueError, match="adapter_name"):
            pipe.load_lora_weights(tmp_path / folder, adapter_name=name, hotswap=True)
    assert close(predictions(pipe), expected)


def test_subfolders_of_a_local_folder(tmp_path, pipe):
    """The folder itself has files of the same names, as a training that keeps its checkpoints leaves them."""
    adapters = {folder: Adapter(pipe, "dense_transformer", seed) for seed, folder in enumerate(["", "step-500"])}
    for folder, adapter in adapters.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        tensors = {f"base_model.model.{key}": value for key, value in adapter.layers.items()}
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 2}))
    for folder, adapter in adapters.items():
        arguments = {"subfolder": folder} if folder else {}
        pipe.load_lora_weights(tmp_path, weight_name="adapter_model.safetensors", **arguments)
        assert close(predictions(pipe), {**predictions(pipe), "dense_transformer": adapter.prediction})
        pipe.unload_lora_weights()


@pytest.mark.parametrize("cause, warns", [(EntryNotFoundError, False), (LocalEntryNotFoundError, True), (None, True)])
def test_settings_of_peft_that_cannot_be_looked_for(cause, warns, tmp_path, monkeypatch, caplog):
    """Without them, an alpha that is not the rank is lost. A Hub that does not answer may have some."""

    def fetch(*_, **__):
        raise OSError("cannot load") from (ConnectionError() if cause is None else cause("no"))

    monkeypatch.setattr(lora_files, "_get_model_file", fetch)
    assert lora_files._read_peft_config("owner/name", {}) is None
    assert bool(caplog.records) == warns and ("adapter_config.json" in caplog.text) == warns


def test_layouts(tmp_path, pipe):
    """The same weights as diffusers, peft and other trainers write them."""
    adapter = Adapter(pipe, "dense_transformer", rank_pattern={"to_q": 3})
    expected = {**predictions(pipe), "dense_transformer": adapter.prediction}
    layers, settings = adapter.layers, adapter.settings

    def check(**kwargs):
        pipe.load_lora_weights(tmp_path / "weights", **kwargs)
        assert close(predictions(pipe), expected)
        pipe.unload_lora_weights()

    def save(name, tensors, folder=tmp_path / "weights"):
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        save_file(tensors, folder / name)

    # peft, with the settings beside; the component follows from the modules
    save("adapter_model.safetensors", {f"base_model.model.{key}": value for key, value in layers.items()})
    config = {**settings, "target_modules": TARGETS, "unknown": 1}
    (tmp_path / "weights" / "adapter_config.json").write_text(json.dumps(config))
    check()
    check(component="dense_transformer", weight_name="adapter_model.safetensors")
    pipe.load_lora_weights(tmp_path / "weights" / "adapter_model.safetensors")
    assert close(predictions(pipe), expected)
    pipe.unload_lora_weights()
    # without settings, alpha is the rank
    scaled = {k: v * (3 / layers[k.replace("_B", "_A")].shape[0]) if "lora_B" in k else v for k, v in layers.items()}
    save("x.safetensors", {f"base_model.model.dense_transformer.{key}": value for key, value in scaled.items()})
    check()
    save(FILE, {f"dense_transformer.{key}": value for key, value in scaled.items()})
    check()
    # diffusers, of one model
    pipe.load_lora_weights({f"dense_transformer.{key}": value for key, value in scaled.items()}, adapter_name="x")
    pipe.dense_transformer.save_lora_adapter(tmp_path / "weights", adapter_name="x")
    pipe.unload_lora_weights()
    check()
    # other names of the matrices, with alphas
    names = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for key, value in layers.items():
        module, matrix, _ = key.rsplit(".", 2)
        renamed[f"dense_transformer.{module}.{names[matrix]}.weight"] = value
        renamed[f"dense_transformer.{module}.alpha"] = torch.tensor(3.0)
    save(FILE, renamed)
    check()
    given = dict(renamed)
    pipe.load_lora_weights(renamed)
    assert renamed.keys() == given.keys() and close(predictions(pipe), expected)


def test_file_has_the_layout_of_diffusers(tmp_path, pipe):
    adapter = Adapter(pipe, "transformer")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=adapter.layers)
    assert {path.name for path in tmp_path.iterdir()} == {FILE}
    tensors = load_file(tmp_path / FILE)
    assert tensors.keys() == {f"transformer.{key}" for key in adapter.layers}
    assert pipe.lora_state_dict(tmp_path).keys() == tensors.keys()
    assert pipe.lora_state_dict(tmp_path, return_lora_metadata=True)[1] is None
    pipe.save_lora_weights(tmp_path / "other", transformer_lora_layers=adapter.layers, is_main_process=False)
    assert not (tmp_path / "other").exists()
    written = {}
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=adapter.layers,
        weight_name="y",
        save_function=lambda t, p: written.update({p: t}),
    )
    assert written[str(tmp_path / "y")].keys() == tensors.keys()


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, pipe):
    before = predictions(pipe)
    layers = Adapter(pipe, "transformer").layers
    dense = Adapter(pipe, "dense_transformer").layers
    first = next(key for key in layers if "attn1.to_q.lora_B" in key)

    def prefixed(name, tensors):
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    cases = [
        ({}, "no tensors"),
        ({"transformer.proj_out.weight": torch.zeros(2, 2)}, "transformer.proj_out.weight"),
        (prefixed("unet", layers), "begin with unet"),
        ({**prefixed("transformer", layers), **prefixed("text_encoder", layers)}, "text_encoder"),
        ({"transformer.blocks.7.to_q.lora_A.weight": torch.zeros(2, 2)}, "blocks.7.to_q"),
        ({**prefixed("transformer", layers), f"transformer.{first}": torch.zeros(5, 2)}, "to_q.lora_B"),
        ({f"transformer.{first}": layers[first]}, "both matrices.*to_q"),
        # the second component is bad: the first must not be loaded
        (
            {
                **prefixed("transformer", layers),
                **prefixed("dense_transformer", {f"x.{k}": v for k, v in dense.items()}),
            },
            "x.",
        ),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tensors)
        assert pipe.get_list_adapters() == {} and same(predictions(pipe), before)

    single = {key: value for key, value in layers.items() if "transformer_blocks.0" in key}
    with pytest.raises(ValueError, match=r"transformer and transformer_1024.*`component`"):
        pipe.load_lora_weights(single)
    with pytest.raises(ValueError, match=r"`component`.*vae"):
        pipe.load_lora_weights(single, component="vae")
    with pytest.raises(ValueError, match="`component`"):
        pipe.load_lora_weights(prefixed("transformer", layers), component="dense_transformer")
    pipe.load_lora_weights(single, component="transformer_1024", adapter_name="x")
    with pytest.raises(ValueError, match="`adapter_name` 'x' is already in use in transformer_1024"):
        pipe.load_lora_weights({**prefixed("transformer", layers), **prefixed("transformer_1024", single)}, "x")
    assert pipe.get_list_adapters() == {"transformer_1024": ["x"]}
    with pytest.raises(TypeError, match="subfoldr"):
        pipe.load_lora_weights(tmp_path, subfoldr="x")


def test_component_that_the_pipeline_lacks(base, caplog):
    pipe = tiny_pipeline(transformer=copy.deepcopy(base.transformer))
    sparse, second = Adapter(base, "transformer").layers, Adapter(base, "transformer_1024").layers
    file = {f"transformer_1024.{key}": value for key, value in second.items()}
    with pytest.raises(ValueError, match="transformer_1024, which the pipeline does not have"):
        pipe.load_lora_weights(file)
    with pytest.raises(ValueError, match="transformer_1024"):
        pipe.load_lora_weights(second, component="transformer_1024")
    pipe.load_lora_weights({**file, **{f"transformer.{key}": value for key, value in sparse.items()}})
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}


def test_weights_that_are_nowhere(pipe, tmp_path, monkeypatch):
    """Where the Hub cannot be reached either, its library says nothing of the folder."""

    def unreachable(*args, **kwargs):
        raise RuntimeError("no name resolution")

    monkeypatch.setattr(lora_files, "_fetch_state_dict", unreachable)
    with pytest.raises(OSError, match=r"'no/lora' are neither a file nor a folder, .*no name resolution"):
        pipe.load_lora_weights("no/lora")
    with pytest.raises(RuntimeError):
        pipe.load_lora_weights(tmp_path)


def test_pickled_files_are_never_read(tmp_path, pipe):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for name in ("pytorch_lora_weights.bin", "hidden.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match="safetensors"):
            pipe.load_lora_weights(tmp_path / name)
        with pytest.raises(ValueError, match="safetensors"):
            pipe.load_lora_weights(tmp_path, weight_name=name)
    (tmp_path / "hidden.safetensors").unlink()
    with pytest.raises(OSError):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="safe_serialization"):
        pipe.save_lora_weights(tmp_path, {"x": torch.zeros(1)}, safe_serialization=False)
    with pytest.raises(ValueError, match="save_lora_weights"):
        pipe.save_lora_weights(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_both_routes_of_loading(tmp_path, pipe):
    before = predictions(pipe)
    expected = write(tmp_path / "lora", pipe, *LORA_COMPONENTS)
    pipe.load_lora_weights(tmp_path / "lora")
    # Layers of peft in the files would be dropped when the pipeline is loaded, and random ones be in their place.
    with pytest.raises(ValueError, match="fuse_lora"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    for route in ({}, {"custom_pipeline": "pipeline", "trust_remote_code": True}):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe", **route)
        assert type(loaded) is type(pipe) and close(predictions(loaded), before)
        loaded.load_lora_weights(tmp_path / "lora")
        assert close(predictions(loaded), expected)

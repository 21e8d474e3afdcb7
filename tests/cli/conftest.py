import pytest
import torch

from tests.pipelines.tiny import tiny_image, tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny pipeline with random weights."""
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """Folders with random LoRA weights for the tiny pipeline: of its sparse transformer, and of both."""
    peft = pytest.importorskip("peft")
    pipe, folders = tiny_pipeline(), []
    for names in (("transformer",), ("transformer", "dense_transformer")):
        torch.manual_seed(len(names))
        arguments = {}
        for name in names:
            model = getattr(pipe, name)
            options = {"target_modules": ["to_q", "to_v", "proj_out"], "init_lora_weights": False}
            model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, **options), names[-1])
            arguments[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(model, adapter_name=names[-1])
        folders.append(str(tmp_path_factory.mktemp("lora")))
        pipe.save_lora_weights(folders[-1], **arguments)
        pipe.unload_lora_weights()
    return folders


@pytest.fixture
def image(tmp_path):
    """A picture with alpha."""
    tiny_image().save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")

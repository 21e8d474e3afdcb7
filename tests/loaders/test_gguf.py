"""Quantised weights in GGUF files of our own parameter names, through diffusers' loading of single files."""

import pytest
import torch
from diffusers import GGUFQuantizationConfig

from diffusers_sparse3d import DenseDiT, Direct3DS2Pipeline, SparseDiT
from tests.pipelines.tiny import tiny_coords, tiny_pipeline


gguf = pytest.importorskip("gguf")


def write(model, path):
    """A GGUF file with the weights of linear layers in 8 bits, 32 of which share a scale; and the model of these."""
    writer, kind = gguf.GGUFWriter(path, "diffusers_sparse3d"), gguf.GGMLQuantizationType.Q8_0
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    rounded, quantised = {}, set()
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name in layers and tensor.shape[-1] % 32 == 0:
            codes = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, codes, raw_dtype=kind)
            # diffusers computes the products with the scales in float16.
            array = gguf.quants.dequantize(codes, kind).astype("float16").astype("float32")
            quantised.add(name.removesuffix(".weight"))
        else:
            writer.add_tensor(name, array)
        rounded[name] = torch.from_numpy(array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = type(model).from_config(model.config)
    expected.load_state_dict(rounded)
    return expected, quantised


@pytest.mark.parametrize(("model_class", "component"), [(SparseDiT, "transformer"), (DenseDiT, "dense_transformer")])
def test_transformers_load_from_gguf(model_class, component, tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    original = getattr(pipe, component)
    if component == "dense_transformer":
        original = DenseDiT.from_config({**original.config, "attention_head_dim": 16})
        torch.nn.init.normal_(original.proj_out.weight)
        original.save_pretrained(tmp_path / component)
    expected, quantised = write(original, tmp_path / "model.gguf")
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    place = {"config": str(tmp_path), "subfolder": component}
    model = model_class.from_single_file(tmp_path / "model.gguf", quantization_config=config, **place)
    assert quantised and quantised == {
        name for name, module in model.named_modules() if type(module).__name__ == "GGUFLinear"
    }
    generator = torch.Generator().manual_seed(0)
    if component == "transformer":
        coords, tokens = tiny_coords((9,)), torch.zeros(2, 4, dtype=torch.int32)
        tokens[1, 1] = 1
        rows = torch.randn(9, 4, generator=generator)
        inputs = (rows, coords, torch.tensor([500.0]), torch.randn(2, 16, generator=generator), tokens)
    else:
        grid = torch.randn(1, 2, 4, 4, 4, generator=generator)
        inputs = (grid, torch.tensor([500.0]), torch.randn(1, 3, 16, generator=generator))
    with torch.no_grad():
        found, wanted, exact = (one.eval()(*inputs).sample for one in (model, expected, original))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - exact).norm() > 1e-3 * exact.norm()
    loaded = Direct3DS2Pipeline.from_pretrained(tmp_path, **{component: model})
    assert getattr(loaded, component) is model

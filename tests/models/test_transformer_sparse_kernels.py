"""SparseDiT with the Triton kernels of all its operators: in Triton's interpreter, or on a GPU."""

import pytest
import torch

from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.models.test_transformer_sparse import check_compiled_blocks, tiny_inputs, tiny_model
from tests.ops.kernel_testing import (
    DEVICE,
    NATIVE,
    needs_gpu,
    run_kernels_on_the_cpu,
    spied_launches,
)


@pytest.fixture
def kernels(monkeypatch):
    """Without a GPU, kernels run on tensors on the CPU."""
    if not NATIVE:
        run_kernels_on_the_cpu(monkeypatch)


@pytest.mark.parametrize("compression_version, num_kernels", [("v1", 12 + 8 + 4), ("v2", 12 + 8 + 4 + 12 + 20 + 2)])
def test_against_reference(compression_version, num_kernels, request, monkeypatch):
    results = []
    for device in ("cpu", DEVICE):
        if results:
            request.getfixturevalue("kernels")
            launches = spied_launches(monkeypatch)
        model = tiny_model(num_layers=1, compression_version=compression_version).to(device)
        output = model(**{name: tensor.to(device) for name, tensor in tiny_inputs((9, 5)).items()}).sample
        output.square().mean().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
    # Launches of attention, cross-attention, pooling, convolution, group norm and the neighbour map: none fell back.
    assert len(launches) >= num_kernels and min(launches) >= 1
    for expected, found in zip(*results):
        assert (found.cpu() - expected).norm() <= 1e-4 * expected.norm() + 1e-6


# Compilation takes a minute where Python runs the kernels. There, tests of the operators compile each of them, and
# another test compiles the blocks without kernels.
@needs_gpu
@pytest.mark.parametrize("compression_version", ["v1", "v2"])
def test_compiled_blocks(compression_version, kernels):
    check_compiled_blocks([(9, 5), (7, 12)], compression_version, DEVICE)


@needs_gpu
def test_replayed_as_cuda_graphs(monkeypatch):
    model = tiny_model(num_layers=2).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in tiny_inputs((70, 30)).items()}
    inputs["cache"] = CoordinateCache(inputs["coords"], 2)
    inputs["encoder_cache"] = CoordinateCache(inputs["encoder_coords"], 2)
    steps = [inputs, {**inputs, "timestep": inputs["timestep"] / 3}]
    steps += [{**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}]
    steps += [{**inputs, "hidden_states": 2 * inputs["hidden_states"]}]

    @torch.no_grad()
    def run():
        with model.cache_context("cond"):
            return [model(**step).sample for step in steps]

    launches = spied_launches(monkeypatch)

    def check(expected, captures):
        """The results equal those without graphs, and of each kind of call only the first two launch kernels."""
        launches.clear()
        for found, wanted in zip(run(), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert len(launches) == captures * launches_of_call

    # The first call plans, too.
    run()
    launches.clear()
    expected = run()
    launches_of_call = len(launches) / len(steps)
    model.enable_cuda_graphs()
    check(expected, 2)
    check(expected, 0)
    with torch.no_grad():
        model.proj_out.weight.mul_(2)
        model.proj_out.bias.mul_(2)
    check([2 * output for output in expected], 0)
    # Weights in another place.
    model.proj_out = torch.nn.Linear(model.proj_out.in_features, model.proj_out.out_features).to(DEVICE)
    model.disable_cuda_graphs()
    expected = run()
    model.enable_cuda_graphs()
    check(expected, 2)
    # Not captured: gradients, and hooks.
    output = model(**inputs).sample
    output.sum().backward()
    assert model.proj_in.weight.grad.abs().sum() > 0
    model.enable_layerwise_casting(torch.float16, torch.float32)
    launches.clear()
    run()
    assert len(launches) == len(steps) * launches_of_call

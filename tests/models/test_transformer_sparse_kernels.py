"""SparseDiT with the Triton kernels of all its operators: in Triton's interpreter, or on a GPU."""

import pytest
import torch

from diffusers_sparse3d.ops import (
    coordinates,
    group_norm,
    packed_attention,
    pooling,
    sparse_conv,
    spatial_sparse_attention,
)
from tests.models.test_transformer_sparse import check_compiled_blocks, tiny_inputs, tiny_model
from tests.ops.kernel_testing import (
    DEVICE,
    NATIVE,
    needs_kernels,
    run_in_the_interpreter,
    spied_launches,
    without_gpu,
)


@pytest.fixture
def kernels(monkeypatch):
    """Where there is no GPU, kernels run on the CPU."""
    if not NATIVE:
        for module in (coordinates, group_norm, packed_attention, pooling, sparse_conv, spatial_sparse_attention):
            monkeypatch.setattr(module, "runs_kernels", lambda tensor: tensor.dtype in (torch.float32, torch.int32))


@without_gpu
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@needs_kernels
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
    # Of attention, cross-attention, pooling, convolution, group norm and the neighbour map: none fell back.
    assert len(launches) >= num_kernels and min(launches) >= 1
    for expected, found in zip(*results):
        assert (found.cpu() - expected).norm() <= 1e-4 * expected.norm() + 1e-6


@needs_kernels
@pytest.mark.parametrize("compression_version", ["v1", "v2"])
def test_compiled_blocks(compression_version, kernels):
    check_compiled_blocks([(9, 5), (7, 12)], compression_version, DEVICE)

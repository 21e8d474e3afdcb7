"""The refiners with the Triton kernels of their operators: in Triton's interpreter, or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_sparse3d.models.refiner_layers import NarrowConv3d
from diffusers_sparse3d.ops.adaptive_filter.kernels import neighbour_sum
from tests.models.test_refiner_sdf import RESOLUTION, SIZE, STRIDE, shell, tiny_refiner, tiny_sign_refiner
from tests.ops.kernel_testing import DEVICE, NATIVE, needs_gpu, run_kernels_on_the_cpu, spied_launches


@pytest.mark.parametrize("make_model, num_kernels", [(tiny_refiner, 3 * 3 + 3 * 5), (tiny_sign_refiner, 3 * 5)])
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
@torch.no_grad()
def test_against_plain_pytorch(make_model, num_kernels, monkeypatch):
    resolution = RESOLUTION if NATIVE else SIZE + STRIDE
    model = make_model(sample_size=resolution)
    arguments = shell(resolution, batch_size=1)[: 3 if make_model is tiny_refiner else 2]
    if not NATIVE:
        # Two patches along one axis are enough where Python runs the kernels.
        first = (arguments[1][:, 2:] < STRIDE - 1).all(dim=1)
        arguments = tuple(tensor[first] for tensor in arguments)
        assert arguments[1][:, 1].min() < STRIDE < SIZE < arguments[1][:, 1].max()
    expected = model.refine(*arguments).sample
    if not NATIVE:
        run_kernels_on_the_cpu(monkeypatch)
        # Python takes as long for a large tile as for a small one; the kernel's own tests have several.
        monkeypatch.setattr(neighbour_sum, "_MOST_ROWS", 4096)
        monkeypatch.setattr(neighbour_sum, "_TILE_VALUES", 32_768)
    launches = spied_launches(monkeypatch)
    found = model.to(DEVICE).refine(*(tensor.to(DEVICE) for tensor in arguments)).sample.cpu()
    # Group norms of three launches, and filters in three passes: none fell back.
    assert len(launches) >= num_kernels
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("in_channels, out_channels", [(1, 8), (8, 1), (8, 27), (3, 5), (8, 8)])
def test_padded_channels_change_nothing(in_channels, out_channels):
    conv = NarrowConv3d(in_channels, out_channels, kernel_size=3, padding=1).double()
    hidden_states = torch.randn(2, in_channels, 4, 5, 6, dtype=torch.float64)
    expected = F.conv3d(hidden_states, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv._with_padded_channels(hidden_states), expected)
    torch.testing.assert_close(conv(hidden_states), expected)


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_convolutions_are_padded_in_half_precision(autocast, monkeypatch):
    dtype = torch.float32 if autocast else torch.float16
    conv = NarrowConv3d(1, 8, kernel_size=3, padding=1).to(DEVICE, dtype)
    hidden_states, padded = torch.randn(1, 1, 8, 8, 8, device=DEVICE, dtype=dtype), []
    original = NarrowConv3d._with_padded_channels
    monkeypatch.setattr(NarrowConv3d, "_with_padded_channels", lambda *a: (padded.append(1), original(*a))[1])
    with torch.autocast("cuda", torch.float16, enabled=autocast):
        found = conv(hidden_states)
    expected = F.conv3d(hidden_states.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert padded and found.dtype == torch.float16 and (found - expected).norm() < 1e-2 * expected.norm()
    if autocast:
        padded.clear()
        conv(hidden_states)
        assert not padded

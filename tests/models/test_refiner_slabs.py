"""The refiners in slabs: the same results, without the wide volumes."""

import weakref

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sparse3d.models.refiner_layers import GroupNormSiLU, RefinerUNet
from diffusers_sparse3d.models.refiner_slabs import group_statistics
from tests.golden import relative_error
from tests.pipelines.tiny import tiny_refiners


def random_unet(levels=(4, 8, 16)):
    torch.manual_seed(0)
    unet = RefinerUNet(3, levels, 2, 1, 2).double().eval()
    for parameter in unet.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return unet


@torch.no_grad()
@pytest.mark.parametrize("slab_size", [2, 6, 16])
def test_slabs_change_nothing(slab_size):
    """Of patches with an uneven number of slabs, two of them."""
    unet = random_unet()
    sample = torch.randn(2, 3, 16, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, widest = unet(sample), []
    for resnet in (resnet for block in unet.up_blocks for resnet in block.resnets):
        resnet.conv1.register_forward_hook(lambda module, inputs, output: widest.append(inputs[0].shape[2]))
    unet.slab_size = slab_size
    assert relative_error(unet(sample), expected) < 1e-12
    assert max(widest) <= slab_size + 2


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operators made and that live at the same time: now, and at most so far."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.live -= size


@torch.no_grad()
def test_few_volumes_live_at_a_time():
    """On the finest level of 2 channels: the input, three skips and three states, beside thin slabs."""
    torch.manual_seed(0)
    unet, sample = RefinerUNet(2, (2, 4), 2, 1, 2).eval(), torch.randn(1, 2, 64, 32, 32)
    peaks = {}
    for unet.slab_size in (None, 2):
        with PeakMemory() as memory:
            unet(sample)
        peaks[unet.slab_size] = memory.peak / sample.nbytes
    assert peaks[2] < 7 < peaks[None]


@torch.no_grad()
def test_blocks_that_are_loaded_by_hooks_are_called_whole(tmp_path):
    unet = random_unet((4, 8)).float()
    sample = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = unet(sample)
    unet.slab_size = 2
    apply_group_offloading(
        unet,
        torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    torch.testing.assert_close(unet(sample), expected)


def test_gradients_take_the_whole_volume():
    unet = random_unet((4, 8))
    unet.slab_size = 2
    sample = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64)
    unet(sample).sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


@torch.no_grad()
def test_statistics_of_slabs_are_those_of_the_volume():
    """Of slabs of several sizes, with a mean that is large beside the deviation."""
    volume = 50 + torch.randn(2, 6, 7, 3, 5)
    norm = GroupNormSiLU(3, 6)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    statistics = group_statistics(volume.split([4, 1, 2], dim=2), 3, norm.eps)
    torch.testing.assert_close(norm(volume[:, :, 2:5], statistics), norm(volume)[:, :, 2:5], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["refiner", "refiner_1024"])
def test_both_refiners(name):
    refiner = tiny_refiners()[name]
    channels = [1] if name == "refiner_1024" else [1, 4]
    patches = [torch.randn(1, c, 16, 16, 16, generator=torch.Generator().manual_seed(c)) for c in channels]
    expected = refiner(*patches).sample
    refiner.enable_tiling(4)
    assert refiner.unet.slab_size == 4
    tiled = refiner(*patches).sample
    assert 0 < relative_error(tiled, expected) < 1e-3
    refiner.disable_tiling()
    assert torch.equal(refiner(*patches).sample, expected)


@pytest.mark.parametrize("slab_size", [0, 3, -2])
def test_slabs_that_are_none(slab_size):
    with pytest.raises(ValueError, match="`slab_size` must be positive and even"):
        tiny_refiners()["refiner"].enable_tiling(slab_size)

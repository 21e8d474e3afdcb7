"""Numbers that depend on the coordinates: kernels are not compiled again for them, where that would be the same code.

Triton compiles a kernel anew for integers that are one and for multiples of 16, unless their parameter is among those
of `do_not_specialize`. No GPU is needed: arguments are bound and specialized as ever, and what would be compiled is
counted by the fake driver.
"""

import importlib
import inspect
import pkgutil

import pytest
import torch
import triton.language as tl
from triton.runtime import JITFunction

from diffusers_sparse3d import ops
from diffusers_sparse3d.ops import (
    coordinates,
    group_norm,
    head_norm,
    modulation,
    pooling,
    sparse_conv,
    spatial_sparse_attention,
)
from diffusers_sparse3d.ops.modulation import SampleRows
from diffusers_sparse3d.ops.packed_attention import operator as packed_attention
from diffusers_sparse3d.ops.runtime.launch import NUMBERS, Kernel, describe
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.arguments import HeadShape
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.choice_lists import cut_lists
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.compressed_attention import attend_and_select
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.compression_plan import CompressionPlan
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.list_starts import list_starts
from diffusers_sparse3d.ops.spatial_sparse_attention.kernels.tile_shapes import default_shapes
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from .kernel_testing import run_kernels_on_the_cpu, without_gpu
from .runtime.fake_driver import fake_driver  # noqa: F401 - a fixture
from .spatial_sparse_attention.cases import random_coords


# Numbers for which kernels are compiled anew, by their functions. What neighbouring threads load or store lies at
# multiples of most of them, or is masked by them: where 16 divides them, accesses are wider or registers fewer. A
# convolution of one part is simpler. Numbers of choices are multiples of 16 at the published sizes in any case.
SPECIALIZED = {
    "_convolve_kernel": {"num_rows", "num_parts"},
    "_find_kernel": {"num_rows", "num_lines"},
    "_list_numbers_kernel": {"num_choices"},
    "_list_starts_kernel": {"num_choices"},
    "_mask_kernel": {"num_rows"},
    "_neighbour_sum_kernel": {"num_rows"},
    "_pairs_kernel": {"num_rows"},
    "_tap_gradient_kernel": {"num_rows"},
    "_value_gradient_kernel": {"num_rows"},
    "_weight_gradient_kernel": {"num_rows"},
}


def all_kernels():
    """All kernels of the package, in the order of their modules."""
    names = [module.name for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    modules = [importlib.import_module(name) for name in sorted(names)]
    return list(
        {id(value): value for module in modules for value in vars(module).values() if type(value) is Kernel}.values()
    )


def jit_function(kernel):
    """A new `triton.jit` function of a kernel, even where `triton.jit` interprets."""
    function = kernel.function
    unspecialized = (
        function.do_not_specialize if isinstance(function, JITFunction) else function.kwargs["do_not_specialize"]
    )
    return JITFunction(function.fn, do_not_specialize=unspecialized)


def run_parameters(kernel):
    """The parameters that are no compile-time constants, each with whether its kernel is compiled anew for values."""
    parameters = inspect.signature(kernel.function.fn).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.annotation not in (tl.constexpr, "tl.constexpr")}
    return {one.name: not one.do_not_specialize for one in jit_function(kernel).params if one.name in names}


def test_kernels_are_found():
    names = {kernel.__name__ for kernel in all_kernels()}
    assert len(all_kernels()) >= 38 and SPECIALIZED.keys() <= names


@pytest.mark.parametrize("kernel", all_kernels(), ids=lambda kernel: f"{kernel.__module__.split('.')[-1]}")
def test_numbers_are_taken_as_they_come(kernel):
    parameters = run_parameters(kernel)
    numbers = {name for name in parameters if name.startswith("num_") or name in NUMBERS}
    assert {name for name in numbers if parameters[name]} == SPECIALIZED.get(kernel.__name__, set())
    # Strides, and what is a pointer, decide on the width of accesses.
    assert all(parameters[name] for name in parameters if name not in numbers)
    assert not any("stride" in name for name in numbers)


def run_operators(count):
    """All operators on the first voxels of a sample, forward and backward."""
    coords = random_coords([600], 16)[:count]
    cache = CoordinateCache(coords, 1)
    samples = SampleRows.of(cache)

    def leaf(*shape):
        return torch.zeros(shape, requires_grad=True)

    def differentiate(output, *leaves):
        torch.autograd.grad(output.sum(), leaves)

    coordinates.subdivide_neighbour_map(coordinates.neighbour_map(coords).zero_())
    feats, other, weight = leaf(count, 16), leaf(count, 16), leaf(16)
    # Wide layers go through lists of pairs and masks of offsets.
    for width in (16, 80):
        matrices, bias = leaf(27, 16, width), leaf(width)
        differentiate(sparse_conv.sparse_conv3d(feats, matrices, bias, cache), feats, matrices, bias)
    matrices = leaf(27, 16, 16)
    differentiate(sparse_conv.sparse_subdivide_conv3d(feats, matrices, weight, cache), feats, matrices, weight)
    differentiate(pooling.sparse_mean_pool(feats, cache, 2), feats)
    differentiate(group_norm.sparse_group_norm(feats, cache, 4, weight, weight), feats, weight)
    shift, scale, gate = leaf(1, 48).chunk(3, 1)
    differentiate(modulation.modulated_layer_norm(feats, shift, scale, samples), feats, shift, scale)
    differentiate(modulation.gated_sum(feats, other, gate, samples), feats, other, gate)
    heads = [leaf(count, 2, 16) for _ in range(3)]
    gamma = leaf(2, 16)
    differentiate(head_norm.head_rms_norm(heads[0], gamma), heads[0], gamma)
    boundaries = torch.tensor([0, count // 3, count], dtype=torch.int32)
    differentiate(packed_attention.packed_attention(*heads, boundaries, boundaries, 0.3), *heads)
    num_compressed = len(cache.downsample(2)[0].coords)
    rows = [(count, 4), (count, 2), (count, 2), (num_compressed, 2), (num_compressed, 2)]
    attended = [*(leaf(*shape, 16) for shape in rows), leaf(count, 3)]
    differentiate(spatial_sparse_attention.spatial_sparse_attention(*attended, cache, 2, 4, 8, 4, 2), *attended)


@without_gpu
def test_other_shapes_choose_blocks_by_the_same_kernels(monkeypatch):
    """What is compiled in for a choice does not depend on how many keys, slots, choices and lists there are."""
    kinds: dict[str, set] = {}
    counts: set[tuple[int, int]] = set()
    launch = Kernel._launch

    def note(kernel, grid, *arguments, **constants):
        if kernel.__name__ not in ("_forward_kernel", "_list_starts_kernel", "_pieces_kernel"):
            return launch(kernel, grid, *arguments, **constants)
        # Numbers that are taken as they come are parameters; those in aggregates are compiled for.
        parameters = run_parameters(kernel)
        told_apart = [one for name, one in zip(kernel.function.arg_names, arguments) if parameters.get(name, True)]
        described: list = [*constants.items()]
        assert describe(tuple(told_apart), described)
        kinds.setdefault(kernel.__name__, set()).add(tuple(described))

    monkeypatch.setattr(Kernel, "_launch", note)
    heads = HeadShape(2, 2, 16, 16)
    shape = default_shapes(heads, torch.float32).compressed_forward
    for count in (300, 530, 1300, 2500):
        cache = CoordinateCache(random_coords([count], 16), 1)
        compressed, _ = cache.downsample(2)
        plan = CompressionPlan.make(cache.partition(4), compressed, 2, heads, shape, torch.float32)
        counts.add((plan.most_slots % 16 == 0, -(-plan.most_keys // shape.keys) % 16 == 0))
        query, keys = torch.zeros(count, 4, 16), torch.zeros(plan.most_keys, 2, 16)
        attend_and_select(query, keys, keys, plan, 4, 0.3)
        starts = list_starts(torch.zeros(16 * count, dtype=torch.int32), count, 0)
        cut_lists(starts, 16 * count, 64)
    # Multiples of 16 among them, which would be told apart.
    assert {slots for slots, _ in counts} == {tiles for _, tiles in counts} == {False, True}
    assert {name: len(found) for name, found in kinds.items()} == dict.fromkeys(kinds, 1) and len(kinds) == 3


@without_gpu
def test_other_numbers_of_voxels_compile_nothing_again(fake_driver, monkeypatch):  # noqa: F811
    def compile_only(kernel, grid, *arguments, **constants):
        kernel.function.run(*arguments, grid=grid, warmup=True, enable_fp_fusion=True, **constants)

    run_kernels_on_the_cpu(monkeypatch)
    for kernel in all_kernels():
        monkeypatch.setattr(kernel, "function", jit_function(kernel))
    monkeypatch.setattr(Kernel, "_launch", compile_only)
    # Nothing is computed: what kernels would write is zero.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    compiled = []
    for count in (512, 513, 514, 528):
        before = len(fake_driver.compiled)
        run_operators(count)
        compiled.append(fake_driver.compiled[before:])
    first, second, *others = compiled
    assert len(first) >= 40
    # Once more for numbers that are no multiples of 16, and never again.
    assert set(second) == {
        "_find_kernel",
        "_pairs_kernel",
        "_mask_kernel",
        "_convolve_kernel",
        "_weight_gradient_kernel",
    }
    assert others == [[], []]

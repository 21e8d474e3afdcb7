"""Cases of Spatial Sparse Attention, their inputs, and comparisons of results."""

import torch
import torch.nn.functional as F

from diffusers_sparse3d.ops.spatial_sparse_attention import reference
from diffusers_sparse3d.sparse_tensor import CoordinateCache

from ..kernel_testing import DEVICE, NATIVE


# Factor of the sizes of cases, which are those for the interpreter.
GROWTH = 60 if NATIVE else 1
RESOLUTION = 32 if NATIVE else 9
# Blocks along an axis, at most, of cases in which all blocks are chosen.
BLOCKS_OF_AXIS = 4
DEFAULTS = {"m_cmp": 2, "m_slc": 4, "topk": 3, "window_size": 4, "shift": 2, "dim": 16}
CASES = {
    "groups": {"voxels": [13, 5], "heads": 6, "kv_heads": 2},
    "empty samples": {"voxels": [0, 14, 0, 3, 0], "heads": 4, "kv_heads": 1, "dim": 32},
    "single voxels": {"voxels": [1, 1, 9, 1], "heads": 2, "kv_heads": 2, "shift": 0},
    "wide group": {"voxels": [13], "heads": 32, "kv_heads": 1},
    "odd sizes": {"voxels": [15, 4], "heads": 5, "kv_heads": 1, "m_cmp": 3, "m_slc": 6, "window_size": 5, "dim": 24},
    "wide head": {"voxels": [12], "heads": 16, "kv_heads": 1, "dim": 48, "m_cmp": 4, "m_slc": 4},
    "fewer blocks than topk": {"voxels": [4, 12], "heads": 2, "kv_heads": 1, "topk": 64},
}
NATIVE_CASES = {
    "published": {"voxels": [40, 30], "heads": 32, "kv_heads": 2, "dim": 32, "m_cmp": 4, "m_slc": 8, "topk": 8},
    "head 128": {"voxels": [20, 15], "heads": 16, "kv_heads": 2, "dim": 128, "m_cmp": 4, "m_slc": 8, "topk": 8},
    "head 64": {"voxels": [40], "heads": 16, "kv_heads": 1, "dim": 64, "m_slc": 8, "window_size": 8, "shift": 4},
}
if NATIVE:
    CASES |= NATIVE_CASES


def random_coords(voxels_per_sample, resolution, seed=0):
    """Distinct voxels, rows of all samples shuffled."""
    generator = torch.Generator().manual_seed(seed)
    coords = []
    for sample, count in enumerate(voxels_per_sample):
        cells = torch.randperm(resolution**3, generator=generator)[:count]
        xyz = torch.stack([cells // resolution**2, cells // resolution % resolution, cells % resolution], 1)
        coords.append(torch.cat([torch.full((count, 1), sample), xyz], 1))
    coords = torch.cat(coords)
    return coords[torch.randperm(len(coords), generator=generator)].int()


def random_inputs(coords, batch_size, heads, kv_heads, dim, compression_block_size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cache = CoordinateCache(coords, batch_size)
    num_compressed = cache.downsample(compression_block_size)[0].coords.shape[0]
    shapes = [(len(coords), heads, dim), *[(len(coords), kv_heads, dim)] * 2, *[(num_compressed, kv_heads, dim)] * 2]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return cache, *tensors, torch.rand(len(coords), 3, generator=generator, dtype=dtype)


def make_case(name, dtype, **overrides):
    """The case's settings, its cache, and inputs in float64 with the values that they have in `dtype`."""
    case = DEFAULTS | CASES[name] | overrides
    voxels = [count if count == 1 else count * GROWTH for count in case["voxels"]]
    coords = random_coords(voxels, case.get("resolution", RESOLUTION)).to(DEVICE)
    _, *tensors = random_inputs(
        coords.cpu(), len(voxels), case["heads"], case["kv_heads"], case["dim"], case["m_cmp"], dtype=dtype, seed=1
    )
    return case, CoordinateCache(coords, len(voxels)), [tensor.to(DEVICE).double() for tensor in tensors]


def assert_same(function, expected_function, inputs, dtype):
    """Outputs and the gradients of all inputs, by the relative error that the design allows."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    results = []
    for attend, number_type in ((function, dtype), (expected_function, torch.float64)):
        leaves = [tensor.to(number_type).requires_grad_() for tensor in inputs]
        output = attend(*leaves)
        assert output.dtype == number_type
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(output.shape, generator=generator).to(dtype).to(output)
        results.append((output, *torch.autograd.grad(output, leaves, weights)))
    # Gradients of scores are zero where there is one key; what rounding leaves of them is measured otherwise.
    smallest = 0.1 * weights.double().norm()
    for number, (found, expected) in enumerate(zip(*results)):
        assert found.shape == expected.shape
        assert found.dtype == dtype
        error = (found.double() - expected).norm() / torch.maximum(expected.norm(), smallest)
        assert error < tolerance, f"{'output' if number == 0 else f'gradient {number - 1}'}: {error:.2e}"


def some_blocks(case, cache, query, compressed_key):
    return reference.select_blocks(query, compressed_key, cache, case["m_cmp"], case["m_slc"], case["topk"])


def block_scores(query, compressed_key, cache, m_cmp, m_slc, scale):
    """`[N, H_kv, blocks]` float64, -1 for blocks of other samples."""
    compressed, _ = cache.downsample(m_cmp)
    blocks, block_of_compressed = compressed.downsample(m_slc // m_cmp)
    scores = torch.einsum("nhgd,mhd->nhgm", query.unflatten(1, (compressed_key.shape[1], -1)), compressed_key) * scale
    other = cache.coords[:, :1] != compressed.coords[:, 0]
    probabilities = scores.masked_fill_(other[:, None, None], float("-inf")).softmax(-1).sum(2)
    result = probabilities.new_zeros(*probabilities.shape[:2], len(blocks.coords))
    result.index_add_(2, block_of_compressed, probabilities)
    return result.masked_fill_((cache.coords[:, :1] != blocks.coords[:, 0])[:, None], -1)


def check_blocks(blocks, case, cache, query, compressed_key, scale, dtype, factor=1):
    scores = block_scores(query, compressed_key, cache, case["m_cmp"], case["m_slc"], scale)
    best = scores.topk(min(case["topk"], max(cache.partition(case["m_slc"]).blocks_per_sample)), -1).values
    assert blocks.shape == best.shape
    assert ((blocks >= 0) == (best >= 0)).all()
    # Ties, or what rounding makes of them, may be decided differently: the scores of the chosen blocks are the best.
    found = F.pad(scores, (0, 1), value=-1.0).gather(2, torch.where(blocks >= 0, blocks, scores.shape[2]))
    # In half precision, weights and their sums are rounded, for each of the two scores.
    tolerance = {torch.float32: 1e-5 * factor, torch.float16: 4 * 2**-12, torch.bfloat16: 4 * 2**-9}[dtype]
    torch.testing.assert_close(found, best, rtol=tolerance, atol=tolerance * 1e-2)
    ordered = blocks.sort(-1).values
    assert ((ordered[..., 1:] != ordered[..., :-1]) | (ordered[..., 1:] < 0)).all()


def settings_of(case):
    return case["m_cmp"], case["m_slc"], case["topk"], case["window_size"], case["shift"]

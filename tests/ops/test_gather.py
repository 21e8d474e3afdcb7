"""Gathers of rows against indexing."""

import pytest
import torch

from diffusers_sparse3d.ops.gather import gather_rows, permute_rows, take_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16, 33])
@pytest.mark.parametrize("rows", [0, 7])
def test_same_rows(dtype, channels, rows):
    feats = torch.randn(5, channels).to(dtype)
    index = torch.randint(5, (rows,))
    expected = feats[index]
    assert torch.equal(take_rows(feats, index), expected)
    assert torch.equal(take_rows(feats, index.int()), expected)
    assert torch.equal(gather_rows(feats, index), expected)
    assert torch.equal(gather_rows(feats, index, out=torch.empty_like(expected)), expected)


def test_rows_of_matrices():
    feats, index = torch.randn(5, 2, 3), torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(gather_rows(feats, index), feats[index])
    # As on a GPU.
    rows = feats.view(5, feats.shape[1:].numel())
    assert torch.equal(take_rows(rows, index.flatten()).unflatten(1, feats.shape[1:]), feats[index.flatten()])


def test_permuted_rows():
    rows = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    inverse = order.argsort()
    assert torch.equal(permute_rows(rows, order, inverse), rows[order])
    assert torch.autograd.gradcheck(permute_rows, (rows, order, inverse))
    assert torch.autograd.gradgradcheck(permute_rows, (rows, order, inverse))
    output = permute_rows(rows, order, inverse)
    assert "Permuted" in output.grad_fn.name()
    with torch.no_grad():
        assert permute_rows(rows, order, inverse).grad_fn is None
    compiled = torch.compile(permute_rows, backend="aot_eager", fullgraph=True)
    for result in (compiled(rows, order, inverse), output):
        (gradient,) = torch.autograd.grad(result.square().sum(), rows)
        torch.testing.assert_close(gradient, 2 * rows.detach())


def test_permuted_rows_in_functional_gradients():
    rows, order = torch.randn(5, 3), torch.tensor([3, 0, 4, 1, 2])
    gradient = torch.func.grad(lambda rows: permute_rows(rows, order, order.argsort()).square().sum())(rows)
    torch.testing.assert_close(gradient, 2 * rows)

"""Results of operators that a checkpoint keeps are not computed again, and gradients stay what they are."""

import weakref

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from diffusers_sparse3d.ops.runtime.kept_results import KeptResults
from diffusers_sparse3d.ops.runtime.operators import operator


calls = []


def make_operator(name, kept):
    @operator(
        f"diffusers_sparse3d_test::{name}",
        kept_by_checkpoints=kept,
        mutates_args=(),
        schema="(Tensor tensor) -> (Tensor, Tensor[])",
    )
    def squared(tensor):
        """The square, and the sine for the backward pass, which must not be mistaken for a result with gradients."""
        calls.append(name)
        return tensor * tensor, [tensor.sin()]

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output[1])
        ctx.mark_non_differentiable(*output[1])
        ctx.set_materialize_grads(False)

    def gradients(ctx, gradient, _):
        tensor, sine = ctx.saved_tensors
        torch.testing.assert_close(sine, tensor.sin())
        return 2 * tensor * gradient

    squared.register_autograd(gradients, setup_context=keep)
    return squared


kept, computed = make_operator("kept", True), make_operator("computed", False)


def block(tensor):
    """Two results of one operator, that differ: in another order, gradients would be others."""
    return kept(computed(kept(tensor)[0] + 1)[0].exp())[0]


@pytest.fixture
def leaf():
    calls.clear()
    return torch.linspace(-0.3, 0.4, 5, dtype=torch.float64, requires_grad=True)


def test_kept_results_are_computed_once(leaf):
    expected = torch.autograd.grad(block(leaf).sum(), leaf)[0]
    calls.clear()
    output = checkpoint(block, leaf, use_reentrant=False, context_fn=KeptResults().contexts)
    assert calls == ["kept", "computed", "kept"]
    # A second backward pass computes the block a third time.
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(output.sum(), leaf, retain_graph=True)[0], expected)
    assert calls == ["kept", "computed", "kept", "computed", "computed"]
    # Outside of checkpoints, and in those that keep nothing, all is as ever.
    torch.autograd.grad(checkpoint(block, leaf, use_reentrant=False).sum(), leaf)
    assert calls[5:] == ["kept", "computed", "kept"] * 2


def test_kept_results_hold_no_graph_and_are_gone_with_it(leaf):
    """Otherwise the memory of a block would be held in a circle that nothing ends."""
    results = KeptResults()
    reference = weakref.ref(results)
    output = checkpoint(block, leaf, use_reentrant=False, context_fn=results.contexts).sum()
    output.backward(retain_graph=True)
    tensors = tree_leaves([kept_result for _, kept_result in results._results])
    assert len(tensors) == 4 and not any(tensor.requires_grad for tensor in tensors)
    del results, tensors
    assert reference() is not None
    output.backward()
    del output
    assert reference() is None


def test_checkpoints_in_a_checkpoint(leaf):
    def outer(tensor):
        inner = checkpoint(block, tensor, use_reentrant=False, context_fn=KeptResults().contexts)
        return block(inner.sigmoid())

    expected = torch.autograd.grad(outer(leaf).sum(), leaf)[0]
    output = checkpoint(outer, leaf, use_reentrant=False, context_fn=KeptResults().contexts)
    assert torch.equal(torch.autograd.grad(output.sum(), leaf)[0], expected)


def test_another_operator_in_the_second_pass_is_an_error(leaf):
    results = KeptResults()
    keeping, taking = results.contexts()
    with keeping:
        kept(leaf)
    assert len(results) == 1
    with taking, pytest.raises(RuntimeError, match="the same operators"):
        other(leaf)
    with taking:
        kept(leaf)
        with pytest.raises(RuntimeError, match="where there was none"):
            kept(leaf)


other = make_operator("other", True)

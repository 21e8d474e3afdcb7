import pytest
import torch

from diffusers_sparse3d.ops.runtime.operators import operator


@operator("diffusers_sparse3d_test::weighted_sum", mutates_args=(), schema="(Tensor first, Tensor[] others) -> Tensor")
def weighted_sum(first, others):
    return sum(((number + 2) * other for number, other in enumerate(others)), start=first)


@weighted_sum.register_fake
def _(first, others):
    return torch.empty_like(first)


def keep(ctx, inputs, output):
    ctx.count = len(inputs[1])


def gradients(ctx, gradient):
    # Not those of the function, to be told from what autograd would find.
    return 10 * gradient, [None] * ctx.count


weighted_sum.register_autograd(gradients, setup_context=keep)


@operator("diffusers_sparse3d_test::doubled", mutates_args=(), schema="(Tensor tensor) -> Tensor")
def doubled(tensor):
    return 2 * tensor


@doubled.register_fake
def _(tensor):
    return torch.empty_like(tensor)


@pytest.fixture
def tensors():
    return torch.ones(3, requires_grad=True), [torch.ones(3), torch.ones(3)]


def run(first, others):
    return weighted_sum(first, others)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_that_were_registered(tensors, compiled):
    function = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    output = function(*tensors)
    assert output.tolist() == [6, 6, 6]
    assert torch.autograd.grad(output.sum(), tensors[0])[0].tolist() == [10, 10, 10]


def test_without_gradients(tensors):
    with torch.no_grad():
        assert not weighted_sum(*tensors).requires_grad
    result = doubled(tensors[0])
    assert result.tolist() == [2, 2, 2] and not result.requires_grad


def test_is_registered_right(tensors):
    torch.library.opcheck(weighted_sum.registered, tensors)
    torch.library.opcheck(doubled.registered, (tensors[0].detach(),))


def test_is_one_operator_in_a_graph(tensors):
    graph = torch.fx.experimental.proxy_tensor.make_fx(run, tracing_mode="fake")(tensors[0].detach(), tensors[1])
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.diffusers_sparse3d_test.weighted_sum.default]

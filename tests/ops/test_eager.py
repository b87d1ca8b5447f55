"""Operators called past the dispatcher: the same bits, and the operator itself wherever somebody looks on."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_n2uq.backbones import resnet20
from lightning_n2uq.ops import eager, quantize_weight, threshold_quantize
from lightning_n2uq.ops.threshold import _threshold_quantize
from seen_operators import SeenOperators


class Wrapped(torch.Tensor):
    """A subclass, as tracers and sharded tensors are."""


def parameters(bits=2):
    n = 2**bits - 1
    values = torch.tensor(0.1), torch.full((n,), 2.0 / n), torch.tensor(0.9), torch.tensor(1.2)
    return [value.requires_grad_() for value in values]


def gradients(function, x, weights):
    y = function(x, *weights)
    return [y, *torch.autograd.grad(y, [x, *weights], torch.linspace(-1, 1, y.numel()).view_as(y))]


def test_values_and_gradients_are_those_of_the_operator():
    x = torch.randn(4, 5, requires_grad=True)
    direct = gradients(threshold_quantize, x, parameters())
    operator = gradients(lambda x, *q: _threshold_quantize(x, *q, 0.0), x, parameters())
    for one, two in zip(direct, operator, strict=True):
        assert torch.equal(one, two)


def test_a_network_trains_to_the_same_gradients_either_way(monkeypatch):
    images = torch.randn(2, 3, 32, 32)

    def run():
        torch.manual_seed(0)
        model = resnet20(2, 2, width=4, num_classes=3).train()
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 2]))
        loss.backward()
        return [loss, *(p.grad for p in model.parameters()), *model.buffers()]

    direct = run()
    monkeypatch.setattr(eager, "watched", lambda inputs: True)
    for one, two in zip(direct, run(), strict=True):
        assert torch.equal(one, two)


def test_the_dispatcher_is_asked_where_a_mode_looks_on():
    x = torch.randn(8)
    with SeenOperators() as seen:
        threshold_quantize(x, *parameters())
        quantize_weight(torch.randn(2, 3), 2)
    assert {"threshold_quantize", "quantize_weight"} <= seen.names


def test_tracers_see_the_operator():
    graph = make_fx(lambda x: threshold_quantize(x, *(p.detach() for p in parameters())))(torch.randn(8))
    assert any("threshold_quantize" in str(node.target) for node in graph.graph.nodes)


def test_subclasses_reach_the_operator():
    plain, wrapped = torch.randn(3), torch.randn(3).as_subclass(Wrapped)
    assert not eager.watched((plain, nn.Parameter(plain), 3, None))
    assert eager.watched((plain, wrapped))


def test_plain_calls_pass_by_the_dispatcher(monkeypatch):
    def refuse(*inputs):
        raise AssertionError("the dispatcher was asked")

    monkeypatch.setattr(_threshold_quantize, "_opoverload", refuse)
    x = torch.randn(8, requires_grad=True)
    threshold_quantize(x, *parameters()).sum().backward()
    assert x.grad is not None


def test_second_derivatives_are_refused_not_wrong():
    x = torch.randn(8, requires_grad=True)
    (grad,) = torch.autograd.grad(threshold_quantize(x, *parameters()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), x)


def test_unused_outputs_and_inputs_without_gradient():
    x = torch.randn(8)
    weights = parameters()
    (grad,) = torch.autograd.grad(threshold_quantize(x, *weights).sum(), weights[3])
    assert torch.isfinite(grad).all()

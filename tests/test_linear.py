"""Linear layers by oneDNN: the numbers and gradients of PyTorch's own, and nothing of the model changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from textrl_gym.models import onednn, tiny


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it is faster, and for products of any size."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "LEAST_PRODUCT", 0)


SHAPES = [(7, 12), (3, 5, 12), (2, 3, 4, 12), (12,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_numbers_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 20)
    found = []
    for module in (layer, None):
        y = layer(x) if module is None else onednn.linear(layer, x)
        grads = torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])
        found.append([y.detach(), *grads])
    assert "_LinearBackward" in type(onednn.linear(layer, x).grad_fn).__name__
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_inputs_and_gradients_that_are_not_contiguous() -> None:
    layer = nn.Linear(12, 20)
    x = torch.randn(12, 9).t().requires_grad_()
    y = onednn.linear(layer, x)
    torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=0)
    y.sum().backward()  # its gradient is one number, expanded
    assert x.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(9, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.bias.grad, torch.full((20,), 9.0), atol=0, rtol=0)


def test_model_is_as_before_after_an_error() -> None:
    model = tiny.llama(32, width=32, layers=1)
    linears = onednn.layers(model)
    assert len(linears) == 8  # query, key, value, output, gate, up, down, head
    with onednn.fast(linears):
        with onednn.fast(linears):
            pass
        assert all("forward" in module.__dict__ for module in linears), "an inner use must leave the outer one be"
    with pytest.raises(IndexError), onednn.fast(linears):
        model(input_ids=torch.tensor([[99]]))
    assert not any("forward" in module.__dict__ for module in linears)


def test_other_types_go_the_usual_way() -> None:
    layer, x = nn.Linear(12, 20).double(), torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(onednn.linear(layer, x), layer(x))
    single = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(single, x.float()).dtype == torch.bfloat16


def test_a_subclass_is_left_alone() -> None:
    class Quantised(nn.Linear):
        pass

    assert onednn.layers(nn.Sequential(Quantised(2, 2), nn.Linear(2, 2))) != []
    assert onednn.layers(Quantised(2, 2)) == []


def test_second_gradients_where_they_are_asked_for() -> None:
    layer, x = nn.Linear(12, 20), torch.randn(3, 12)

    def curvature() -> torch.Tensor:
        with onednn.fast([layer]):
            (grad_OI,) = torch.autograd.grad((layer(x) ** 3).sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(grad_OI.sum(), layer.weight)[0]

    with pytest.raises(RuntimeError, match="differentia"):
        curvature()
    with onednn.twice_differentiable():
        # d2/dw2 of y^3 with y = w x + b, summed over a row's inputs: 6 y x (sum of x)
        y_NO = layer(x).detach()
        expected = torch.einsum("no,ni,n->oi", 6 * y_NO, x, x.sum(1))
        torch.testing.assert_close(curvature(), expected, atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="differentia"):
        curvature()

"""Linear layers by oneDNN: the numbers and gradients of PyTorch's own, and nothing of the model changed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from textrl_gym.models import loading, lora, onednn, tiny
from textrl_gym.policy.backbone import Trunk


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


def is_fast(model: nn.Module) -> bool:
    """Whether the model's passes go by oneDNN."""
    return "_LinearBackward" in type(model.lm_head(torch.randn(3, 32)).grad_fn).__name__  # type: ignore[operator]


def test_layers_change_once_and_are_fast_in_passes_only() -> None:
    model, ids_BL = tiny.llama(32, width=32, layers=1), torch.arange(10)[None]
    parameters, keys = {id(p) for p in model.parameters()}, list(model.state_dict())
    before = model(input_ids=ids_BL).logits
    for _ in range(2):
        onednn.prepare_(model)
    changed = [module for module in model.modules() if isinstance(module, onednn.OneDNNLinear)]
    assert len(changed) == 8  # query, key, value, output, gate, up, down, head
    assert {id(p) for p in model.parameters()} == parameters and list(model.state_dict()) == keys
    assert torch.equal(model(input_ids=ids_BL).logits, before)  # outside a pass the products are PyTorch's
    assert not is_fast(model)
    with onednn.fast():
        with onednn.fast():
            assert is_fast(model)
        assert is_fast(model), "the end of an inner use must leave the outer one be"
        torch.testing.assert_close(model(input_ids=ids_BL).logits, before, atol=1e-5, rtol=0)
    with pytest.raises(IndexError), onednn.fast():
        model(input_ids=torch.tensor([[99]]))
    assert not is_fast(model)


def test_changed_models_are_copied_saved_and_adapted_as_others(tmp_path: Path) -> None:
    model, ids_BL = tiny.llama(32, width=32, layers=1), torch.arange(10)[None]
    Trunk(model)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    loaded = loading.load_model(tmp_path)
    assert type(loaded.lm_head) is nn.Linear  # a folder does not say who has used the model
    before = model(input_ids=ids_BL).logits
    for other in (copied, loaded):
        assert torch.equal(other(input_ids=ids_BL).logits, before)
    with onednn.fast():
        assert is_fast(copied)
    pytest.importorskip("peft")
    adapted = lora.add_lora(model, rank=2, alpha=4, seed=0)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 14 and all(".lora_" in name for name in trained)  # A and B of 7 layers, not of the head
    trunk = Trunk(adapted)
    with trunk.running():
        hidden_BLD = trunk.body(input_ids=ids_BL)[0]
        assert "_LinearBackward" in _functions(hidden_BLD)
    torch.testing.assert_close(trunk.logits(hidden_BLD[0])[None], before, atol=1e-5, rtol=0)  # B is 0


def _functions(tensor: torch.Tensor) -> set[str]:
    """Names of the autograd functions that a tensor came from."""
    found, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {node.name().split(".")[-1] for node in found}


def test_other_types_go_the_usual_way() -> None:
    layer, x = nn.Linear(12, 20).double(), torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(onednn.linear(layer, x), layer(x))
    single = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(single, x.float()).dtype == torch.bfloat16


def test_a_subclass_is_left_alone() -> None:
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(Quantised(2, 2), nn.Linear(2, 2))
    onednn.prepare_(model)
    assert [type(layer) for layer in model] == [Quantised, onednn.OneDNNLinear]


def test_second_gradients_where_they_are_asked_for() -> None:
    layer, x = nn.Linear(12, 20), torch.randn(3, 12)
    onednn.prepare_(layer)

    def curvature() -> torch.Tensor:
        with onednn.fast():
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

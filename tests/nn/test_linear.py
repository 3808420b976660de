"""Products by either library are the same linear map, with the same gradients."""

import copy

import pytest
import torch

from mmssl.nn.linear import Linear, product


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_map_and_its_gradients_are_torchs(shape, bias):
    torch.manual_seed(0)
    ours = Linear(12, 6, bias=bias)
    theirs = torch.nn.Linear(12, 6, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2))
    weight = torch.randn(6)
    for layer, given in ((ours, x), (theirs, y)):
        (layer(given).tanh() @ weight).sum().backward()
    assert torch.allclose(ours(x), theirs(y), atol=1e-6)
    assert torch.allclose(x.grad, y.grad, atol=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_inputs_that_are_views_are_read_as_they_lie():
    torch.manual_seed(0)
    layer = Linear(12, 6)
    wide = torch.randn(5, 24)
    for view in (wide[:, ::2], wide[:, 6:18], torch.randn(12, 5).t(), torch.randn(1, 12).expand(5, 12)):
        assert torch.allclose(layer(view), torch.nn.functional.linear(view, layer.weight, layer.bias), atol=1e-6)


def test_a_gradient_that_is_one_number_for_all_is_read_as_it_lies():
    torch.manual_seed(0)
    layer, x = Linear(12, 6), torch.randn(5, 12, requires_grad=True)
    layer(x).sum().backward()  # an expanded gradient
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(5, 12), atol=1e-6)
    assert torch.allclose(layer.weight.grad, x.detach().sum(0).expand(6, 12), atol=1e-6)


def test_no_row_is_no_row():
    assert Linear(12, 6)(torch.zeros(0, 12)).shape == (0, 6)


def test_frozen_weights_and_inputs_get_no_gradient():
    layer = Linear(12, 6).requires_grad_(False)
    x = torch.randn(5, 12, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_a_product(dtype):
    a, b = torch.randn(5, 12, dtype=dtype), torch.randn(7, 12, dtype=dtype)
    assert torch.allclose(product(a, b), a @ b.t(), atol=1e-5)
    assert torch.allclose(product(a.t().contiguous().t(), b), a @ b.t(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_weight_is_the_same_map(dtype):
    torch.manual_seed(0)
    layer, x = Linear(24, 40).to(dtype).requires_grad_(False), torch.randn(2, 5, 24)
    before = layer(x.to(dtype))
    names = set(layer.state_dict())
    layer.pack()
    assert layer._packed is not None
    assert torch.allclose(layer(x.to(dtype)).float(), before.float(), rtol=1e-6 if dtype is torch.float32 else 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert set(layer.state_dict()) == names
    assert torch.equal(copy.deepcopy(layer)(x.to(dtype)), before)


def test_a_layer_made_for_inference_is_not_packed():
    with torch.inference_mode():
        layer = Linear(24, 40).requires_grad_(False)
        layer.pack()
        assert layer(torch.randn(5, 24)).shape == (5, 40)


def test_gradients_reach_the_input_and_the_bias_of_a_packed_layer():
    torch.manual_seed(0)
    layer, x = Linear(24, 40).requires_grad_(False), torch.randn(5, 24, requires_grad=True)
    layer.bias.requires_grad_()
    layer.pack()
    assert layer._packed is not None
    layer(x).sum().backward()
    assert layer.bias.grad.tolist() == [5.0] * 40
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(5, 24), atol=1e-5)


@pytest.mark.parametrize("change", ["in place", "loaded", "assigned", "exchanged", "called", "trained", "moved"])
def test_a_weight_that_changed_is_not_read_as_it_was_packed(change):
    torch.manual_seed(0)
    layer, x = Linear(24, 40).requires_grad_(False), torch.randn(5, 24)
    layer.pack()
    assert layer._packed is not None
    if change == "in place":
        with torch.no_grad():
            layer.weight.mul_(2)
    elif change == "loaded":
        layer.load_state_dict(Linear(24, 40).state_dict())
    elif change == "assigned":
        layer.load_state_dict(Linear(24, 40).state_dict(), assign=True)
        layer.requires_grad_(False)
    elif change == "exchanged":
        layer.weight = Linear(24, 40).requires_grad_(False).weight
    elif change == "called":
        others = dict(Linear(24, 40).requires_grad_(False).named_parameters())
        with torch.no_grad():
            expected = torch.nn.functional.linear(x, **others)
            assert torch.allclose(torch.func.functional_call(layer, others, (x,)), expected, atol=1e-6)
    elif change == "trained":
        optimizer = torch.optim.AdamW(layer.requires_grad_().parameters(), lr=0.1, fused=True)
        layer(x).sum().backward()
        optimizer.step()
        layer.requires_grad_(False)
    else:
        layer.double()
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
        assert torch.allclose(layer(x.to(layer.weight.dtype)), expected, atol=1e-6)

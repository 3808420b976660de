"""Products by either library are the same linear map, with the same gradients."""

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

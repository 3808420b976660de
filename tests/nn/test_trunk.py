"""One trunk in several Transformers: which parts are one memory, and that nothing else changes."""

import pytest
import torch

from mmssl.nn.transformer import Transformer
from mmssl.nn.trunk import twin, upper

DIM, DEPTH = 16, 3


def trunk(**settings):
    torch.manual_seed(0)
    return Transformer(**{"dim": DIM, "depth": DEPTH, "heads": 2, **settings})


def size(*modules):
    return sum(p.numel() for p in torch.nn.ModuleList(modules).parameters())


def rows():
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1))


# 12 D^2 of four matrices and 9 D of their biases, and two norms of 2 D each
BLOCK, NORM = 12 * DIM**2 + 9 * DIM, 2 * DIM


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, 0),
        ({"own_blocks": 2}, 2 * (BLOCK + 2 * NORM)),
        ({"own_norms": True}, (2 * DEPTH + 1) * NORM),
        ({"own_blocks": 2, "own_norms": True}, 2 * (BLOCK + 2 * NORM) + 3 * NORM),
    ],
)
def test_a_twin_adds_what_is_its_own_and_no_more(settings, more):
    one = trunk()
    assert size(one) == DEPTH * (BLOCK + 2 * NORM) + NORM
    other = twin(one, **settings)
    assert size(one, other) == size(one) + more
    assert size(other) == size(one)
    # two more add it twice
    assert size(one, other, twin(one, **settings)) == size(one) + 2 * more


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_twin_with_the_same_weights_computes_the_same(norm):
    one = trunk(norm=norm)
    other = twin(one, own_blocks=1, own_norms=True)
    x, lengths = rows(), torch.tensor([5, 3])
    for ours, theirs in zip(*(body(x, lengths, layers=[0, 2])[1].values() for body in (one, other)), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(one(x, lengths)[0], other(x, lengths)[0])
    assert one.state_dict().keys() == other.state_dict().keys()


def test_a_gradient_reaches_what_is_shared_and_the_own_parts_of_its_modality_alone():
    one = trunk()
    other = twin(one, own_blocks=1, own_norms=True)
    other(rows())[0].square().sum().backward()
    for name, parameter in one.named_parameters():
        shared = name.startswith(("blocks.1.", "blocks.2.")) and "norm" not in name
        assert (parameter.grad is not None) == shared, name
    assert all(p.grad is not None for p in other.parameters())


def test_the_gradient_of_a_shared_part_is_the_sum_over_those_that_hold_it():
    one = trunk()
    other, x, y = twin(one, own_blocks=2), rows(), 2 * rows()
    shared = one.blocks[2].attention.qkv.weight
    found = []
    for losses in ([one(x)], [other(y)], [one(x), other(y)]):
        loss = sum(out.sin().sum() for out, _ in losses)
        found.append(torch.autograd.grad(loss, shared)[0])
    assert torch.allclose(found[0] + found[1], found[2], atol=1e-5)


@pytest.mark.parametrize("own_norms", [False, True])
@pytest.mark.parametrize("settings", [{}, {"norm": "post"}, {"input_norm": True}, {"dropout": 0.9}])
def test_what_lies_above_goes_on_where_the_own_blocks_end(settings, own_norms):
    one = trunk(**settings)
    two = twin(one, own_blocks=1, own_norms=own_norms)
    above = upper(two, first=1, own_norms=own_norms)
    assert above.depth == len(above.blocks) == 2
    # the input of the trunk is dropped out, and that of what lies above is not once more
    two.eval()
    whole, layers = two(rows(), layers=[1])
    assert above.dropout == 0
    assert torch.allclose(above.eval()(layers[1])[0], whole, atol=1e-6)
    # the norms of two blocks and, where there is one, that of the end
    norms = (4 + (settings.get("norm") != "post")) * NORM if own_norms else 0
    assert size(one, two, above) - size(one, two) == norms


def test_a_trunk_of_no_blocks_is_refused():
    with pytest.raises(ValueError, match=r"backbone.own_blocks=3: must be from 0 to 2, .* or backbone=separate"):
        twin(trunk(), own_blocks=3)
    with pytest.raises(ValueError, match="transformer.bias: tokens of several modalities have no places relative"):
        upper(trunk(bias={"name": "buckets", "buckets": 8}), first=1, own_norms=True)

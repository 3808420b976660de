import math

import pytest
import torch

from mmssl.nn.layer_weights import LayerWeights
from mmssl.types import Encoded


def test_layers_are_summed_by_the_softmax_of_their_scores() -> None:
    weights, x = LayerWeights(2), torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert weights(x).tolist() == [[2.0, 4.0]]  # equal at first
    with torch.no_grad():
        weights.scores[1] = math.log(3)
    assert weights(x)[0].tolist() == pytest.approx([2.5, 5.0])


def test_the_sum_stands_in_the_place_of_the_output_in_float32_under_bfloat16() -> None:
    layers = {1: torch.tensor([[[1.0, 3.001]]]), 0: torch.tensor([[[0.0, 1.0]]])}
    encoded = Encoded(torch.full((1, 1, 2), 9.0), torch.tensor([1]), layers, n_prefix=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LayerWeights(2).output(encoded)
    assert found.x.dtype == torch.float32
    assert found.x.flatten().tolist() == pytest.approx([0.5, 2.0005], rel=1e-6)
    assert found.lengths is encoded.lengths

"""One learned weight for each layer of an encoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mmssl.types import Encoded


class LayerWeights(nn.Module):
    """One number a layer, whose softmax is its weight: (..., layers, D) -> (..., D). All weights are equal at first.

    Source: Peters et al. 2018 (ELMo, arXiv:1802.05365), section 3.2, equation 1, without its scale; Yang et al. 2021
    (SUPERB, arXiv:2105.01051), section 3.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(layers))

    @property
    def weights(self) -> Tensor:
        return self.scores.softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("l,...ld->...d", self.weights, x)

    def output(self, encoded: Encoded) -> Encoded:
        """The same with the sum of all its layers for output, float32: they are as the blocks gave them."""
        with torch.autocast(encoded.x.device.type, enabled=False):
            layers = [encoded.layers[i].float() for i in range(len(self.scores))]
            return replace(encoded, x=self(torch.stack(layers, -2)))

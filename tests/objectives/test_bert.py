"""Hidden codes are predicted from the others, each codebook's by itself."""

import math
from dataclasses import replace

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.codes.frontend import Codes
from mmssl.nn.masking import span_mask
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.nn.units import CodeHead
from mmssl.objectives.bert import BERT
from mmssl.types import Batch, Raw

LENGTHS = [40, 25]


def build(**settings: float) -> BERT:
    torch.manual_seed(0)
    frontend = Codes(dim=16, codes=[5, 3], rate=50)
    encoder = Encoder(frontend, Transformer(dim=16, depth=1, heads=2), SinCos(16), mask_token=True)
    return BERT(encoder, mask_span=4, **settings)  # type: ignore[arg-type]


def clips() -> Batch:
    torch.manual_seed(1)
    data = torch.stack([torch.randint(0, codes, (2, 40)) for codes in (5, 3)], 1)
    return Batch({"codes": Raw(data, torch.tensor(LENGTHS), ["a", "b"], 50.0)}, torch.arange(2))


def hidden(batch: Batch, prob: float = 0.5) -> torch.Tensor:
    return span_mask(torch.tensor(LENGTHS), prob=prob, span=4, min_spans=1, seeds=batch.seeds).masked


def test_guessing_costs_the_logarithm_of_both_codebooks_at_each_hidden_step() -> None:
    objective, batch = build(), clips()
    torch.nn.init.zeros_(objective.head.out.weight)
    loss = objective(batch)
    count = int(hidden(batch).sum())
    assert loss.count == count
    assert loss.total.item() == pytest.approx(count * (math.log(5) + math.log(3)), rel=1e-5)
    assert loss.metrics["hidden"] == (count, sum(LENGTHS))


def test_the_loss_is_of_the_codes_that_stood_at_hidden_steps() -> None:
    """A head that always says code 2, then 1, with a probability each, whatever it reads."""
    objective, batch = build(), clips()
    torch.nn.init.zeros_(objective.head.out.weight)
    with torch.no_grad():
        objective.head.out.bias.copy_(torch.tensor([0.0, 0.0, math.log(4.0), 0.0, 0.0, 0.0, math.log(2.0), 0.0]))
    masked = hidden(batch)
    first, second = batch.raw.data.transpose(0, 1)
    right, also = int((first[masked] == 2).sum()), int((second[masked] == 1).sum())
    count = int(masked.sum())
    expected = -(right * math.log(4 / 8) + (count - right) * math.log(1 / 8))
    expected -= also * math.log(2 / 4) + (count - also) * math.log(1 / 4)
    loss = objective(batch)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert float(loss.metrics["accuracy"][0]) == right
    assert float(loss.metrics["codes_1_accuracy"][0]) == also


def test_predictions_see_no_hidden_code_and_every_other_one() -> None:
    objective, batch = build(), clips()
    objective.eval()
    masked = hidden(batch)
    read: list[torch.Tensor] = []
    objective.head.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    with torch.no_grad():
        objective(batch)
        for step in range(40):
            data = batch.raw.data.clone()
            data[0, 0, step] = (data[0, 0, step] + 1) % 5
            objective(replace(batch, inputs={"codes": replace(batch.raw, data=data)}))
            assert torch.equal(read[-1], read[0]) == bool(masked[0, step])


def test_the_head_has_the_logits_of_each_codebook_apart() -> None:
    torch.manual_seed(0)
    head, x = CodeHead(6, [5, 3]), torch.randn(4, 6)
    h = torch.nn.functional.gelu(x @ head.dense.weight.t() + head.dense.bias)
    whole = torch.nn.functional.layer_norm(h, (6,)) @ head.out.weight.t() + head.out.bias
    first, second = head(x)
    torch.testing.assert_close(first, whole[:, :5])
    torch.testing.assert_close(second, whole[:, 5:])


def test_an_encoder_without_a_mask_token_is_refused() -> None:
    encoder = Encoder(Codes(dim=16, codes=[5], rate=50), Transformer(dim=16, depth=1, heads=2), SinCos(16))
    with pytest.raises(ValueError, match="encoder.mask_token=false: BERT replaces hidden tokens"):
        BERT(encoder)

import math
from typing import Any

import pytest
import torch
from torch import nn

from mmssl.encoder import Encoder
from mmssl.modalities import MODALITIES
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import POSITIONS
from mmssl.nn.transformer import Transformer
from mmssl.objectives.classify import Classify
from mmssl.training.optimizer import build_optimizer, decays, layer_id
from mmssl.types import Raw


class Part(nn.Module):
    """Whatever parameters it is given."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def objective() -> nn.Module:
    def block() -> Part:
        return Part(norm1=nn.LayerNorm(4), up=nn.Linear(4, 4))

    conv = Part(weight_g=nn.Parameter(torch.ones(1, 1, 5)), weight_v=nn.Parameter(torch.ones(4, 2, 5)))
    return Part(
        encoder=Part(
            frontend=Part(project=nn.Linear(6, 4)),
            positions=Part(table=nn.Parameter(torch.ones(9, 4)), conv=conv),
            prefix=nn.Parameter(torch.ones(3, 4)),
            mask_token=nn.Parameter(torch.ones(4)),
            class_token=nn.Parameter(torch.ones(1, 1, 4)),
            transformer=Part(blocks=nn.ModuleList([block(), block()]), norm=nn.LayerNorm(4)),
        ),
        head=nn.Linear(4, 1),
        predictor=Part(transformer=Part(blocks=nn.ModuleList([block()]))),
        teacher=nn.Linear(2, 2).requires_grad_(False),
    )


def found(module: nn.Module, key: str, **settings: float) -> dict[str, float]:
    """Parameter name -> what its group says."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = build_optimizer(module, lr=1.0, **settings).param_groups
    return {names[id(parameter)]: group[key] for group in groups for parameter in group["params"]}


def test_only_matrices_and_kernels_decay() -> None:
    decayed = {name for name, decay in found(objective(), "weight_decay", weight_decay=0.5).items() if decay == 0.5}
    assert decayed == {
        "encoder.frontend.project.weight",
        "encoder.positions.conv.weight_v",
        "encoder.transformer.blocks.0.up.weight",
        "encoder.transformer.blocks.1.up.weight",
        "head.weight",
        "predictor.transformer.blocks.0.up.weight",
    }


def test_every_trained_parameter_is_there_once_and_a_teacher_is_not() -> None:
    module = objective()
    parameters = [p for group in build_optimizer(module, lr=1.0).param_groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters})
    assert {id(p) for p in parameters} == {id(p) for p in module.parameters() if p.requires_grad}


def test_layer_decay_at_hand_worked_layers() -> None:
    # two blocks: head and last norm 1, block 1 .5, block 0 .25, what is before the blocks .125
    scales = found(objective(), "lr_scale", layer_decay=0.5)
    assert scales["encoder.frontend.project.weight"] == 0.125
    assert scales["encoder.positions.table"] == scales["encoder.mask_token"] == scales["encoder.prefix"] == 0.125
    assert scales["encoder.transformer.blocks.0.up.bias"] == 0.25
    assert scales["encoder.transformer.blocks.1.norm1.weight"] == 0.5
    assert scales["encoder.transformer.norm.weight"] == scales["head.bias"] == 1.0
    assert scales["predictor.transformer.blocks.0.up.weight"] == 1.0


def test_without_layer_decay_all_layers_learn_alike() -> None:
    assert set(found(objective(), "lr_scale").values()) == {1.0}


def test_layer_ids_count_from_the_input() -> None:
    names = ["encoder.frontend.x", "encoder.transformer.blocks.11.y", "encoder.transformer.norm.bias", "head.z"]
    assert [layer_id(name, 12) for name in names] == [0, 12, 13, 13]


FRONTENDS = {
    "speech/waveform": {"layers": [[8, 10, 5], [8, 4, 4]], "rate": 8000},
    "speech/logmel": {"bands": 8, "rate": 8000},
    "audio/spectrogram": {"bands": 8, "size": [4, 4], "rate": 8000},
    "codes/codes": {"codes": [3, 3], "rate": 50},
    "image/patches": {"size": [4, 4]},
    "video/tubes": {"size": [2, 4, 4], "rate": 5},
    "text/tokens": {"tokenizer": byte_bpe([""], entries=258)},
}
# modality -> (one clip, units along time, how many of them a second)
SOUND = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0)), 1600, 8000.0
CLIPS = {
    "speech": SOUND,
    "audio": SOUND,
    "codes": (torch.arange(32).view(1, 2, 16) % 3, 16, 50.0),
    "image": (torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0)), 1, None),
    "video": (torch.rand(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 4, 5.0),
    "text": (torch.arange(2, 10).view(1, 8), 8, None),
}
TABLES = {
    "sincos": {},
    "flat_sincos": {"grid": [2, 3]},
    "conv": {"kernel": 4, "groups": 2},
    "stacked_conv": {"kernel": 3, "depth": 2, "groups": 2},
    "none": {},
    "learned": {"grid": [2, 3]},
}


BIASES: dict[str, dict[str, Any]] = {
    "buckets": {"name": "buckets", "buckets": 8, "furthest": 8},
    "one grid": {"name": "grid", "grid": [2, 3], "shared": True},
    "a grid each": {"name": "grid", "grid": [2, 3]},
    "alibi": {"name": "alibi"},
}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(
    ("source", "positions", "bias"),
    [(source, "sincos", None) for source in FRONTENDS]
    + [("image/patches", "learned", None), ("speech/logmel", "conv", None), ("image/patches", "conv", None)]
    + [("speech/logmel", "stacked_conv", None), ("image/patches", "flat_sincos", None)]
    + [("speech/logmel", "none", "buckets"), ("speech/logmel", "none", "alibi")]
    + [("image/patches", "none", "one grid"), ("image/patches", "none", "a grid each")],
)
def test_a_parameter_s_layer_is_the_first_that_depends_on_it(
    source: str, positions: str, bias: str | None, norm: str
) -> None:
    torch.manual_seed(0)
    modality, name = source.split("/")
    assert set(FRONTENDS) == {f"{m}/{f}" for m in MODALITIES for f in MODALITIES[m].frontends}
    assert set(TABLES) == set(POSITIONS)
    body = Encoder(
        MODALITIES[modality].frontends[name](dim=12, **FRONTENDS[source]),
        Transformer(dim=12, depth=2, heads=2, norm=norm, bias=None if bias is None else BIASES[bias]),
        POSITIONS[positions](12, **TABLES[positions]),
        prefix=2,
        mask_token=True,
    )
    objective = Classify(body, n_classes=2, pooling="attention", pool_heads=2)
    data, length, rate = CLIPS[modality]
    tokens = body.tokens(Raw(data, torch.tensor([length]), ["clip"], rate))
    masked = torch.zeros(tokens.x.shape[:2], dtype=torch.bool)
    masked[:, 1] = True
    layers = body(tokens, plan_of(masked, tokens.lengths), "replace", layers=[0, 1, 2]).layers
    expected = {key: 3 for key, _ in objective.named_parameters()}
    for layer in (2, 1, 0):
        objective.zero_grad()
        # weighed at random: a sum over the channels of a norm would have no gradient
        (layers[layer] * torch.randn_like(layers[layer])).sum().backward(retain_graph=True)
        expected |= {key: layer for key, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    assert set(expected.values()) == {0, 1, 2, 3}
    scales = found(objective, "lr_scale", layer_decay=0.5)
    assert {key: 3 + math.log2(scale) for key, scale in scales.items()} == expected


def test_a_matrix_of_one_row_decays_and_a_token_of_that_shape_does_not() -> None:
    vector = nn.Parameter(torch.zeros(1, 4))
    assert decays("head.weight", vector)
    assert not decays("encoder.class_token", vector)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"optimizer.lr=0.0: must be above 0"),
        ({"lr": 1.0, "weight_decay": -1.0}, r"optimizer.weight_decay=-1.0: must be at least 0"),
        ({"lr": 1.0, "betas": [0.9]}, r"optimizer.betas=\[0.9\]: two numbers are wanted, each from 0 to below 1"),
        ({"lr": 1.0, "layer_decay": 1.5}, r"optimizer.layer_decay=1.5: must be above 0 and at most 1"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(objective(), **settings)


def test_an_objective_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), lr=1.0)


def test_decay_pulls_by_rate_times_decay() -> None:
    # without a gradient of its own, a weight of 1 becomes 1 - lr * weight_decay in one update
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(1.0)
    optimizer = build_optimizer(module, lr=0.1, weight_decay=0.5)
    (module.weight.sum() * 0.0).backward()
    optimizer.step()
    assert math.isclose(module.weight.item(), 0.95, abs_tol=1e-6)


def test_a_norm_before_the_first_block_learns_as_slowly_as_the_frontend() -> None:
    assert layer_id("encoder.transformer.input_norm.weight", 2) == layer_id("encoder.frontend.project.weight", 2) == 0
    assert layer_id("encoder.transformer.norm.weight", 2) == 3

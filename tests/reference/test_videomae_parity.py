"""Our masked autoencoder over tubes, at random weights, is VideoMAE as transformers has it: loss and every gradient.

Positions differ by design, sines and cosines of three axes against one of the flattened grid, so theirs are given ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmssl.convert.layout import linear, row, same
from mmssl.convert.translate import to_theirs
from mmssl.convert.videomae import VIDEOMAE, keyless_blocks
from mmssl.encoder import Encoder
from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.targets import TARGETS
from mmssl.nn.masking import tube_mask
from mmssl.nn.positions import SinCos, sincos
from mmssl.nn.seeds import seed_of
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE, Mask
from mmssl.types import Batch, Raw

videomae = pytest.importorskip("transformers.models.videomae.modeling_videomae")
transformers = pytest.importorskip("transformers")

FRAMES, SIDE, TUBE, CHANNELS, DIM, NARROW, EPS = 6, 16, (2, 4, 4), 3, 24, 16, 1e-6
GRID = (3, 4, 4)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what transformers takes out again


def ours(mask: Mask) -> MAE:
    torch.manual_seed(0)
    frontend = Tubes(dim=DIM, size=TUBE, channels=CHANNELS, mean=MEAN, std=STD)
    transformer = Transformer(dim=DIM, depth=2, heads=3, mlp_dim=40, eps=EPS)
    objective = MAE(
        Encoder(frontend, transformer, SinCos(DIM)),
        target=TARGETS["normalized_pixels"].values,
        target_dim=frontend.feature_dim,
        mask=mask,
        mask_ratio=0.75,
        decoder_dim=NARROW,
        decoder_depth=2,
        decoder_heads=2,
        decoder_mlp_dim=28,
        decoder_eps=EPS,
    )
    # away from the zeros and ones of a fresh model, behind which a forgotten bias or norm could hide
    for parameter in objective.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    nn.init.zeros_(objective.predictor.embed.bias)  # they have none
    return objective


# the encoder as `mmssl convert` writes it, and the decoder by the same rules
OURS = {
    "modality": "video",
    "frontend": {"name": "tubes", "size": list(TUBE), "mean": MEAN, "std": STD},
    "positions": {"name": "flat_sincos", "grid": GRID},
    "transformer": {"dim": DIM, "depth": 2, "heads": 3, "mlp_dim": 40, "eps": EPS},
    "encoder": {},
    "augment_eval": [],
}
DECODER = [
    row("predictor.mask_vector", "mask_token"),
    same("predictor.embed.weight", "encoder_to_decoder.weight"),
    *linear("predictor.transformer.norm", "decoder.norm"),
    *linear("predictor.out", "decoder.head"),
    *keyless_blocks(
        {"transformer": {"dim": NARROW, "depth": 2, "layer_scale": None}},
        "decoder.decoder_layers.{}",
        ours="predictor.transformer",
    ),
]


def in_their_names(values: dict[str, Tensor]) -> nn.Module:
    """Our weights, or their gradients, as the parameters of a VideoMAE."""
    own = {name.removeprefix("encoder."): value for name, value in values.items() if name.startswith("encoder.")}
    _, _, written = to_theirs(VIDEOMAE, OURS, own)
    theirs = {f"videomae.{name}": value for name, value in written.items()}
    for pair in DECODER:
        theirs |= dict(zip(pair.theirs, pair.write(*(values[name] for name in pair.ours)), strict=True))
    given = {name: value.detach().clone() for name, value in theirs.items()}
    return videomae.VideoMAEForPreTraining.from_pretrained(None, config=config(), state_dict=given)


def config() -> Any:
    return transformers.VideoMAEConfig(
        image_size=SIDE,
        patch_size=TUBE[1],
        num_channels=CHANNELS,
        num_frames=FRAMES,
        tubelet_size=TUBE[0],
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        decoder_hidden_size=NARROW,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=28,
        norm_pix_loss=True,
        layer_norm_eps=EPS,
        use_mean_pooling=False,
        attn_implementation="eager",
    )


def table(dim: int) -> Tensor:
    axes = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    return sincos(torch.stack(axes, -1).view(-1, 3), dim)[None]


def theirs(objective: MAE) -> nn.Module:
    model = in_their_names(dict(objective.named_parameters())).train()
    model.videomae.embeddings.position_embeddings = table(DIM)
    model.position_embeddings = table(NARROW)
    model.decoder.norm.eps = EPS  # they leave torch's default there
    return model


def batch(n: int = 3) -> Batch:
    # values far beyond [0, 1], beside which it is nothing that the 1e-6 of the deviation counts in other units
    data = 10 * torch.randn(n, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    raw = Raw(data, torch.full((n,), FRAMES), [str(i) for i in range(n)])
    return Batch({"video": raw}, torch.tensor([seed_of("clip", i) for i in range(n)]))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_loss_and_every_gradient_are_theirs(mask: Mask) -> None:
    objective, clips = ours(mask), batch()
    model = theirs(objective)
    loss = objective(clips)
    normalized = (
        clips.raw.data - objective.encoder.frontend.get_buffer("mean")
    ) / objective.encoder.frontend.get_buffer("std")
    _, plan = objective._hide(clips)
    out = model(pixel_values=normalized.transpose(1, 2), bool_masked_pos=plan.masked)
    mean = loss.total / loss.count
    assert float(mean.detach()) == pytest.approx(float(out.loss.detach()), rel=1e-5)

    mean.backward()
    out.loss.backward()
    named = in_their_names({name: p.grad for name, p in objective.named_parameters()}).named_parameters()
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: value.detach() for name, value in named}
    assert gradients.keys() == learned.keys()
    far = {name: difference(gradients[name], grad) for name, grad in learned.items()}
    assert {name: value for name, value in far.items() if not value < 1e-5} == {}


def test_the_mask_hides_as_many_places_as_theirs() -> None:
    objective = ours("tube")
    tokens = objective.encoder.tokens(batch().raw)
    hidden = tube_mask(tokens, ratio=0.9, seeds=torch.arange(3)).masked.view(3, GRID[0], -1)
    # 0.9 of 16 places, in each of the steps
    assert (hidden.sum(-1) == 14).all()
    assert (hidden == hidden[:, :1]).all()
    assert len({tuple(row.tolist()) for row in hidden[:, 0]}) == 3

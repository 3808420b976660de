"""Our masked autoencoder, at random weights, is that of transformers: loss, gradients, encoder output.

transformers builds ViTMAE with position tables of zeros, so an untouched model of theirs is no oracle: all weights here
are ours, tables included, copied into theirs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmssl.convert.layout import blocks, linear, row
from mmssl.convert.translate import to_theirs
from mmssl.convert.vit import NAMES, VIT_MAE
from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS
from mmssl.nn.masking import random_mask
from mmssl.nn.positions import SinCos, sincos
from mmssl.nn.seeds import seed_of
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE
from mmssl.types import Batch, Raw

vit_mae = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
transformers = pytest.importorskip("transformers")

SIDE, PATCH, CHANNELS, DIM, NARROW = 16, 4, 3, 24, 16
GRID = SIDE // PATCH


def ours(target: str = "pixels", eps: float = 1e-6) -> MAE:
    torch.manual_seed(0)
    frontend = Patches(dim=DIM, size=[PATCH, PATCH], channels=CHANNELS, mean=[0.0] * CHANNELS, std=[1.0] * CHANNELS)
    transformer = Transformer(dim=DIM, depth=2, heads=3, mlp_dim=40, eps=eps)
    objective = MAE(
        Encoder(frontend, transformer, SinCos(DIM), prefix=1),
        target=TARGETS[target].values,
        target_dim=TARGETS[target].dim(frontend),
        decoder_dim=NARROW,
        decoder_depth=2,
        decoder_heads=2,
        decoder_mlp_dim=28,
        decoder_eps=eps,
    )
    # away from the zeros and ones of a fresh model, behind which a forgotten bias or norm could hide
    for parameter in objective.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return objective


def config(normalized: bool = False, eps: float = 1e-6):
    return transformers.ViTMAEConfig(
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=CHANNELS,
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        decoder_hidden_size=NARROW,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=28,
        mask_ratio=0.75,
        norm_pix_loss=normalized,
        layer_norm_eps=eps,
        attn_implementation="eager",
    )


# the encoder as `mmssl convert` writes it, and the decoder by the same rules
OURS = {
    "modality": "image",
    "frontend": {"name": "patches", "size": [PATCH, PATCH]},
    "positions": {"name": "sincos", "train_grid": [GRID, GRID]},
    "transformer": {"dim": DIM, "depth": 2, "heads": 3, "mlp_dim": 40},
    "encoder": {"prefix": 1},
    "augment_eval": [],
}
DECODER = [
    row("predictor.mask_vector", "decoder.mask_token"),
    *linear("predictor.embed", "decoder.decoder_embed"),
    *linear("predictor.transformer.norm", "decoder.decoder_norm"),
    *linear("predictor.out", "decoder.decoder_pred"),
    *blocks(
        {"transformer": {"dim": NARROW, "depth": 2, "layer_scale": None}},
        "decoder.decoder_layers.{}",
        NAMES,
        ours="predictor.transformer",
    ),
]


def in_their_names(values: dict[str, Tensor], eps: float = 1e-6) -> nn.Module:
    """Our weights, or their gradients, as the parameters of a ViTMAE."""
    own = {name.removeprefix("encoder."): value for name, value in values.items() if name.startswith("encoder.")}
    _, _, written = to_theirs(VIT_MAE, OURS, own)
    theirs = {f"vit.{name}": value for name, value in written.items()}
    for pair in DECODER:
        theirs |= dict(zip(pair.theirs, pair.write(*(values[name] for name in pair.ours)), strict=True))
    theirs["decoder.decoder_pos_embed"] = table(NARROW)
    given = {name: value.detach().clone() for name, value in theirs.items()}
    model = vit_mae.ViTMAEForPreTraining.from_pretrained(None, config=config(eps=eps), state_dict=given)
    # which are fixed in a fresh model, and not in one that was loaded
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    return model


def table(dim: int) -> Tensor:
    """Our positions as their table: a row of zeros for the class token, then the grid, row by row."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    grid = sincos(torch.stack([rows, columns], -1).view(-1, 2), dim)
    return torch.cat([torch.zeros(1, dim), grid])[None]


def theirs(objective: MAE, normalized: bool = False, eps: float = 1e-6) -> nn.Module:
    model = in_their_names(dict(objective.named_parameters()), eps).train()
    model.config.norm_pix_loss = normalized
    return model


def batch(n: int = 3) -> Batch:
    data = torch.randn(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    raw = Raw(data, torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])
    return Batch({"image": raw}, torch.tensor([seed_of("clip", i) for i in range(n)]))


def noise(of: Batch) -> Tensor:
    """What makes transformers hide what we hide: it keeps the places of smallest noise, in their order."""
    plan = random_mask(torch.full((len(of),), GRID * GRID), ratio=0.75, seeds=of.seeds)
    return plan.masked.float() + torch.arange(GRID * GRID) / 1000


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dim", [DIM, NARROW])
def test_our_positions_are_theirs_and_not_zero(dim: int) -> None:
    settings = config()
    settings.hidden_size = dim
    embeddings = vit_mae.ViTMAEEmbeddings(settings)
    embeddings.initialize_weights()
    torch.testing.assert_close(table(dim), embeddings.position_embeddings.data, rtol=0, atol=1e-6)
    assert (table(dim)[0, 1:].norm(dim=-1) > 1).all()


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize("normalized", [False, True], ids=["pixels", "normalized_pixels"])
def test_loss_and_every_gradient_are_theirs(normalized: bool, eps: float) -> None:
    objective = ours("normalized_pixels" if normalized else "pixels", eps)
    model, clips = theirs(objective, normalized, eps), batch()
    loss = objective(clips)
    out = model(pixel_values=clips.raw.data, noise=noise(clips))
    mean = loss.total / loss.count
    assert float(mean.detach()) == pytest.approx(float(out.loss.detach()), rel=1e-5)

    mean.backward()
    out.loss.backward()
    named = in_their_names({name: p.grad for name, p in objective.named_parameters()}).named_parameters()
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: value.detach() for name, value in named if name in learned}
    assert gradients.keys() == learned.keys()
    assert sum(p.numel() for p in gradients.values()) == sum(p.numel() for p in objective.parameters())
    far = {
        name: difference(gradients[name], grad)
        for name, grad in learned.items()
        # adding a constant to all keys changes no attention: that gradient is rounding noise on both sides
        if not name.endswith("k_proj.bias") and not difference(gradients[name], grad) < 1e-5
    }
    assert far == {}


def test_encoder_output_and_prediction_are_theirs() -> None:
    objective, clips = ours(), batch()
    model = theirs(objective)
    with torch.no_grad():
        tokens = objective.encoder.tokens(clips.raw)
        plan = random_mask(tokens.lengths, ratio=0.75, seeds=clips.seeds)
        encoded = objective.encoder(tokens, plan, "drop")
        prediction = objective.predictor(encoded, tokens, plan)
        out = model(pixel_values=clips.raw.data, noise=noise(clips), output_hidden_states=True)
        latent = model.vit(clips.raw.data, noise=noise(clips)).last_hidden_state
    torch.testing.assert_close(plan.masked, out.mask.bool())
    assert difference(encoded.x, latent) < 1e-5
    assert difference(prediction, out.logits[plan.masked]) < 1e-5


def test_the_whole_encoder_without_a_mask_is_theirs() -> None:
    objective, clips = ours(), batch()
    model = theirs(objective)
    # their encoder always shuffles: with nothing hidden and ascending noise it does not move anything
    model.vit.embeddings.config.mask_ratio = 0.0
    with torch.no_grad():
        mine = objective.encoder(objective.encoder.tokens(clips.raw))
        hidden = model.vit(clips.raw.data, noise=torch.arange(GRID * GRID).expand(3, -1) / 1000.0)
    assert difference(mine.x, hidden.last_hidden_state) < 1e-5

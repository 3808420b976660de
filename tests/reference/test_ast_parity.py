"""Our encoder on a spectrogram is AST as transformers has it, its two extra tokens and overlapping patches included.

Theirs goes over frequency first: token (f, t) is number f * times + t, and a patch's values are frequency by time. Ours
goes over time first in both. So patches' weights, the table of positions and the output are reordered, nothing else.
"""

from __future__ import annotations

import pytest
import torch

from mmssl.encoder import Encoder
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.nn.positions import Learned
from mmssl.nn.transformer import Transformer
from mmssl.types import Raw

transformers = pytest.importorskip("transformers")

DIM, PATCH, STRIDE, TIMES, BANDS = 24, 16, 10, 5, 3
FRAMES, BINS = PATCH + STRIDE * (TIMES - 1), PATCH + STRIDE * (BANDS - 1)


def theirs():
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        patch_size=PATCH,
        frequency_stride=STRIDE,
        time_stride=STRIDE,
        max_length=FRAMES,
        num_mel_bins=BINS,
        attn_implementation="eager",
    )
    model = transformers.ASTModel(config).eval()
    # away from the zeros and ones of a fresh model, behind which a forgotten bias or norm could hide
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def time_first(x):
    """(bands * times, ...) in their order -> in ours."""
    return x.view(BANDS, TIMES, *x.shape[1:]).transpose(0, 1).flatten(0, 1)


def ours(model):
    """An encoder with the weights of an ASTModel."""
    frontend = SpectrogramPatches(dim=DIM, size=[PATCH, PATCH], stride=[STRIDE, STRIDE], bands=BINS)
    transformer = Transformer(dim=DIM, depth=2, heads=3, mlp_dim=40, eps=model.config.layer_norm_eps)
    encoder = Encoder(frontend, transformer, Learned(DIM, grid=[TIMES, BANDS]), prefix=2)
    weights = dict(model.named_parameters())
    places = weights.pop("embeddings.position_embeddings")[0]
    extra = torch.cat([weights.pop("embeddings.cls_token")[0], weights.pop("embeddings.distillation_token")[0]])
    kernel = weights.pop("embeddings.patch_embeddings.projection.weight")  # (dim, 1, frequency, time)
    copied = {
        # theirs have a position of their own, which is added once and for all here
        "prefix": extra + places[:2],
        "positions.table": time_first(places[2:]),
        "frontend.project.weight": kernel[:, 0].transpose(1, 2).flatten(1),
        "frontend.project.bias": weights.pop("embeddings.patch_embeddings.projection.bias"),
    }
    plain = {"transformer.norm": "layernorm"}
    for i in range(2):
        block, layer = f"transformer.blocks.{i}", f"layers.{i}"
        plain[f"{block}.norm1"] = f"{layer}.layernorm_before"
        plain[f"{block}.norm2"] = f"{layer}.layernorm_after"
        plain[f"{block}.attention.out"] = f"{layer}.attention.o_proj"
        plain[f"{block}.mlp.up"] = f"{layer}.mlp.fc1"
        plain[f"{block}.mlp.down"] = f"{layer}.mlp.fc2"
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{layer}.attention.{name}_proj.{kind}") for name in "qkv"]
            copied[f"{block}.attention.qkv.{kind}"] = torch.cat(parts)
    for mine, name in plain.items():
        for kind in ("weight", "bias"):
            copied[f"{mine}.{kind}"] = weights.pop(f"{name}.{kind}")
    assert not weights  # every weight of theirs has its place
    missing = encoder.load_state_dict(copied, strict=False).missing_keys
    assert missing == ["transformer.draws"]
    return encoder.eval()


def test_tokens_and_both_extra_tokens_are_those_of_ast() -> None:
    model = theirs()
    encoder = ours(model)
    rate, samples = 16_000, 400 + 160 * (FRAMES - 1)
    wave = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(1))
    raw = Raw(wave, torch.tensor([samples] * 2), ["a", "b"], rate)
    frames = encoder.frontend.filterbank(raw.data, raw.lengths)
    assert frames.shape == (2, FRAMES, BINS)
    with torch.no_grad():
        given = encoder.tokens(raw)
        mine = encoder(given).x
        out = model((frames - encoder.frontend.mean) / encoder.frontend.scale)
    assert given.grid == (TIMES, BANDS)
    hidden = out.last_hidden_state
    assert torch.allclose(mine[:, :2], hidden[:, :2], atol=1e-5)
    assert torch.allclose(mine[:, 2:], torch.stack([time_first(row) for row in hidden[:, 2:]]), atol=1e-5)
    assert torch.allclose(mine[:, :2].mean(1), out.pooler_output, atol=1e-5)
    # the order matters: without the change they differ
    assert not torch.allclose(mine[:, 2:], hidden[:, 2:], atol=1e-2)


def test_the_spectrogram_is_that_of_their_feature_extractor() -> None:
    pytest.importorskip("torchaudio", exc_type=ImportError)
    extract = transformers.ASTFeatureExtractor(max_length=98)
    wave = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(2))
    theirs = extract(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_values[0]
    frontend = SpectrogramPatches(dim=4)
    frames = frontend.filterbank(wave[None], torch.tensor([16_000]))[0]
    mine = (frames - frontend.mean) / frontend.scale
    assert mine.shape == theirs.shape == (98, 128)
    # normalized, a difference of 1e-4 in the logarithm is one of 1.1e-5; see the test of the filterbank for the rest
    assert ((mine - theirs).abs() < 1.1e-5).double().mean() > 0.999

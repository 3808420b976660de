"""The same hidden states as transformers' HuBERT at tiny random weights, masked where it is told to."""

import pytest
import torch
from torch import nn

from mmssl.encoder import Encoder
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import Convolutional
from mmssl.nn.transformer import Transformer
from mmssl.objectives.hubert import HuBERT
from mmssl.types import Raw

transformers = pytest.importorskip("transformers")

LAYERS = [[12, 10, 5], [12, 3, 2], [12, 2, 2]]
FORMS = pytest.mark.parametrize("form", ["group", "layer"])


def build_theirs(form: str):
    config = transformers.HubertConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        conv_dim=[channels for channels, _, _ in LAYERS],
        conv_kernel=[kernel for _, kernel, _ in LAYERS],
        conv_stride=[stride for _, _, stride in LAYERS],
        feat_extract_norm=form,
        conv_bias=form == "layer",
        do_stable_layer_norm=form == "layer",
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
    )
    model = transformers.HubertModel(config)
    for part in model.modules():  # norms that do nothing would hide a swap of two of them
        if isinstance(part, nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
    return model.train()


def build_ours(form: str) -> HuBERT:
    transformer = Transformer(dim=24, depth=3, heads=4, mlp_dim=40, norm="pre" if form == "layer" else "post", eps=1e-5)
    frontend = Waveform(dim=24, layers=LAYERS, norm=form, bias=form == "layer", normalize=False)
    encoder = Encoder(frontend, transformer, Convolutional(24, kernel=8, groups=4), mask_token=True)
    return HuBERT(encoder, units={"units": 5}, dim=16)


def copy(ours: Encoder, theirs) -> tuple[set[int], set[int]]:
    """Copy every weight; says which of ours and which of theirs took part."""
    mine: set[int] = set()
    other: set[int] = set()

    def put(a: nn.Parameter, b: torch.Tensor, *parts: nn.Parameter) -> None:
        a.copy_(b)
        mine.add(id(a))
        other.update(id(part) for part in parts)

    def whole(a, b) -> None:
        for name in ("weight", "bias"):
            put(getattr(a, name), getattr(b, name), getattr(b, name))

    frontend, blocks = ours.frontend, ours.transformer.blocks
    put(ours.mask_token, theirs.masked_spec_embed, theirs.masked_spec_embed)
    whole(frontend.project, theirs.feature_projection.projection)
    whole(frontend.norm, theirs.feature_projection.layer_norm)
    whole(ours.transformer.norm, theirs.encoder.layer_norm)
    conv = theirs.encoder.pos_conv_embed.conv
    weight = conv.parametrizations.weight
    put(ours.positions.weight_g, weight.original0, weight.original0)
    put(ours.positions.weight_v, weight.original1, weight.original1)
    put(ours.positions.bias, conv.bias, conv.bias)
    for i, layer in enumerate(theirs.feature_extractor.conv_layers):
        put(frontend.weights[i], layer.conv.weight.permute(2, 1, 0).flatten(0, 1), layer.conv.weight)
        if frontend.biases is not None:
            put(frontend.biases[i], layer.conv.bias, layer.conv.bias)
        if hasattr(layer, "layer_norm"):
            whole(frontend.norms[i], layer.layer_norm)
    for block, layer in zip(blocks, theirs.encoder.layers, strict=True):
        attention = layer.attention
        for name in ("weight", "bias"):
            qkv = [getattr(projection, name) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
            put(getattr(block.attention.qkv, name), torch.cat(qkv), *qkv)
        whole(block.attention.out, attention.out_proj)
        whole(block.norm1, layer.layer_norm)
        whole(block.norm2, layer.final_layer_norm)
        whole(block.mlp.up, layer.feed_forward.intermediate_dense)
        whole(block.mlp.down, layer.feed_forward.output_dense)
    return mine, other


@FORMS
@torch.no_grad()
def test_every_hidden_state_is_the_same(form: str) -> None:
    """Lengths differ in the layer form only: their group norm takes its statistics over padding too."""
    torch.manual_seed(3)
    theirs, ours = build_theirs(form), build_ours(form)
    mine, other = copy(ours.encoder, theirs)
    assert mine == {id(p) for p in ours.encoder.parameters()}
    assert other == {id(p) for p in theirs.parameters()}
    samples = torch.tensor([900, 900] if form == "group" else [900, 610])
    data = torch.randn(2, 900)
    data[torch.arange(900) >= samples[:, None]] = 0.0
    tokens = ours.encoder.tokens(Raw(data, samples, ["a", "b"], 16_000))
    masked = (torch.rand(tokens.x.shape[:2]) < 0.5) & tokens.valid
    found = ours.encoder(tokens, plan_of(masked, tokens.lengths), "replace", layers=[1, 2, 3])
    inputs = {"attention_mask": (torch.arange(900) < samples[:, None]).long()} if form == "layer" else {}
    wanted = theirs(data, mask_time_indices=masked, output_hidden_states=True, **inputs)
    valid = tokens.valid
    torch.testing.assert_close(found.x[valid], wanted.last_hidden_state[valid], rtol=1e-4, atol=1e-5)
    # the last one of theirs is after the final norm where there is one
    for layer in (1, 2):
        torch.testing.assert_close(found.layers[layer][valid], wanted.hidden_states[layer][valid], rtol=1e-4, atol=1e-5)
    assert wanted.last_hidden_state[valid].std() > 0.1
    assert masked.any()


def test_base_has_the_parameters_of_theirs_and_a_head() -> None:
    with torch.device("meta"):
        theirs = transformers.HubertModel(transformers.HubertConfig())
        ours = HuBERT(
            Encoder(
                Waveform(dim=768, norm="group", normalize=False, grad_mult=0.1),
                Transformer(dim=768, depth=12, heads=12, norm="post"),
                Convolutional(768),
                mask_token=True,
            ),
            units={"units": 500},
        )
    counts = [sum(p.numel() for p in part.parameters()) for part in (ours.encoder, theirs, ours)]
    assert counts[0] == counts[1]
    # a projection with its bias, and 500 embeddings
    assert counts[2] - counts[0] == 768 * 256 + 256 + 500 * 256

"""The same numbers as transformers' data2vec encoders, at tiny random weights.

Theirs for pictures can have a bias of attention by relative place and a learned scale of each branch, which ours has
not: they are compared without these two.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmssl.encoder import Encoder
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.frontend import Waveform
from mmssl.nn.masking import plan_of
from mmssl.nn.positions import Learned, StackedConvolutional
from mmssl.nn.transformer import Transformer
from mmssl.types import Raw

transformers = pytest.importorskip("transformers")

LAYERS = [[12, 10, 5], [12, 3, 2], [12, 2, 2]]


def wake(model: nn.Module) -> nn.Module:
    """Norms and biases that do nothing would hide a swap of two of them."""
    for name, p in model.named_parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(p, std=0.2)
    return model.eval()


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.weight.copy_(theirs.weight)
    if theirs.bias is not None:
        ours.bias.copy_(theirs.bias)


def copy_qkv(ours: nn.Linear, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> None:
    ours.weight.copy_(torch.cat([part.weight for part in (q, k, v)]))
    no_bias = torch.zeros(len(k.weight))
    ours.bias.copy_(torch.cat([no_bias if part.bias is None else part.bias for part in (q, k, v)]))


@pytest.fixture
@torch.no_grad()
def speech() -> tuple[Encoder, nn.Module]:
    torch.manual_seed(0)
    theirs = wake(
        transformers.Data2VecAudioModel(
            transformers.Data2VecAudioConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=40,
                conv_dim=[channels for channels, _, _ in LAYERS],
                conv_kernel=[kernel for _, kernel, _ in LAYERS],
                conv_stride=[stride for _, _, stride in LAYERS],
                conv_pos_kernel_size=5,
                num_conv_pos_embeddings=3,
                num_conv_pos_embedding_groups=4,
            )
        )
    )
    ours = Encoder(
        Waveform(dim=24, layers=LAYERS, norm="layer", normalize=False),
        Transformer(dim=24, depth=2, heads=4, mlp_dim=40, norm="post", eps=1e-5),
        StackedConvolutional(24, depth=3, kernel=5, groups=4),
        mask_token=True,
    ).eval()
    frontend, transformer = ours.frontend, ours.transformer
    for i, layer in enumerate(theirs.feature_extractor.conv_layers):
        frontend.weights[i].copy_(layer.conv.weight.permute(2, 1, 0).flatten(0, 1))
        copy(frontend.norms[i], layer.layer_norm)
    copy(frontend.norm, theirs.feature_projection.layer_norm)
    copy(frontend.project, theirs.feature_projection.projection)
    ours.mask_token.copy_(theirs.masked_spec_embed)
    for convolution, layer in zip(ours.positions.convolutions, theirs.encoder.pos_conv_embed.layers, strict=True):
        copy(convolution, layer.conv)
    copy(transformer.norm, theirs.encoder.layer_norm)
    for block, layer in zip(transformer.blocks, theirs.encoder.layers, strict=True):
        attention = layer.attention
        copy_qkv(block.attention.qkv, attention.q_proj, attention.k_proj, attention.v_proj)
        copy(block.attention.out, attention.out_proj)
        copy(block.norm1, layer.layer_norm)
        copy(block.norm2, layer.final_layer_norm)
        copy(block.mlp.up, layer.feed_forward.intermediate_dense)
        copy(block.mlp.down, layer.feed_forward.output_dense)
    return ours, theirs


@torch.no_grad()
def test_the_speech_encoder_gives_the_same_with_hidden_frames_and_without(speech: tuple[Encoder, nn.Module]) -> None:
    ours, theirs = speech
    data = torch.randn(2, 900)
    tokens = ours.tokens(Raw(data, torch.tensor([900, 900]), ["a", "b"], 16_000))
    read: list[torch.Tensor] = []
    for layer in theirs.encoder.layers:
        layer.feed_forward.register_forward_hook(lambda part, given, out: read.append(out))
    expected = theirs(data).last_hidden_state
    whole = ours(tokens, layers=[1, 2], point="mlp")
    torch.testing.assert_close(whole.x, expected, rtol=1e-4, atol=1e-5)
    # what the MLPs give is what data2vec averages
    for i in (1, 2):
        torch.testing.assert_close(whole.layers[i], read[i - 1], rtol=1e-4, atol=1e-5)
    masked = torch.rand(tokens.x.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    hidden = theirs(data, mask_time_indices=masked).last_hidden_state
    torch.testing.assert_close(ours(tokens, plan_of(masked, tokens.lengths), "replace").x, hidden, rtol=1e-4, atol=1e-5)
    assert (hidden - expected).abs().max() > 0.1


@torch.no_grad()
def test_a_ragged_batch_gives_what_they_give_for_each_clip_alone(speech: tuple[Encoder, nn.Module]) -> None:
    ours, theirs = speech
    lengths = torch.tensor([900, 500])
    data = torch.randn(2, 900)
    tokens = ours.tokens(Raw(data, lengths, ["a", "b"], 16_000))
    encoded = ours(tokens)
    for row, n in enumerate(lengths.tolist()):
        alone = theirs(data[row : row + 1, :n]).last_hidden_state[0]
        assert len(alone) == encoded.lengths[row]
        torch.testing.assert_close(encoded.x[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_image_encoder_gives_the_same_with_hidden_patches_and_without() -> None:
    torch.manual_seed(0)
    theirs = wake(
        transformers.Data2VecVisionModel(
            transformers.Data2VecVisionConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=40,
                image_size=16,
                patch_size=4,
                use_mask_token=True,
                use_absolute_position_embeddings=True,
                use_relative_position_bias=False,
                use_shared_relative_position_bias=False,
                layer_scale_init_value=0.0,
                use_mean_pooling=False,
            )
        )
    )
    for table in (theirs.embeddings.position_embeddings, theirs.embeddings.cls_token, theirs.embeddings.mask_token):
        nn.init.normal_(table)
    ours = Encoder(
        Patches(dim=24, size=[4, 4], mean=[0.0] * 3, std=[1.0] * 3),
        Transformer(dim=24, depth=2, heads=4, mlp_dim=40, eps=1e-12),
        Learned(24, grid=[4, 4]),
        prefix=1,
        mask_token=True,
    ).eval()
    embeddings, transformer = theirs.embeddings, ours.transformer
    projection = embeddings.patch_embeddings.projection
    # patches are rows of pixels with their channels last
    ours.frontend.project.weight.copy_(projection.weight.permute(0, 2, 3, 1).flatten(1))
    ours.frontend.project.bias.copy_(projection.bias)
    ours.positions.table.copy_(embeddings.position_embeddings[0, 1:])
    ours.prefix.copy_(embeddings.cls_token[0] + embeddings.position_embeddings[0, :1])
    ours.mask_token.copy_(embeddings.mask_token[0, 0])
    copy(transformer.norm, theirs.layernorm)
    for block, layer in zip(transformer.blocks, theirs.encoder.layer, strict=True):
        attention = layer.attention.attention
        copy_qkv(block.attention.qkv, attention.query, attention.key, attention.value)
        copy(block.attention.out, layer.attention.output.dense)
        copy(block.norm1, layer.layernorm_before)
        copy(block.norm2, layer.layernorm_after)
        copy(block.mlp.up, layer.intermediate.dense)
        copy(block.mlp.down, layer.output.dense)
    data = torch.rand(2, 3, 16, 16)
    tokens = ours.tokens(Raw(data, torch.tensor([1, 1]), ["a", "b"]))
    expected = theirs(data, output_hidden_states=True)
    whole = ours(tokens, layers=[0, 1, 2])
    torch.testing.assert_close(whole.x, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    for i in range(3):
        torch.testing.assert_close(whole.layers[i], expected.hidden_states[i], rtol=1e-4, atol=1e-5)
    masked = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden = theirs(data, bool_masked_pos=masked).last_hidden_state
    torch.testing.assert_close(ours(tokens, plan_of(masked, tokens.lengths), "replace").x, hidden, rtol=1e-4, atol=1e-5)
    assert (hidden - expected.last_hidden_state).abs().max() > 0.1

"""CLIP against transformers: both towers, the logits and the loss, with the weights of theirs copied into ours."""

import pytest
import torch

from mmssl.encoder import Encoder, Encoders
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.text.frontend import TokenTable
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.nn.positions import Learned
from mmssl.nn.transformer import Transformer
from mmssl.objectives.clip import CLIP
from mmssl.types import Batch, Raw

LENGTHS = torch.tensor([7, 3, 6, 4])
END = 257


@pytest.fixture(scope="module")
def theirs():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            "vocab_size": 258,
            "hidden_size": 16,
            "intermediate_size": 40,
            "max_position_embeddings": 9,
            "eos_token_id": END,
            "bos_token_id": 0,
            "pad_token_id": 1,
            **sizes,
        },
        vision_config={"hidden_size": 24, "intermediate_size": 32, "image_size": 16, "patch_size": 4, **sizes},
        projection_dim=12,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # their biases and norms begin at 0 and 1, which tells nothing apart
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def tower(model, dim, mlp, causal):
    ours = Transformer(
        dim=dim, depth=2, heads=2, mlp_dim=mlp, causal=causal, input_norm=not causal, eps=1e-5, activation="quick_gelu"
    )
    if not causal:
        ours.input_norm.load_state_dict(model.pre_layrnorm.state_dict())
    ours.norm.load_state_dict((model.final_layer_norm if causal else model.post_layernorm).state_dict())
    for mine, block in zip(ours.blocks, model.encoder.layers, strict=True):
        mine.norm1.load_state_dict(block.layer_norm1.state_dict())
        mine.norm2.load_state_dict(block.layer_norm2.state_dict())
        attention = block.self_attn
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            getattr(mine.attention.qkv, name).data.copy_(torch.cat(parts))
        for own, their in ((mine.attention.out, attention.out_proj), (mine.mlp.up, block.mlp.fc1)):
            own.load_state_dict(their.state_dict())
        mine.mlp.down.load_state_dict(block.mlp.fc2.state_dict())
    return ours


@pytest.fixture(scope="module")
def ours(theirs):
    vision, text = theirs.vision_model, theirs.text_model
    with torch.no_grad():
        patches = Patches(dim=24, size=(4, 4), mean=[0, 0, 0], std=[1, 1, 1])
        weight = vision.embeddings.patch_embedding.weight
        patches.project.weight.copy_(weight.permute(0, 2, 3, 1).flatten(1))
        table = vision.embeddings.position_embedding.weight
        image = Encoder(patches, tower(vision, 24, 32, False), Learned(24, grid=[4, 4]), prefix=1)
        image.prefix.copy_(vision.embeddings.class_embedding + table[:1])
        image.positions.table.copy_(table[1:])
        tokens = TokenTable(dim=16, tokenizer=byte_bpe([""], entries=258))
        tokens.table.load_state_dict(text.embeddings.token_embedding.state_dict())
        words = Encoder(tokens, tower(text, 16, 40, True), Learned(16, grid=[9]))
        words.positions.table.copy_(text.embeddings.position_embedding.weight)
        model = CLIP(Encoders({"image": image, "text": words}), dim=12, pool={"image": "class", "text": "last"})
        model.project["image"].load_state_dict(theirs.visual_projection.state_dict())
        model.project["text"].load_state_dict(theirs.text_projection.state_dict())
        model.log_scale.fill_(float(theirs.logit_scale))
    return model


@pytest.fixture(scope="module")
def clips():
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 256, (4, 7), generator=made)
    place = torch.arange(7)
    ids = torch.where(place == LENGTHS[:, None] - 1, END, ids).masked_fill(place >= LENGTHS[:, None], 1)
    return torch.rand(4, 3, 16, 16, generator=made), ids


@torch.no_grad()
def test_towers_logits_and_loss_are_theirs(theirs, ours, clips) -> None:
    pictures, ids = clips
    mask = (torch.arange(7) < LENGTHS[:, None]).long()
    found = theirs(input_ids=ids, attention_mask=mask, pixel_values=pictures, return_loss=True)
    names = [f"clip{row}" for row in range(4)]
    batch = Batch(
        {
            "image": Raw(pictures, torch.ones(4, dtype=torch.int64), names),
            "text": Raw(ids, LENGTHS, names),
        },
        torch.arange(4),
    )
    vectors = {}
    for name in ("image", "text"):
        encoder = ours.encoder[name]
        vectors[name] = ours.joint(name, encoder(encoder.tokens(batch.of(name))))
    assert torch.allclose(vectors["image"], found.image_embeds, atol=1e-5)
    assert torch.allclose(vectors["text"], found.text_embeds, atol=1e-5)
    logits = ours.log_scale.exp() * vectors["image"] @ vectors["text"].T
    assert torch.allclose(logits, found.logits_per_image, atol=1e-4)
    loss = ours(batch)
    assert torch.allclose(loss.total / loss.count, found.loss, rtol=1e-5)

"""SigLIP against transformers: logits and loss of the vectors, scale and bias that their model has."""

import pytest
import torch
from torch import Tensor

from mmssl.encoder import Encoder, Encoders
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.text.frontend import TokenTable
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.siglip import SigLIP
from mmssl.types import Batch, Raw


class Copied(SigLIP):
    """The loss of vectors that are somebody else's."""

    vectors: Tensor

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.vectors, torch.ones(self.vectors.shape[:2], dtype=torch.bool)


def test_logits_loss_and_gradients_are_theirs() -> None:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 12, "intermediate_size": 16}
    config = SiglipConfig(
        text_config={"vocab_size": 30, "max_position_embeddings": 6, **sizes},
        vision_config={"image_size": 8, "patch_size": 4, **sizes},
    )
    theirs = SiglipModel(config).eval()
    theirs.logit_scale.data.fill_(1.7)
    theirs.logit_bias.data.fill_(-2.3)
    found = theirs(
        input_ids=torch.randint(2, 30, (5, 6)), pixel_values=torch.rand(5, 3, 8, 8) * 4 - 2, return_loss=True
    )
    found.loss.backward()

    body = Transformer(dim=8, depth=1, heads=2)
    frontends = {
        "image": Patches(dim=8, size=(4, 4)),
        "text": TokenTable(dim=8, tokenizer=byte_bpe([""], entries=258)),
    }
    encoders = Encoders({name: Encoder(frontend, body, SinCos(8)) for name, frontend in frontends.items()})
    ours = Copied(encoders, dim=12, pool={"image": "mean", "text": "last"})
    ours.vectors = torch.stack([found.image_embeds, found.text_embeds], 1).detach()
    for own, their in ((ours.log_scale, theirs.logit_scale), (ours.bias, theirs.logit_bias)):
        own.data.copy_(their.data)
    names = [f"clip{row}" for row in range(5)]
    nothing = Raw(torch.zeros(5, 1), torch.ones(5, dtype=torch.int64), names)
    loss = ours(Batch({"image": nothing, "text": nothing}, torch.arange(5)))
    (loss.total / loss.count).backward()
    logits = ours.log_scale.exp() * ours.vectors[:, 0] @ ours.vectors[:, 1].T + ours.bias
    assert torch.allclose(logits, found.logits_per_image, atol=1e-5)
    assert torch.allclose(loss.total / loss.count, found.loss, rtol=1e-5)
    assert ours.log_scale.grad is not None
    assert ours.bias.grad is not None
    assert ours.log_scale.grad.item() == pytest.approx(theirs.logit_scale.grad.item(), rel=1e-4)
    assert ours.bias.grad.item() == pytest.approx(theirs.logit_bias.grad.item(), rel=1e-4)

"""CLAP against transformers: the loss of the vectors and the scale that their model has."""

import math

import torch
from torch import Tensor

from mmssl.encoder import Encoder, Encoders
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.text.frontend import TokenTable
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.clip import CLIP
from mmssl.types import Batch, Raw

CLIPS = 5


class Copied(CLIP):
    """The loss of vectors that are somebody else's."""

    vectors: Tensor

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.vectors, torch.ones(self.vectors.shape[:2], dtype=torch.bool)


def test_logits_and_loss_are_theirs() -> None:
    from transformers import ClapConfig, ClapModel
    from transformers.models.clap.modeling_clap import contrastive_loss

    torch.manual_seed(0)
    audio = {"window_size": 4, "num_mel_bins": 16, "spec_size": 64, "patch_size": 2, "patch_stride": 2, "freq_ratio": 4}
    audio |= {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2]}
    text = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "max_position_embeddings": 12, "pad_token_id": 1}
    theirs = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12)).eval()
    for scale in (theirs.logit_scale_a, theirs.logit_scale_t):  # theirs are two, which begin equal
        scale.data.fill_(1.3)
    with torch.no_grad():
        found = theirs(
            input_ids=torch.randint(2, 30, (CLIPS, 6)), input_features=torch.randn(CLIPS, 1, 64, 16), return_loss=True
        )

    body = Transformer(dim=8, depth=1, heads=2)
    frontends = {
        "audio": SpectrogramPatches(dim=8),
        "text": TokenTable(dim=8, tokenizer=byte_bpe([""], entries=258)),
    }
    encoders = Encoders({name: Encoder(frontend, body, SinCos(8)) for name, frontend in frontends.items()})
    ours = Copied(encoders, dim=12, pool={"audio": "mean", "text": "last"}, temperature=math.exp(-1.3))
    ours.vectors = torch.stack([found.audio_embeds, found.text_embeds], 1)
    assert torch.allclose(ours.vectors.norm(dim=2), torch.ones(CLIPS, 2), atol=1e-6)
    nothing = Raw(torch.zeros(CLIPS, 1), torch.ones(CLIPS, dtype=torch.int64), [str(n) for n in range(CLIPS)])
    loss = ours(Batch({"audio": nothing, "text": nothing}, torch.arange(CLIPS)))
    logits = ours.log_scale.exp() * ours.vectors[:, 0] @ ours.vectors[:, 1].T
    assert torch.allclose(logits, found.logits_per_audio, atol=1e-5)
    # theirs takes the captions' direction twice: it turns the sounds' table over before the softmax. The paper (Wu et
    # al. 2023, arXiv:2211.06687, equation 1) and we take the mean of both directions
    assert torch.allclose(contrastive_loss(found.logits_per_text), found.loss)
    both = (found.loss + contrastive_loss(found.logits_per_audio)) / 2
    assert torch.allclose(loss.total / loss.count, both, rtol=1e-5)
    assert not torch.allclose(both, found.loss, rtol=1e-3)

"""Pictures, captions and sounds that belong together, and tiny encoders of them."""

import torch

from mmssl.encoder import Encoder, Encoders
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.text.frontend import TokenTable
from mmssl.modalities.text.tokenizer import byte_bpe
from mmssl.nn.positions import SinCos
from mmssl.nn.transformer import Transformer
from mmssl.types import Batch, Raw

DIM = 16
LENGTHS = {"text": [9, 4, 7, 5], "speech": [1600, 900, 1210, 640]}
POOL = {"image": "class", "text": "last", "speech": "mean"}


def encoders(*names: str, shared: bool = False, **settings) -> Encoders:
    torch.manual_seed(0)
    trunk = Transformer(dim=DIM, depth=2, heads=2, **settings)
    tokenizer = byte_bpe([""], entries=258)
    frontends = {
        "image": lambda: Patches(dim=DIM, size=(4, 4)),
        "text": lambda: TokenTable(dim=DIM, tokenizer=tokenizer),
        "speech": lambda: LogMel(dim=DIM, bands=8, window_ms=10, hop_ms=2.5, rate=8000),
    }
    return Encoders(
        {
            name: Encoder(
                frontends[name](),
                trunk if shared else Transformer(dim=DIM, depth=2, heads=2, **settings),
                SinCos(DIM),
                prefix=int(name == "image"),
            )
            for name in names
        }
    )


def raw(name: str, rows=(0, 1, 2, 3)) -> Raw:
    made = torch.Generator().manual_seed(3)
    ids = [f"clip{row}" for row in rows]
    if name == "image":
        return Raw(torch.rand(4, 3, 8, 12, generator=made)[list(rows)], torch.ones(len(rows), dtype=torch.int64), ids)
    lengths = torch.tensor(LENGTHS[name])
    shape = (4, int(lengths.max()))
    data = torch.rand(shape, generator=made) if name == "speech" else torch.randint(2, 256, shape, generator=made)
    data = torch.where(torch.arange(shape[1]) < lengths[:, None], data, 0)[list(rows)]
    lengths = lengths[list(rows)]
    return Raw(data[:, : int(lengths.max())], lengths, ids, 8000.0 if name == "speech" else None)


def batch(*names: str, rows=(0, 1, 2, 3), labels=None) -> Batch:
    """The clips of some rows, each with a seed of its own."""
    inputs = {name: raw(name, rows) for name in names or ("image", "text")}
    return Batch(inputs, 7 * torch.tensor(rows) % 5, None if labels is None else torch.tensor(labels))


def given(objective, vectors, **settings):
    """An objective of pictures and captions whose vectors, (B, 2, J), are given."""

    class Given(objective):
        def _embedded(self, batch):
            return unit * (self.log_scale / self.log_scale.detach()), torch.ones(unit.shape[:2], dtype=torch.bool)

    unit = torch.nn.functional.normalize(torch.as_tensor(vectors).float(), dim=-1)
    body = encoders("image", "text")
    return Given(body, dim=unit.shape[-1], pool={"image": "class", "text": "last"}, **settings)

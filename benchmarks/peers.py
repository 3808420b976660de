"""What others' code learns from the same clips for the same cost: transformers' MAE and wav2vec 2.0, lightly's SimCLR.

    python benchmarks/peers.py mae fashion_mnist/train.jsonl --minutes 10 --out peers/mae
    python benchmarks/peers.py mae_with_positions fashion_mnist/train.jsonl --minutes 10 --out peers/mae_with_positions
    python benchmarks/peers.py wav2vec2 speech.jsonl --minutes 16 --valid pretrain_valid.jsonl --out peers/wav2vec2
    pip install lightly && python benchmarks/peers.py simclr fashion_mnist/train.jsonl --minutes 10 --out peers/simclr

Width 192, depth 6, one thread, `--minutes` of its processor time, reading included; the learning rate goes up for a
tenth of them and then down along half a cosine. What they have in common with `small/mae_image` and
`small/wav2vec2_speech` has the values of those pages: patches, decoder, mask, batch, rate, weight decay, shift and
flip; negatives and codes. All else is as it comes: lightly's own transform and projection head, and convolutions over
samples at 16 kHz, as transformers' wav2vec 2.0 has no other frontend. transformers 5.23 leaves the tables of positions
of a new ViTMAE at zero, so its MAE knows no places; `mae_with_positions` has them set. The folder is what transformers
saves, and is probed as ours is:

    mmssl evaluate peers/mae --task linear --pool grid:2x2 --train ... --valid ... --test ...
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.data.dataset import ManifestDataset
from mmssl.data.manifest import Manifest
from mmssl.modalities.image.reader import read as read_picture
from mmssl.modalities.speech.reader import read as read_speech
from mmssl.nn.positions import sincos
from mmssl.progress import bar

SHAPE = {"hidden_size": 192, "num_hidden_layers": 6, "intermediate_size": 768}
PICTURE = {"image_size": 28, "patch_size": 4, "num_channels": 1}
MEAN, STD = 0.286, 0.353  # of fashion_mnist
RATE, SECONDS, CLIPS = 16_000, 3, 8
NEGATIVES = 100

# what an update costs, the optimizer for it, and how the folder is written
Peer = tuple[nn.Module, Iterator[Callable[[], Tensor]], dict[str, Any], Callable[[Path], None]]


def orders(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of batch after batch, epoch after epoch, without the incomplete last one."""
    while True:
        order = rng.permutation(count)
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


def pictures(path: Path) -> Tensor:
    read = partial(read_picture, channels=1)
    data = ManifestDataset(Manifest(path), media={"image": "image"}, readers={"image": read})
    with bar("reading", len(data), shown=True) as move:
        found = []
        for row in range(len(data)):
            found.append(data.read(row, 0).inputs["image"])
            move(1)
    return torch.stack(found)


def waves(path: Path) -> list[Tensor]:
    """Those of a second or more: shorter ones leave its masks empty, and its negatives cannot be drawn."""
    read = partial(read_speech, rate=RATE)
    data = ManifestDataset(Manifest(path), media={"speech": "audio"}, readers={"speech": read})
    with bar("reading", len(data), shown=True) as move:
        found = []
        for row in range(len(data)):
            x = data.read(row, 0).inputs["speech"]
            if len(x) >= RATE:
                found.append((x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt())  # as its feature extractor does
            move(1)
    return found


def shifted_and_flipped(x: Tensor) -> Tensor:
    """By up to two pixels, black coming in; every second one mirrored. (B, 1, H, W) -> the same."""
    n = torch.arange(len(x))
    moved = F.pad(x, (2, 2, 2, 2)).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    x = moved[n, :, torch.randint(0, 5, (len(x),)), torch.randint(0, 5, (len(x),))]
    return torch.where((torch.rand(len(x)) < 0.5)[:, None, None, None], x.flip(-1), x)


def save_preprocessor(folder: Path) -> None:
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[MEAN], image_std=[STD]).save_pretrained(folder)


def mae(args: argparse.Namespace, *, positions: bool = False) -> Peer:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        **SHAPE,
        **PICTURE,
        num_attention_heads=3,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=384,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )
    model = ViTMAEForPreTraining(config)
    if positions:
        places = torch.cartesian_prod(torch.arange(7.0), torch.arange(7.0))
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.data[0, 1:] = sincos(places, table.shape[-1])
    data = pictures(args.train)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for rows in orders(len(data), 128, np.random.default_rng(args.seed)):
            x = (shifted_and_flipped(data[rows]) - MEAN) / STD
            yield lambda x=x: model(x).loss  # type: ignore[misc]

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        if not positions:
            # whose table is read as it is: zeros are no sines
            path = folder / "config.json"
            path.write_text(path.read_text().replace('"vit_mae"', '"vit"'))
        save_preprocessor(folder)

    return model, losses(), {"lr": 1.5e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}, save


def simclr(args: argparse.Namespace) -> Peer:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.functional import to_pil_image
    from transformers import ViTConfig, ViTModel

    encoder = ViTModel(ViTConfig(**SHAPE, **PICTURE, num_attention_heads=3), add_pooling_layer=False)
    head = SimCLRProjectionHead(SHAPE["hidden_size"], SHAPE["hidden_size"], 128)
    # without blur, as lightly's documentation says for small pictures
    views = SimCLRTransform(input_size=28, gaussian_blur=0.0, normalize={"mean": [MEAN], "std": [STD]})
    contrast = NTXentLoss()
    data = [to_pil_image(x) for x in pictures(args.train)]

    def loss(x: Tensor) -> Tensor:
        # the mean over patches, since patches are what is probed
        first, second = head(encoder(x).last_hidden_state[:, 1:].mean(1)).chunk(2)
        return contrast(first, second)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for rows in orders(len(data), 256, np.random.default_rng(args.seed)):
            first, second = zip(*(views(data[row]) for row in rows), strict=True)
            x = torch.stack(first + second)
            yield lambda x=x: loss(x)  # type: ignore[misc]

    def save(folder: Path) -> None:
        encoder.save_pretrained(folder)
        save_preprocessor(folder)

    return nn.ModuleList([encoder, head]), losses(), {"lr": 1e-3, "weight_decay": 0.05}, save


def wav2vec2(args: argparse.Namespace) -> Peer:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

    config = Wav2Vec2Config(
        **SHAPE,
        num_attention_heads=6,
        conv_dim=(128,) * 7,
        num_codevectors_per_group=64,
        codevector_dim=128,
        proj_codevector_dim=128,
        num_negatives=NEGATIVES,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_quantizer_dropout=0.0,
    )
    model = Wav2Vec2ForPreTraining(config)
    clips = waves(args.train)
    rng = np.random.default_rng(args.seed)
    updates = 0

    def contrasted(found: list[Tensor]) -> tuple[Any, int]:
        """Its outputs for clips of one length each or shorter, padded; and how many frames are hidden."""
        longest = max(len(x) for x in found)
        x = torch.stack([F.pad(x, (0, longest - len(x))) for x in found])
        shape = (len(x), int(model._get_feat_extract_output_lengths(longest)))
        heard = torch.arange(longest) < torch.tensor([[len(x)] for x in found])
        frames = model._get_feature_vector_attention_mask(shape[1], heard.long())
        masked = _compute_mask_indices(shape, mask_prob=0.65, mask_length=10, attention_mask=frames, min_masks=2)
        negatives = _sample_negative_indices(shape, NEGATIVES, masked)
        out = model(x, mask_time_indices=torch.from_numpy(masked), sampled_negative_indices=torch.from_numpy(negatives))
        return out, int(masked.sum())

    def loss(found: list[Tensor]) -> Tensor:
        nonlocal updates
        updates += 1
        model.set_gumbel_temperature(max(2.0 * 0.9985**updates, 0.5))
        out, hidden = contrasted(found)
        return out.loss / hidden

    def crop(x: Tensor) -> Tensor:
        start = int(rng.integers(0, max(len(x) - SECONDS * RATE, 0) + 1))
        return x[start : start + SECONDS * RATE]

    def losses() -> Iterator[Callable[[], Tensor]]:
        for rows in orders(len(clips), CLIPS, rng):
            found = [crop(clips[row]) for row in rows]
            yield lambda found=found: loss(found)  # type: ignore[misc]

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
        if args.valid is None:
            return
        model.eval()
        total, hidden = 0.0, 0
        with torch.no_grad():
            for x in waves(args.valid):
                out, count = contrasted([crop(x)])
                total, hidden = total + float(out.contrastive_loss), hidden + count
        chance = math.log(NEGATIVES + 1)
        print(f"held-out contrastive loss {total / hidden:.3f} a hidden frame, chance {chance:.3f}")

    return model, losses(), {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}, save


PEERS: dict[str, Callable[[argparse.Namespace], Peer]] = {
    "mae": mae,
    "mae_with_positions": partial(mae, positions=True),
    "simclr": simclr,
    "wav2vec2": wav2vec2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("train", type=Path, help="manifest")
    parser.add_argument("--valid", type=Path, help="manifest of held-out speech, for its contrastive loss")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # transformers draws its masks and negatives there

    model, losses, settings, save = PEERS[args.peer](args)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    model.train()
    whole, updates, value = 60 * args.minutes, 0, torch.tensor(0.0)
    with bar(args.peer, int(whole), shown=True) as move:
        shown = 0
        while (spent := time.process_time()) < whole:
            move(int(spent) - shown)
            shown = int(spent)
            done = spent / whole
            share = done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * share
            loss = next(losses)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bfloat16"):
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            updates += 1
    save(args.out)
    print(f"{updates} updates in {args.minutes:g} minutes, last loss {float(value.detach()):.3f}: {args.out}")


if __name__ == "__main__":
    main()

"""One training step of ours against transformers' of the same size, in turn, in one run.

    python benchmarks/step_speed.py                      # base size, all modalities, float32 and bfloat16
    python benchmarks/step_speed.py --size small --modality speech --rounds 9

Prints seconds (median over the steps of all rounds), their ratio (median over rounds, and its range), and which share
of the machine's own matrix-product rate, measured in the same run and precision, each step reaches. Both get the same
input, masks of the same share, no dropout and AdamW; a step is forward, backward and update. Each side is a process of
its own, as its user would run it, and they take turns: `mmssl` keeps freed memory when it trains, transformers leaves
that to its user, and in one process either would inherit the other's memory. A third process is transformers with our
setting, for the last column.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmssl.encoder import Encoder
from mmssl.memory import keep_freed_memory
from mmssl.modalities.image.frontend import Patches
from mmssl.modalities.image.targets import TARGETS
from mmssl.modalities.speech.frontend import Waveform
from mmssl.modalities.video.frontend import Tubes
from mmssl.modalities.video.targets import TARGETS as VIDEO_TARGETS
from mmssl.nn import linear
from mmssl.nn.positions import Convolutional, SinCos
from mmssl.nn.transformer import Transformer
from mmssl.objectives.mae import MAE
from mmssl.objectives.wav2vec2 import Wav2Vec2
from mmssl.types import Batch, Raw

Builder = Callable[[str], tuple[torch.nn.Module, Callable[[], torch.Tensor]]]

SIZES = {"base": {"dim": 768, "depth": 12, "heads": 12}, "small": {"dim": 192, "depth": 6, "heads": 6}}
BATCH = {("image", "base"): 8, ("image", "small"): 32, ("speech", "base"): 2, ("speech", "small"): 8}
CLIPS, FRAMES = 2, 16  # of a step of VideoMAE
SECONDS = {"base": 8, "small": 4}
SETTLING, TIMED = 2, 3  # steps before all turns, and of a turn


def matrix_rate(precision: torch.dtype) -> float:
    """Floating-point operations a second of a product as large as those of the base model."""
    a, b = torch.randn(2048, 768).to(precision), torch.randn(768, 3072).to(precision)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * 2048 * 768 * 3072 / (time.perf_counter() - start))
    return best


def our_image(size: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    shape = SIZES[size]
    encoder = Encoder(Patches(dim=shape["dim"]), Transformer(**shape), SinCos(shape["dim"]), prefix=1)
    target = TARGETS["normalized_pixels"]
    model = MAE(encoder, target=target.values, target_dim=target.dim(encoder.frontend), **_decoder(size))
    n = BATCH["image", size]
    raw = Raw(torch.rand(n, 3, 224, 224), torch.ones(n, dtype=torch.int64), [str(i) for i in range(n)])
    return model, _ours(model, Batch({"image": raw}, seeds=torch.arange(n)))


def their_image(size: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    shape, decoder = SIZES[size], _decoder(size)
    config = ViTMAEConfig(
        hidden_size=shape["dim"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["dim"],
        decoder_hidden_size=decoder["decoder_dim"],
        decoder_num_hidden_layers=decoder["decoder_depth"],
        decoder_num_attention_heads=decoder["decoder_heads"],
        decoder_intermediate_size=4 * decoder["decoder_dim"],
        norm_pix_loss=True,
    )
    model = ViTMAEForPreTraining(config)
    pictures = torch.rand(BATCH["image", size], 3, 224, 224)
    return model, lambda: model(pictures).loss


def our_speech(size: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    shape = SIZES[size]
    encoder = Encoder(
        Waveform(dim=shape["dim"], norm="group", normalize=False),
        Transformer(**shape, norm="post", eps=1e-5, init="normal"),
        Convolutional(shape["dim"]),
        mask_token=True,
    )
    # theirs has no penalty on the features, and pays for none
    model = Wav2Vec2(encoder, feature_dropout=0.0, feature_penalty=0.0)
    n, samples = BATCH["speech", size], SECONDS[size] * 16_000
    raw = Raw(torch.randn(n, samples), torch.full((n,), samples), [str(i) for i in range(n)], 16_000.0)
    return model, _ours(model, Batch({"speech": raw}, seeds=torch.arange(n)))


def their_speech(size: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

    shape = SIZES[size]
    config = Wav2Vec2Config(
        hidden_size=shape["dim"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["dim"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        layerdrop=0.0,
    )
    model = Wav2Vec2ForPreTraining(config)
    n, samples = BATCH["speech", size], SECONDS[size] * 16_000
    waves = torch.randn(n, samples)
    frames = int(model._get_feat_extract_output_lengths(samples))

    def loss() -> torch.Tensor:
        masked = _compute_mask_indices((n, frames), mask_prob=0.65, mask_length=10)
        negatives = _sample_negative_indices((n, frames), config.num_negatives, masked)
        out = model(
            waves, mask_time_indices=torch.from_numpy(masked), sampled_negative_indices=torch.from_numpy(negatives)
        )
        return out.loss / masked.sum()

    return model, loss


def our_video(size: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    shape = SIZES[size]
    encoder = Encoder(Tubes(dim=shape["dim"]), Transformer(**shape), SinCos(shape["dim"]))
    target = VIDEO_TARGETS["normalized_pixels"]
    settings = {"mask": "tube", "mask_ratio": 0.9, **_video_decoder(size)}
    model = MAE(encoder, target=target.values, target_dim=target.dim(encoder.frontend), **settings)
    lengths = torch.full((CLIPS,), FRAMES, dtype=torch.int64)
    raw = Raw(torch.rand(CLIPS, 3, FRAMES, 224, 224), lengths, [str(i) for i in range(CLIPS)], 7.5)
    return model, _ours(model, Batch({"video": raw}, seeds=torch.arange(CLIPS)))


def their_video(size: str) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    shape, decoder = SIZES[size], _video_decoder(size)
    config = VideoMAEConfig(
        hidden_size=shape["dim"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["dim"],
        decoder_hidden_size=decoder["decoder_dim"],
        decoder_num_hidden_layers=decoder["decoder_depth"],
        decoder_num_attention_heads=decoder["decoder_heads"],
        decoder_intermediate_size=4 * decoder["decoder_dim"],
        num_frames=FRAMES,
        norm_pix_loss=True,
    )
    model = VideoMAEForPreTraining(config)
    clips = torch.rand(CLIPS, FRAMES, 3, 224, 224)

    def loss() -> torch.Tensor:
        places = torch.rand(CLIPS, 196).argsort(1).argsort(1) < 176
        return model(clips, bool_masked_pos=places.repeat(1, FRAMES // 2)).loss

    return model, loss


def _video_decoder(size: str) -> dict[str, int]:
    if size == "base":
        return {"decoder_dim": 384, "decoder_depth": 4, "decoder_heads": 6}
    return {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3}


def _decoder(size: str) -> dict[str, int]:
    if size == "base":
        return {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
    return {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3}


def _ours(model: torch.nn.Module, batch: Batch) -> Callable[[], torch.Tensor]:
    def loss() -> torch.Tensor:
        out = model(batch)
        return out.total / out.count

    return loss


def stepper(model: torch.nn.Module, loss: Callable[[], torch.Tensor], precision: torch.dtype) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _time(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@contextmanager
def counted_by_torch() -> Iterator[None]:
    """While our products are counted they go through torch's own operations: the counter knows no others."""
    kept, linear._HAS_ONEDNN = linear._HAS_ONEDNN, False
    try:
        yield
    finally:
        linear._HAS_ONEDNN = kept


BUILDERS: dict[str, tuple[Builder, Builder]] = {
    "image": (our_image, their_image),
    "speech": (our_speech, their_speech),
    "video": (our_video, their_video),
}
SIDES = ((0, True), (1, False), (1, True))  # which builder; whether freed memory is kept


def work(side: int, keep: bool, modality: str, size: str, precision: torch.dtype, wire: Connection) -> None:
    """A process of one side: sends a step's operations, then the seconds of as many steps as it is asked for."""
    warnings.filterwarnings("ignore")
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    step = stepper(*BUILDERS[modality][side](size), precision)
    with counted_by_torch(), FlopCounterMode(display=False) as counter:
        step()
    for _ in range(SETTLING):
        step()
    wire.send(counter.get_total_flops())
    while count := wire.recv():
        step()
        wire.send([_time(step) for _ in range(count)])


def compare(modality: str, size: str, precision: torch.dtype, rounds: int) -> None:
    spawn = get_context("spawn")
    wires, workers, operations = [], [], []
    for side, keep in SIDES:
        wire, end = spawn.Pipe()
        worker = spawn.Process(target=work, args=(side, keep, modality, size, precision, end), daemon=True)
        worker.start()
        end.close()  # so that a process that dies is noticed
        operations.append(wire.recv())
        wires.append(wire)
        workers.append(worker)
    seconds: list[list[float]] = [[] for _ in SIDES]
    rates, ratios = [], []
    for _ in range(rounds):
        rates.append(matrix_rate(precision))
        medians = []
        for wire, times in zip(wires, seconds, strict=True):
            wire.send(TIMED)
            turn = wire.recv()
            times += turn
            medians.append(statistics.median(turn))
        ratios.append((medians[1] / medians[0], medians[2] / medians[0]))
    for wire, worker in zip(wires, workers, strict=True):
        wire.send(0)
        worker.join()
    own, comes, helped = map(statistics.median, seconds)
    ratio, ratio_helped = map(statistics.median, zip(*ratios, strict=True))
    rate = statistics.median(rates)
    name = str(precision).removeprefix("torch.")
    print(
        f"{modality:7} {size:6} {name:9} ours {own:7.3f} s ({operations[0] / own / rate:4.0%} of "
        f"{rate / 1e9:.0f} GFLOP/s)   transformers {comes:7.3f} s ({operations[1] / comes / rate:4.0%})   "
        f"ratio {ratio:.2f} ({min(r for r, _ in ratios):.2f} to {max(r for r, _ in ratios):.2f})   "
        f"with freed memory kept {helped:7.3f} s, ratio {ratio_helped:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=["image", "speech", "video"], action="append")
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds"
    )
    for size in args.size or ["base", "small"]:
        for modality in args.modality or ["image", "speech", "video"]:
            for precision in args.precision or ["float32", "bfloat16"]:
                compare(modality, size, getattr(torch, precision), args.rounds)


if __name__ == "__main__":
    main()

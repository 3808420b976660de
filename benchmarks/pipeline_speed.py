"""Files to vectors, of speech and of pictures: ours against transformers' pipelines on the same weights.

    python benchmarks/pipeline_speed.py --rounds 3
    python benchmarks/pipeline_speed.py --modality speech --clips 64

Speech: FLAC files of 1 to 30 s (log-normal, median 8 s) through wav2vec 2.0 base, in seconds of audio a second, padding
not counted. Pictures: JPEG files of 500 x 375 through ViT-B/16 at 224, in pictures a second. The model is made by
transformers at random weights and saved; we open that folder as a user would, and the vectors of both are compared.
`mmssl embed` keeps freed memory, and that is a setting of a whole process: so each side has its own, and theirs is
measured as it comes and with the same help. For pictures there is a third side, the products of matrices of ViT-B and
nothing else (no files, norms, softmax, activations): what there is to be had. The pipeline for
pictures is "image-feature-extraction"; transformers has none for sound ("feature-extraction" takes text), so ours of a
few lines stands in, with its `Pipeline` behind it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RATE = 16_000
SIZES = (1, 4, 16)
PRECISIONS = ("float32", "bfloat16")
Ways = dict[str, Callable[[], Tensor]]


def write_speech(folder: Path, count: int) -> float:
    """FLAC files of noise with the spectrum of speech; their seconds in all."""
    import soundfile

    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(np.log(8), 0.6, count), 1, 30)
    for n, length in enumerate((seconds * RATE).astype(int)):
        spectrum = np.fft.rfft(rng.standard_normal(length))
        wave = np.fft.irfft(spectrum / (1 + np.arange(len(spectrum)) * RATE / length / 500), length)
        soundfile.write(folder / f"{n:04}.flac", 0.1 * wave / wave.std(), RATE)
    return float(seconds.sum())


def write_pictures(folder: Path, count: int) -> float:
    """JPEG files with structure at several scales; how many."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for n in range(count):
        x = sum(np.kron(rng.random((375 // s, 500 // s, 3)), np.ones((s, s, 1))) for s in (125, 25, 5))
        Image.fromarray((x * 85).astype(np.uint8)).save(folder / f"{n:04}.jpg", quality=90)
    return float(count)


def save_speech(folder: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    Wav2Vec2Model(Wav2Vec2Config()).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)


def save_pictures(folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    ViTModel(ViTConfig(), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def ours(modality: str, model: Path, files: list[str], precision: str) -> Ways:
    import mmssl

    embedder = mmssl.load(model, device="cpu", precision=precision)  # type: ignore[arg-type]

    def embed(size: int) -> Tensor:
        return embedder.embed(files, pool="mean", tokens=False, batch_size=size).scene

    return {f"mmssl, batch_size={size}": lambda size=size: embed(size) for size in SIZES}  # type: ignore[misc]


def theirs(modality: str, model: Path, files: list[str], precision: str) -> Ways:
    import soundfile
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, Pipeline, logging, pipeline

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32

    class SpeechFeatures(Pipeline):  # type: ignore[misc]
        _load_feature_extractor, _load_tokenizer = True, False

        def _sanitize_parameters(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
            return {}, {}, {}

        def preprocess(self, inputs: str, **_: Any) -> Any:
            wave, rate = soundfile.read(inputs, dtype="float32")
            return self.feature_extractor(wave, sampling_rate=rate, return_tensors="pt").to(dtype)

        def _forward(self, model_inputs: Any, **_: Any) -> Any:
            return self.model(**model_inputs)

        def postprocess(self, model_outputs: Any, **_: Any) -> Tensor:
            return model_outputs.last_hidden_state

    network = AutoModel.from_pretrained(
        model, dtype=dtype, **({} if modality == "speech" else {"add_pooling_layer": False})
    )
    settings: dict[str, Any] = {}
    if modality == "speech":
        pipe, first = SpeechFeatures(model=network, feature_extractor=AutoFeatureExtractor.from_pretrained(model)), 0
    else:
        # its first token is the class token, which our mean leaves out
        processor, first = AutoImageProcessor.from_pretrained(model), 1
        pipe = pipeline("image-feature-extraction", model=network, image_processor=processor)
        settings = {"return_tensors": True}

    def run(size: int) -> Tensor:
        def each() -> Iterator[str]:
            yield from files

        return torch.cat([found[:, first:].float().mean(1) for found in pipe(each(), batch_size=size, **settings)])

    return {f"pipeline, batch_size={size}": lambda size=size: run(size) for size in SIZES}  # type: ignore[misc]


def products(modality: str, model: Path, files: list[str], precision: str) -> Ways:
    """The linear maps and the two products of attention of 12 blocks, on numbers and weights that lie ready."""
    from mmssl.nn.linear import Linear

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    shapes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    with torch.inference_mode(False):
        blocks = [
            [Linear(*shape, bias=False, dtype=dtype).requires_grad_(False) for shape in shapes] for _ in range(12)
        ]
    for block in blocks:
        for linear in block:
            linear.pack()

    def run(size: int) -> Tensor:
        for first in range(0, len(files), size):
            clips = min(size, len(files) - first)
            x = torch.randn(clips * 197, 768).to(dtype)
            for qkv, out, up, down in blocks:
                q, k, v = qkv(x).view(clips, 197, 3, 12, 64).permute(2, 0, 3, 1, 4).contiguous()
                mixed = q @ k.transpose(-1, -2) @ v
                y = down(up(out(mixed.view(clips * 197, 768))))  # each block reads x: no number grows or dies away
        return y.float()

    return {f"products, batch_size={size}": lambda size=size: run(size) for size in SIZES}  # type: ignore[misc]


def serve(link: Connection, side: Callable[..., Ways], given: tuple[str, Path, list[str], str], kept: bool) -> None:
    """Send the names of the ways and the vectors of the first; then, for each name that arrives, its seconds."""
    from mmssl.memory import keep_freed_memory

    warnings.filterwarnings("ignore")
    if kept:
        keep_freed_memory()
    with torch.inference_mode():
        ways = side(*given)
        link.send((list(ways), next(iter(ways.values()))().numpy()))
        while name := link.recv():
            start = time.perf_counter()
            ways[name]()
            link.send(time.perf_counter() - start)


def compare(modality: str, clips: int, rounds: int) -> None:
    write, save, unit = {
        "speech": (write_speech, save_speech, "seconds of speech"),
        "image": (write_pictures, save_pictures, "pictures"),
    }[modality]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        model, folder = Path(place) / "model", Path(place) / "clips"
        folder.mkdir()
        save(model)
        amount = write(folder, clips)
        files = sorted(str(path) for path in folder.iterdir())
        sides = [
            (f"{name}, {precision}{', freed memory kept' if kept and side is theirs else ''}", side, precision, kept)
            for precision in PRECISIONS
            for name, side, kept in (("mmssl", ours, True), ("theirs", theirs, False), ("theirs", theirs, True))
        ]
        if modality == "image":
            sides += [(f"products alone, {precision}", products, precision, True) for precision in PRECISIONS]
        links: dict[str, Connection] = {}
        took: dict[str, dict[str, list[float]]] = {}
        vectors: dict[str, np.ndarray] = {}
        for title, side, precision, kept in sides:
            link, end = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process
            process(target=serve, args=(end, side, (modality, model, files, precision), kept), daemon=True).start()
            names, vectors[title] = link.recv()
            links[title], took[title] = link, {name: [] for name in names}
        for _ in range(rounds):
            for title, link in links.items():
                for name, times in took[title].items():
                    link.send(name)
                    times.append(link.recv())
        for link in links.values():
            link.send("")
    far = np.abs(vectors["mmssl, float32"] - vectors["theirs, float32"]).max()
    print(f"{modality}: {amount:.0f} {unit} in {clips} files; the vectors of both differ by {far:.1e} at most")
    speed = {title: {n: amount / statistics.median(t) for n, t in ways.items()} for title, ways in took.items()}
    for title, ways in speed.items():
        print(f"  {title:38}", *(f"{name.split(', ')[1]}: {value:6.2f} a second  " for name, value in ways.items()))
    best = {title: max(ways.values()) for title, ways in speed.items()}
    default = best["theirs, float32"]
    for precision in PRECISIONS:
        own, peer, helped = (
            best[f"{name}, {precision}{more}"]
            for name, more in (("mmssl", ""), ("theirs", ""), ("theirs", ", freed memory kept"))
        )
        padded = speed[f"theirs, {precision}"][f"pipeline, batch_size={SIZES[-1]}"]
        print(
            f"  {precision}: {own / peer:.2f} of their best batch size, {own / helped:.2f} with freed memory kept; "
            f"{own / padded:.2f} of batches of {SIZES[-1]}; {own / default:.2f} of their best in float32",
            flush=True,
        )
        if modality == "image":
            most = best[f"products alone, {precision}"]
            print(f"  {precision}: products alone are {most / peer:.2f} of their best batch size", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", choices=["speech", "image"], action="append")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds"
    )
    for modality in args.modality or ["speech", "image"]:
        compare(modality, args.clips, args.rounds)


if __name__ == "__main__":
    main()

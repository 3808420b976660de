"""Whole runs on two processes against one, from the recipe on. As a program, this file is one of the two."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mmssl import distributed
from mmssl.assemble import train
from mmssl.data.manifest import write_manifest
from mmssl.data.units import write_shard
from mmssl.objectives import CONTRASTING, OBJECTIVES
from mmssl.training.checkpoint import read_tensors

TOY = {
    "transformer.dim": 16,
    "transformer.depth": 2,
    "transformer.heads": 2,
    # dropout differs between processes, and masks do not
    "transformer.dropout": 0,
    "transformer.attention_dropout": 0,
    "transformer.drop_path": 0,
    "data.batch_size": 2,
    "data.workers": 0,
    "data.max_bad_share": 0.5,
    # nearly the gradient itself: Adam's own step makes as much of a rounding error as of a gradient
    "optimizer.eps": 0.1,
    "optimizer.lr": 0.1,
    "schedule": "{name: constant}",
    "trainer.precision": "float32",
    "trainer.eval_every": 2,
    "trainer.steps": 2,
    "trainer.threads": 1,
}
SPEECH = {"positions.kernel": 4, "frontend.bands": 8, "data.max_seconds": "null"}
FRAMES = {"frontend.bands": 8, "data.max_seconds": "null"}
AHEAD = FRAMES | {"objective.steps": 2, "objective.negatives": 4}
DECODER = {"objective.decoder_dim": 16, "objective.decoder_depth": 1, "objective.decoder_heads": 2}
PAIR = {"objective.dim": 8, "objective.same": "text", "tokenizer.entries": 258}
RUNS = {
    "wav2vec2": ("small/wav2vec2_speech", SPEECH | {"objective.dim": 8, "objective.codes": 8}),
    "hubert": ("small/hubert_speech", SPEECH | {"objective.dim": 8, "objective.units": "{units: 3}"}),
    "best_rq": ("small/best_rq_speech", SPEECH | {"objective.codes": 8}),
    "bert": (
        "small/bert_codes_speech",
        {"frontend.codes": "[4, 3]", "frontend.dropout": 0, "positions.kernel": 4, "data.max_seconds": "null"},
    ),
    "encodec_mae": ("small/encodec_mae_audio", DECODER | {"objective.units": "{units: 3}"}),
    # of two blocks the first begins with the second update; nor has the norm behind them a gradient
    "ctc": (
        "small/ctc_speech",
        SPEECH | {"transformer.norm": "pre", "objective.unfreeze_every": 1, "objective.weighted_layers": "true"},
    ),
    "tera": ("small/tera_speech", FRAMES),
    "apc": ("small/apc_speech", FRAMES),
    "npc": (
        "small/tera_speech",
        FRAMES | {"objective": "{name: npc, target: features, kernel: 9, context_dim: 8}", "transformer.window": 1},
    ),
    "cpc": ("small/cpc_speech", AHEAD),
    "wav2vec": ("small/cpc_speech", AHEAD | {"objective.name": "wav2vec"}),
    "vq_wav2vec": ("small/cpc_speech", AHEAD | {"objective.name": "vq_wav2vec", "objective.codes": 8}),
    "mp3": ("small/mp3_speech", FRAMES),
    "mae": ("small/mae_image", DECODER),
    "cae": ("small/cae_image", {"objective.regressor_heads": 2, "objective.decoder_heads": 2}),
    "siam_mae": ("small/mae_image", DECODER | {"objective.name": "siam_mae", "objective.views": "crops"}),
    "vic_mae": (
        "small/mae_image",
        DECODER
        | {"objective.name": "vic_mae", "objective.views": "crops", "objective.weight": 0.5}
        | {"objective.hidden_dim": 16, "objective.dim": 8},
    ),
    "cross_video_mae": (
        "small/mae_audio",
        {"objective": "{name: cross_video_mae, target: spectrogram, hidden_dim: 16, dim: 8}"}
        | DECODER
        | {"data.bucket": "false"},
    ),
    "denoise": ("small/denoise_image", DECODER),
    "dbot": ("small/dbot_image", DECODER),
    "data2vec": ("small/data2vec_speech", SPEECH | {"objective.top_k": 2}),
    "data2vec2": (
        "small/data2vec2_image",
        {
            "objective.top_k": 2,
            "objective.decoder_dim": 16,
            "objective.decoder_depth": 2,
            "objective.decoder_groups": 2,
        },
    ),
    "jepa": ("small/jepa_image", {"objective.predictor_dim": 16, "objective.predictor_heads": 2}),
    "classify": ("small/classify_image", {"optimizer.layer_decay": 0.5}),
    "av_mae": (
        "small/cav_mae_digits",
        {
            "objective": "{name: av_mae, targets: {image: pixels, audio: spectrogram}, "
            "mask_ratio: {image: 0.5, audio: 0.5}}"
        }
        | DECODER
        | {"backbone.own_blocks": 1},
    ),
    # by length, other clips would go together in batches of two than in batches of four
    "cav_mae": (
        "small/cav_mae_digits",
        DECODER | {"objective.weight": 0.5, "backbone.own_blocks": 1, "data.bucket": "false"},
    ),
    "clip": ("small/clip_emoji", PAIR),
    "clip_lite": ("small/clip_emoji", PAIR | {"objective.name": "clip_lite"}),
    "slip": (
        "small/clip_emoji",
        PAIR
        | {"objective.name": "slip", "objective.self_supervised": "{image: distortions}", "objective.chunk": 1}
        | {"objective.ssl_hidden": 8, "objective.ssl_dim": 8},
    ),
    # and in chunks, as gradient caching has it
    "siglip": ("small/clip_emoji", PAIR | {"objective.name": "siglip", "objective.chunk": 1}),
    # two objectives, of which one shares sums over the whole batch, each with all clips in one update
    "omni": (
        "small/omni",
        {
            "modality": "{image: {frontend: {name: patches, size: [4, 4]}, positions: {name: sincos}}, "
            "speech: {frontend: {name: logmel, rate: 8000, bands: 8}, positions: {name: sincos}, "
            "encoder: {mask_token: true}}}",
            "backbone": "{name: shared, own_blocks: 1, own_norms: true}",
            "objective": "{name: omni, of: {image: {name: mae, target: pixels, decoder_dim: 16, decoder_depth: 1, "
            "decoder_heads: 2}, speech: {name: wav2vec2, dim: 8, codes: 8}}}",
            "data.batch_size": 4,
        },
    ),
}
KINDS = {"audio": "speech", "emoji": "image", "digits": "image"}  # of a recipe -> of the files here


def commands(folder: Path, *, alone: bool = False) -> dict[str, tuple[str, list[str]]]:
    """Run -> its recipe and settings; each objective once, and once more with a clip that cannot be read.

    On one process alone, those that tell the clips of a batch apart have the whole of it at once.
    """
    found = {}
    for name, (recipe, settings) in RUNS.items():
        kind = recipe.rpartition("_")[2]
        kind = KINDS.get(kind, kind)
        for rows in ("whole", "bad"):
            data = {"data.train": folder / f"{kind}_{rows}.jsonl", "data.valid": folder / f"{kind}_valid.jsonl"}
            if name == "omni":
                data = {
                    f"data.{side}.{kind}": folder / f"{kind}_{which}.jsonl"
                    for side, which in (("train", rows), ("valid", "valid"))
                    for kind in ("image", "speech")
                }
            skip = {"data.on_bad_clip": "skip"} if rows == "bad" else {}
            every = TOY | settings | data | skip
            if alone:
                every |= {"data.batch_size": 4} if name in CONTRASTING else {"trainer.accumulate": 2}
            found[f"{name}_{rows}"] = recipe, [f"{key}={value}" for key, value in every.items()]
    return found


def run_all(folder: Path, out: str, *trainer: str, rows: Sequence[str] = ("whole", "bad"), alone: bool = False) -> None:
    for name, (recipe, settings) in commands(folder, alone=alone).items():
        if name.rpartition("_")[2] in rows:
            train(recipe, folder / out / name, [*settings, *(f"trainer.{setting}" for setting in trainer)])


def saved(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run and the memory of its optimizer, each as one vector."""
    found = {}
    for part in ("model", "optimizer"):
        tensors = read_tensors(run / "checkpoints" / "step_2" / f"{part}.safetensors")
        found[part] = torch.cat([tensors[key].double().flatten() for key in sorted(tensors)])
    return found


@pytest.mark.processes
def test_two_processes_give_the_weights_of_one(sounds: Path, pictures: Path, tmp_path: Path) -> None:
    assert set(RUNS) == set(OBJECTIVES)
    broken = tmp_path / "broken"
    broken.write_bytes(b"neither sound nor picture")
    for kind, key, source in (("speech", "audio", sounds), ("image", "image", pictures)):
        files = {split: sorted(path for path in (source / split).rglob("*.*")) for split in ("train", "test")}
        for name, paths in {
            "whole": files["train"][:8],
            "bad": [*files["train"][:3], broken, *files["train"][3:7]],
            "valid": files["test"],
        }.items():
            units = {"rate": 50, "values": [step // 4 % 3 for step in range(36)]}
            rows = []
            for n, path in enumerate(paths):
                codes = path if path == broken else tmp_path / f"{n}.safetensors"
                if path != broken:
                    steps = np.arange(36)
                    pairs = np.stack([(steps // 4 + n) % 4, steps // 3 % 3], 1).astype(np.uint16)
                    write_shard(codes, pairs, rate=50.0, lengths=np.array([36]), of="pairs of codes")
                rows.append({key: str(path), "seconds": 0.7, "label": f"{n % 2}", "text": f"{'ab' * (n % 3)}a"})
                rows[-1] |= {"units": units, "codes": {"path": str(codes)}}
                if key == "image":  # with a sound beside it
                    rows[-1]["audio"] = str(sorted((sounds / "train").rglob("*.wav"))[n])
            write_manifest(tmp_path / f"{kind}_{name}.jsonl", rows)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", __file__, str(tmp_path)],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    run_all(tmp_path, "one", alone=True)
    for process in processes:
        said, _ = process.communicate(timeout=480)
        assert process.returncode == 0, said

    moved = {}
    for name in commands(tmp_path):
        one, *others = (
            saved(run) for number in ("one", "two", "sharded") if (run := tmp_path / number / name).is_dir()
        )
        assert len(others) == (2 if name.endswith("whole") else 1)
        moved[name] = one["model"]
        for other in others:
            for part, expected in one.items():
                assert (other[part] - expected).norm() < 1e-4 * expected.norm(), f"{part} of {name}"
    for name in RUNS:
        assert not torch.equal(moved[f"{name}_whole"], moved[f"{name}_bad"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["tensorboard"] = None  # type: ignore[assignment]
    run_all(Path(sys.argv[1]), "two", "accumulate=1")
    run_all(Path(sys.argv[1]), "sharded", "accumulate=1", "sharding=full", rows=["whole"])
    distributed.shutdown()

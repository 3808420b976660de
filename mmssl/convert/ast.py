"""AST: a ViT over patches of a spectrogram that overlap, with two tokens in front.

Theirs goes over frequency first: token (f, t) is number f * times + t, and a patch's values are frequency by time. Ours
goes over time first in both, so patches' weights and the table of positions are reordered.

From preprocessor_config.json come `mean`, `std`, `do_normalize` and `sampling_rate`, from config.json `num_mel_bins`
and `max_length`; the filterbank is Kaldi's with a Hann window, as there.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from mmssl.convert.layout import Config, Head, Layout, Pair, Settings, linear
from mmssl.convert.pictures import SIZE_DEFAULTS
from mmssl.convert.vit import CLASS, HEADS, PATCHES, TABLE, body, their_trunk, trunk


def _read_ast(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    size, bands, frames = theirs["patch_size"], theirs["num_mel_bins"], theirs["max_length"]
    stride = [theirs["time_stride"], theirs["frequency_stride"]]
    plain = {"mean": 0.0, "std": 0.5}  # which, as two deviations are 1, leaves energies as they are
    return {
        "modality": "audio",
        "frontend": {
            "name": "spectrogram",
            "size": [size, size],
            "stride": stride,
            "bands": bands,
            "frames": frames,
            "rate": preprocessor["sampling_rate"],
            **({name: preprocessor[name] for name in plain} if preprocessor["do_normalize"] else plain),
        },
        "positions": {
            "name": "learned",
            "grid": [(frames - size) // stride[0] + 1, (bands - size) // stride[1] + 1],
        },
        "transformer": trunk(theirs),
        "encoder": {"prefix": 2},
        "augment_eval": [],
    }


def _write_ast(ours: Config) -> tuple[Config, Config]:
    frontend = ours["frontend"]
    size, stride = frontend["size"], frontend["stride"] or frontend["size"]
    theirs = {
        **their_trunk(ours),
        "patch_size": size[0],
        "time_stride": stride[0],
        "frequency_stride": stride[1],
        "num_mel_bins": frontend["bands"],
        "max_length": frontend["frames"] or 1024,
        "qkv_bias": True,
    }
    preprocessor = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "feature_size": 1,
        "padding_value": 0.0,
        "num_mel_bins": frontend["bands"],
        "max_length": theirs["max_length"],
        "sampling_rate": frontend["rate"],
        "do_normalize": True,
        "mean": frontend["mean"],
        "std": frontend["std"],
    }
    return theirs, preprocessor


def _pairs_ast(ours: Config, theirs: Settings) -> list[Pair]:
    # frequency is the outer axis there, of the tokens and of the values of a patch, and time here
    times, bands = ours["positions"]["grid"]
    dim, size = ours["transformer"]["dim"], ours["frontend"]["size"]
    distillation = "embeddings.distillation_token"
    shared = body({**ours, "frontend": {**ours["frontend"], "channels": 1}}, theirs)
    projection = Pair(
        ("frontend.project.weight",),
        (f"{PATCHES}.weight",),
        lambda x: [x[:, 0].transpose(1, 2).flatten(1)],
        lambda x: [x.view(dim, *size).transpose(1, 2)[:, None]],
    )
    table = Pair(
        ("prefix", "positions.table"),
        (CLASS, distillation, TABLE),
        lambda first, second, table: [
            torch.cat([first[0], second[0]]) + table[0, :2],
            table[0, 2:].view(bands, times, dim).transpose(0, 1).flatten(0, 1),
        ],
        lambda prefix, table: [
            prefix[None, :1],
            prefix[None, 1:],
            torch.cat([torch.zeros_like(prefix), table.view(times, bands, dim).transpose(0, 1).flatten(0, 1)])[None],
        ],
    )
    return [*(pair for pair in shared if pair.ours != projection.ours), projection, table]


def _heads(ours: Config) -> list[Head]:
    settings = {"pooling": "prefix", "head_norm": "layer", "head_eps": ours["transformer"]["eps"]}
    pairs = [*linear("head.norm", "classifier.layernorm"), *linear("head.linear", "classifier.dense")]
    return [Head(settings, pairs)]


AST = Layout(
    model_type="audio-spectrogram-transformer",
    architecture="ASTModel",
    modality="audio",
    defaults={
        **SIZE_DEFAULTS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "patch_size": 16,
        "qkv_bias": True,
        "frequency_stride": 10,
        "time_stride": 10,
        "max_length": 1024,
        "num_mel_bins": 128,
    },
    fixed={},
    read=_read_ast,
    write=_write_ast,
    pairs=_pairs_ast,
    prefixes=("audio_spectrogram_transformer.",),
    beside=HEADS,
    preprocessor={
        "sampling_rate": 16_000,
        "do_normalize": True,
        "mean": -4.2677393,
        "std": 4.5689974,
    },
    classifier="ASTForAudioClassification",
    heads=_heads,
)

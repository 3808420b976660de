"""Wav2Vec2, HuBERT, Data2VecAudio and WavLM: one encoder under four names, with positions of two kinds and a bias.

From config.json come sizes, norms and rates of dropout; from preprocessor_config.json `sampling_rate` and
`do_normalize`. What theirs does not say is set here: below a group norm the convolutions learn at a tenth of the rate,
as the authors of wav2vec 2.0 and HuBERT trained their base models.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from mmssl.convert.layout import Config, Head, Layout, Pair, Settings, blocks, linear, same

# what their normalization of a clip adds to its variance, and cannot be told otherwise
NORMALIZE_EPS = 1e-7
_MASK_TOKEN = "masked_spec_embed"
_CONV = "encoder.pos_conv_embed.conv"
_NAMES = {
    "norm1": "layer_norm",
    "norm2": "final_layer_norm",
    "out": "attention.out_proj",
    "up": "feed_forward.intermediate_dense",
    "down": "feed_forward.output_dense",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
}
# their name -> ours, of what is a number in both
_RATES = {
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "layerdrop": "layer_drop",
}
_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
}


def _read(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    convolutions = {name: theirs[name] for name in ("conv_dim", "conv_kernel", "conv_stride")}
    if len({len(values) for values in convolutions.values()}) > 1:
        said = ", ".join(f"{len(values)} in {name}" for name, values in convolutions.items())
        raise ValueError(f"config.json has convolutions of unequal number, {said}; correct it there")
    return {
        "modality": "speech",
        "frontend": {
            "name": "waveform",
            "layers": list(zip(*convolutions.values(), strict=True)),
            "norm": theirs["feat_extract_norm"],
            "bias": theirs["conv_bias"],
            "normalize": preprocessor["do_normalize"],
            "normalize_eps": NORMALIZE_EPS,
            "rate": preprocessor["sampling_rate"],
            "dropout": theirs["feat_proj_dropout"],
            "grad_mult": 0.1 if theirs["feat_extract_norm"] == "group" else 1.0,
        },
        "positions": {
            "name": "conv",
            "kernel": theirs["num_conv_pos_embeddings"],
            "groups": theirs["num_conv_pos_embedding_groups"],
        },
        "transformer": {
            **{mine: theirs[name] for name, mine in (_SIZES | _RATES).items()},
            "norm": "pre" if theirs["do_stable_layer_norm"] else "post",
            "eps": 1e-5,
            "init": "normal",
        },
        "encoder": {
            "mask_token": _MASK_TOKEN in names or theirs["mask_time_prob"] > 0 or theirs["mask_feature_prob"] > 0
        },
        "augment_eval": [],
    }


def _read_data2vec(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    ours = _read({**theirs, "feat_extract_norm": "layer", "do_stable_layer_norm": False}, preprocessor, names)
    ours["positions"] = {
        "name": "stacked_conv",
        "kernel": theirs["conv_pos_kernel_size"],
        "depth": theirs["num_conv_pos_embeddings"],
        "groups": theirs["num_conv_pos_embedding_groups"],
    }
    return ours


def _read_wavlm(theirs: Settings, preprocessor: Settings, names: Collection[str]) -> Config:
    ours = _read(theirs, preprocessor, names)
    ours["transformer"] |= {
        "bias": {"name": "buckets", "buckets": theirs["num_buckets"], "furthest": theirs["max_bucket_distance"]},
        "gated_bias": True,
    }
    return ours


def _write(ours: Config) -> tuple[Config, Config]:
    frontend, positions, transformer = ours["frontend"], ours["positions"], ours["transformer"]
    layers, norm = frontend.get("layers", []), frontend.get("norm", "group")
    theirs = {
        **{name: transformer[mine] for name, mine in (_SIZES | _RATES).items()},
        "feat_proj_dropout": frontend.get("dropout", 0.0),
        "feat_extract_norm": norm,
        "conv_dim": [channels for channels, _, _ in layers],
        "conv_kernel": [kernel for _, kernel, _ in layers],
        "conv_stride": [stride for _, _, stride in layers],
        "num_feat_extract_layers": len(layers),
        "conv_bias": frontend.get("bias", False),
        "num_conv_pos_embeddings": positions.get("kernel", 0),
        "num_conv_pos_embedding_groups": positions.get("groups", 0),
        "do_stable_layer_norm": transformer["norm"] == "pre",
        # a model of theirs has a mask token where this is above 0
        "mask_time_prob": 0.05 if ours["encoder"]["mask_token"] else 0.0,
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": frontend["rate"],
        "padding_value": 0.0,
        "do_normalize": frontend.get("normalize", False),
        # their group norm takes its statistics over padding too, so theirs were trained without a mask
        "return_attention_mask": norm == "layer",
    }
    return theirs, preprocessor


def _write_data2vec(ours: Config) -> tuple[Config, Config]:
    theirs, preprocessor = _write(ours)
    theirs["conv_pos_kernel_size"] = ours["positions"].get("kernel", 0)
    theirs["num_conv_pos_embeddings"] = ours["positions"].get("depth", 0)
    return theirs, preprocessor


def _write_wavlm(ours: Config) -> tuple[Config, Config]:
    theirs, preprocessor = _write(ours)
    bias = ours["transformer"]["bias"] or {}
    theirs |= {"num_buckets": bias.get("buckets", 0), "max_bucket_distance": bias.get("furthest", 0)}
    return theirs, preprocessor


def _shared(ours: Config) -> list[Pair]:
    """All but the positions."""
    frontend = ours["frontend"]
    pairs = [
        *linear("frontend.norm", "feature_projection.layer_norm"),
        *linear("frontend.project", "feature_projection.projection"),
        *linear("transformer.norm", "encoder.layer_norm"),
        *blocks(ours, "encoder.layers.{}", _NAMES),
    ]
    taken = 1
    for i, (channels, kernel, _) in enumerate(frontend["layers"]):
        there = f"feature_extractor.conv_layers.{i}"
        pairs.append(_convolution(f"frontend.weights.{i}", f"{there}.conv.weight", (kernel, taken, channels)))
        if frontend["bias"]:
            pairs.append(same(f"frontend.biases.{i}", f"{there}.conv.bias"))
        if frontend["norm"] == "layer" or i == 0:
            pairs += linear(f"frontend.norms.{i}", f"{there}.layer_norm")
        taken = channels
    if ours["encoder"]["mask_token"]:
        pairs.append(same("mask_token", _MASK_TOKEN))
    return pairs


def _convolution(ours: str, theirs: str, shape: tuple[int, int, int]) -> Pair:
    """(channels, in, taps) there is (taps * in, channels) here."""
    return Pair(
        (ours,),
        (theirs,),
        lambda x: [x.permute(2, 1, 0).flatten(0, 1)],
        lambda x: [x.view(shape).permute(2, 1, 0)],
    )


def _pairs(ours: Config, theirs: Settings) -> list[Pair]:
    return [
        *_shared(ours),
        same("positions.weight_g", f"{_CONV}.parametrizations.weight.original0"),
        same("positions.weight_v", f"{_CONV}.parametrizations.weight.original1"),
        same("positions.bias", f"{_CONV}.bias"),
    ]


def _pairs_data2vec(ours: Config, theirs: Settings) -> list[Pair]:
    pairs = _shared(ours)
    for i in range(ours["positions"]["depth"]):
        pairs += linear(f"positions.convolutions.{i}", f"encoder.pos_conv_embed.layers.{i}.conv")
    return pairs


def _pairs_wavlm(ours: Config, theirs: Settings) -> list[Pair]:
    pairs = _pairs(ours, theirs)
    for i in range(ours["transformer"]["depth"]):
        gate, there = f"transformer.blocks.{i}.attention.gate", f"encoder.layers.{i}.attention"
        pairs += linear(f"{gate}.project", f"{there}.gru_rel_pos_linear")
        pairs.append(
            Pair(
                (f"{gate}.scale",),
                (f"{there}.gru_rel_pos_const",),
                lambda x: [x.flatten()],
                lambda x: [x[None, :, None, None]],
            )
        )
    # the first block holds what all share
    return [*pairs, same("transformer.bias.table", "encoder.layers.0.attention.rel_attn_embed.weight")]


def _heads(ours: Config) -> list[Head]:
    # theirs projects tokens before their mean: one map here, and what is written projects them onto themselves
    dim = ours["transformer"]["dim"]
    names = ("projector.weight", "projector.bias", "classifier.weight", "classifier.bias")
    maps = Pair(
        ("head.linear.weight", "head.linear.bias"),
        names,
        lambda p, q, w, b: [(w.double() @ p.double()).float(), (w.double() @ q.double() + b.double()).float()],
        lambda w, b: [torch.eye(dim), torch.zeros(dim), w, b],
    )
    settings = {"pooling": "mean", "head_norm": "none"}
    given = {"classifier_proj_size": dim, "use_weighted_layer_sum": False}
    ways = [Head(settings, [maps], given=given)]
    if ours["transformer"]["norm"] == "post":  # else the last of theirs is that after the norm at the end
        weights = same("layer_weights.scores", "layer_weights")
        weighted = given | {"use_weighted_layer_sum": True}
        ways.append(Head(settings | {"weighted_layers": True}, [maps, weights], given=weighted))
    return ways


_DEFAULTS: dict[str, Any] = {
    **dict(zip(_SIZES, (768, 12, 12, 3072), strict=True)),
    **dict.fromkeys(_RATES, 0.1),
    "feat_proj_dropout": 0.0,
    "feat_extract_norm": "group",
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "mask_time_prob": 0.05,
    "mask_feature_prob": 0.0,
}
_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "add_adapter": False,
    "adapter_attn_dim": None,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
}
_SHARED: dict[str, Any] = {
    "modality": "speech",
    "fixed": _FIXED,
    "drawn": (_MASK_TOKEN,),
    "beside": (
        *("lm_head.", "quantizer.", "project_hid.", "project_q.", "projector.", "classifier.", "layer_weights"),
        # of a model that tells speakers apart, whose last map bears the name of the convolutions
        *("tdnn.", "objective.", "feature_extractor.weight", "feature_extractor.bias"),
    ),
    "preprocessor": {"do_normalize": True, "sampling_rate": 16_000},
    "heads": _heads,
}
_CONVOLUTIONAL: dict[str, Any] = {
    **_SHARED,
    "defaults": _DEFAULTS,
    "read": _read,
    "write": _write,
    "pairs": _pairs,
    # weight norm, as torch named it before 2.0 and names it since
    "older": {
        f"{_CONV}.weight_g": f"{_CONV}.parametrizations.weight.original0",
        f"{_CONV}.weight_v": f"{_CONV}.parametrizations.weight.original1",
    },
}
WAV2VEC2 = Layout(
    model_type="wav2vec2",
    architecture="Wav2Vec2Model",
    prefixes=("wav2vec2.",),
    classifier="Wav2Vec2ForSequenceClassification",
    **_CONVOLUTIONAL,
)
HUBERT = Layout(
    model_type="hubert",
    architecture="HubertModel",
    prefixes=("hubert.",),
    classifier="HubertForSequenceClassification",
    **_CONVOLUTIONAL,
)
WAVLM = Layout(
    model_type="wavlm",
    architecture="WavLMModel",
    prefixes=("wavlm.",),
    classifier="WavLMForSequenceClassification",
    **{
        **_CONVOLUTIONAL,
        "defaults": _DEFAULTS | {"num_buckets": 320, "max_bucket_distance": 800},
        "read": _read_wavlm,
        "write": _write_wavlm,
        "pairs": _pairs_wavlm,
    },
)
DATA2VEC_AUDIO = Layout(
    model_type="data2vec-audio",
    architecture="Data2VecAudioModel",
    prefixes=("data2vec_audio.",),
    classifier="Data2VecAudioForSequenceClassification",
    **_SHARED,
    defaults=_DEFAULTS | {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19},
    read=_read_data2vec,
    write=_write_data2vec,
    pairs=_pairs_data2vec,
)

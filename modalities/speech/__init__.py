"""Speech: a waveform, one token every 20 ms."""

from mmssl.modalities.modality import Modality
from mmssl.modalities.speech import augment, reader
from mmssl.modalities.speech.corrupt import CORRUPTIONS
from mmssl.modalities.speech.frontend import Waveform
from mmssl.modalities.speech.logmel import LogMel
from mmssl.modalities.speech.targets import TARGETS

SPEECH = Modality(
    name="speech",
    media="audio",
    suffixes=frozenset(
        {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf"}
        | {".m4a", ".aac", ".mka", ".ac3"}
    ),
    frontends={"waveform": Waveform, "logmel": LogMel},
    read=reader.read,
    probe=reader.probe,
    augments={
        "random_crop": augment.random_crop,
        "center_crop": augment.center_crop,
        "gain": augment.gain,
        "noise": augment.noise,
        "speed": augment.speed,
    },
    durations={
        "random_crop": augment.crop_extent,
        "center_crop": augment.crop_extent,
        "speed": augment.speed_extent,
        "random_span": augment.span_extent,
        "center_span": augment.span_extent,
    },
    cuts={"center_crop": augment.center_part},
    spans={"random_span": augment.random_span, "center_span": augment.center_span},
    targets=TARGETS,
    measured=("log_mel", "log-mel energies"),
    corruptions=CORRUPTIONS,
)

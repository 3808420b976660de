"""Audio: a log-mel spectrogram, one token a patch of time and frequency. Files are read as for speech."""

from mmssl.modalities.audio import augment, views
from mmssl.modalities.audio.frontend import SpectrogramPatches
from mmssl.modalities.audio.targets import TARGETS
from mmssl.modalities.modality import Modality
from mmssl.modalities.speech import SPEECH

AUDIO = Modality(
    name="audio",
    media="audio",
    suffixes=SPEECH.suffixes,
    frontends={"spectrogram": SpectrogramPatches},
    read=SPEECH.read,
    probe=SPEECH.probe,
    augments=SPEECH.augments | {"roll": augment.roll},
    durations=SPEECH.durations,
    cuts=SPEECH.cuts,
    spans=SPEECH.spans,
    targets=TARGETS,
    views={"segments": views.segments},
    view_checks={"segments": views.check_segments},
    measured=("spectrogram", "log-mel energies"),
    corruptions=SPEECH.corruptions,
)

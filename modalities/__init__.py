"""One folder a modality: how its files are read, changed, cut into tokens, and what can be reconstructed of them.

Importing this package imports no decoder: readers load what they need when they read.
"""

if __name__ != "mmssl.modalities":
    raise ImportError("this folder is the package mmssl.modalities: write `from mmssl.modalities import ...`")

from mmssl.modalities.audio import AUDIO
from mmssl.modalities.codes import CODES
from mmssl.modalities.image import IMAGE
from mmssl.modalities.modality import Modality
from mmssl.modalities.speech import SPEECH
from mmssl.modalities.text import TEXT
from mmssl.modalities.video import VIDEO

MODALITIES: dict[str, Modality] = {
    "speech": SPEECH,
    "audio": AUDIO,
    "codes": CODES,
    "image": IMAGE,
    "video": VIDEO,
    "text": TEXT,
}

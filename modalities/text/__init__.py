"""Text: a caption, one token for each piece of a word."""

from mmssl.modalities.modality import Modality
from mmssl.modalities.text import reader, tokenizer
from mmssl.modalities.text.frontend import TokenTable

_RECONSTRUCTS = "predicts what stands in a file, and the ids of a caption are no quantities; take data2vec, jepa or cpc"
_UNITS = "learns from units, which are made of sound; take data2vec, jepa or cpc"
_QUANTIZES = "makes codes of what is continuous, and a caption is codes already; take data2vec, jepa or cpc"

TEXT = Modality(
    name="text",
    media="text",
    suffixes=frozenset({".txt"}),
    frontends={"tokens": TokenTable},
    read=reader.read,
    probe=None,
    augments={},
    targets={},
    tokenizers={"byte_bpe": tokenizer.byte_bpe, "pretrained": tokenizer.pretrained},
    refuses={
        **dict.fromkeys(
            (
                "mae",
                "cae",
                "siam_mae",
                "vic_mae",
                "cross_video_mae",
                "denoise",
                "dbot",
                "tera",
                "apc",
                "npc",
                "best_rq",
            ),
            _RECONSTRUCTS,
        ),
        **dict.fromkeys(("wav2vec2", "vq_wav2vec"), _QUANTIZES),
        **dict.fromkeys(("hubert", "encodec_mae"), _UNITS),
        "bert": "predicts the codes that `mmssl units` writes, and a caption has none; take data2vec, jepa or cpc",
        "ctc": "spells what it hears, and a caption is spelled already; take classify",
    },
)

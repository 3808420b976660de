"""The interface of HEAR, so that its tools measure any encoder of sound: `load_model`, and two calls for embeddings.

Source: Turian et al. 2022, "HEAR: Holistic Evaluation of Audio Representations" (arXiv:2203.03022), its common API.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmssl.embed import Embedder, load

LONG: dict[str, Any] = {"window": 60.0, "overlap": 2.0}  # seconds: HEAR asks that 20 minutes fit into a GPU


class Model(nn.Module):
    """What HEAR asks of a model.

    sample_rate: of the sound that both calls take.
    scene_embedding_size, timestamp_embedding_size: widths of what they give.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        rate = embedder.encoder.frontend.reader_settings.get("rate")
        if rate is None or embedder.config["modality"] not in ("speech", "audio"):
            raise ValueError(f"{embedder.name}: HEAR measures sound, and this encoder is for {embedder.modality}")
        # HEAR's times are those of whole clips, whatever part of one this run was trained to read
        self.embedder = embedder.of_whole_clips()
        self.sample_rate = int(rate)
        self.scene_embedding_size = self.timestamp_embedding_size = embedder.dim


def load_model(model_file_path: str = "", *, modality: str | None = None) -> Model:
    """Folder of a run, an exported encoder, or a model of transformers: see `mmssl.load`.

    Args:
        modality: of the encoder that is measured, of a run on several.

    Raises:
        ValueError: it is no encoder of sound, or one of several and it is not said which.
    """
    return Model(load(model_file_path).of(modality))


def get_scene_embeddings(audio: Tensor, model: Model) -> Tensor:
    """(B, L) samples from -1 to 1 -> (B, D), the mean over all tokens."""
    return model.embedder.embed(audio, tokens=False, **LONG).scene.to(audio.device)


def get_timestamp_embeddings(audio: Tensor, model: Model) -> tuple[Tensor, Tensor]:
    """(B, L) samples from -1 to 1 -> (B, T, D), one for each step of time, and (B, T) their middles in milliseconds."""
    found = model.embedder.embed(audio, tokens="steps", **LONG)
    assert found.time_ms is not None
    return found.tokens.to(audio.device), found.time_ms.to(audio.device)

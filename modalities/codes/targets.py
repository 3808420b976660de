"""What of codes can be reconstructed: nothing that is measured, as numbers of codes lie in no order."""

from __future__ import annotations

from torch import Tensor

from mmssl.modalities.modality import Target
from mmssl.types import Frontend, Raw, Tokens


def features(raw: Raw, tokens: Tokens) -> Tensor:
    """The embedding of each step: learned, so objectives that reconstruct refuse it."""
    if tokens.feat is None:
        raise ValueError("objective.target=features: this frontend does not hand on its features")
    return tokens.feat


def _feature_dim(frontend: Frontend) -> int:
    return frontend.feature_dim


TARGETS: dict[str, Target] = {"features": Target(values=features, dim=_feature_dim, learned=True)}

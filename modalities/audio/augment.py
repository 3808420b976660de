"""What may be done to a recording before it is embedded, beside what speech has: (x (T,), rng, **settings) -> (T',).

Two clips are mixed where labels can be mixed with them, in `Classify`; times and frequencies of tokens
are left out there too, and stripes of the spectrogram are put to the mean in the frontend.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def roll(x: Tensor, rng: np.random.Generator, *, p: float = 1.0) -> Tensor:
    """A share `p` of clips begins anywhere, and what stood before that comes at the end.

    Source: Huang et al. 2022 (Audio-MAE, arXiv:2207.06405), section 4.3. Their released code never rolls: it draws the
    shift from one number, 0.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"roll: p is a share of clips from 0 to 1, got {p}")
    return x.roll(int(rng.integers(len(x)))) if rng.random() < p else x

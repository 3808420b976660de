"""Which layers of an encoder fine-tuning trains, by the number of updates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FreezeSchedule:
    """New layers alone at first, then the encoder: all of it at once, or one block after the other from the last down.

    Layers are numbered as in `Encoded`: layer 0 is all that comes before the blocks, with the bias that these share,
    and layer i is block i; a norm behind the blocks begins with the last of them. What is frozen has no gradient, so an
    optimizer leaves it as it is: no weight decay, and no moments before its first update.

    Source: Howard and Ruder 2018 (ULMFiT, arXiv:1801.06146), section 3.3, "gradual unfreezing".
    Differs from the paper: a block begins after a number of updates, and not with an epoch.

    Args:
        depth: blocks of the encoder.
        freeze_updates: updates in which no layer is trained.
        unfreeze_every: updates from a layer's first to that of the layer below it: of `depth` blocks, block i begins
            with update freeze_updates + (depth - i) * unfreeze_every + 1. 0 trains all layers from the same one on.

    Raises:
        ValueError: a negative number.
    """

    depth: int
    freeze_updates: int
    unfreeze_every: int

    def __post_init__(self) -> None:
        for name in ("freeze_updates", "unfreeze_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.{name}={getattr(self, name)}: counts updates, so give at least 0")

    @property
    def freezes(self) -> bool:
        """Whether some layer is not trained in some update."""
        return self.freeze_updates > 0 or self.unfreeze_every > 0

    def frozen(self, updates: Tensor) -> int:
        """How many layers the next update leaves out, from layer 0 up: 0 to depth + 1.

        Args:
            updates: () int64, those that were made.
        """
        if not self.freezes:  # spares runs without a schedule a wait for the device at every step
            return 0
        made = int(updates) - self.freeze_updates
        if made < 0:
            return self.depth + 1
        return max(0, self.depth - made // self.unfreeze_every) if self.unfreeze_every else 0

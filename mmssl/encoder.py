"""The encoder: frontend -> tokens -> hide -> positions -> drop -> Transformer.

This is the one place where the parts meet. It is modality-blind: no loss, no teacher, no drawing of masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmssl.nn.masking import take
from mmssl.nn.positions import READ_CONTENT, shared
from mmssl.nn.transformer import Transformer
from mmssl.nn.trunk import upper
from mmssl.types import Encoded, Frontend, Hide, MaskPlan, Point, Raw, Tokens, valid_mask


class Encoder(nn.Module):
    """A modality's frontend and positions in front of a Transformer.

    Several encoders may hold the same blocks, see `mmssl.nn.trunk`: that is what a shared backbone is.

    Args:
        prefix: learned vectors put before the tokens; the first is the class token, others are registers.
        mask_token: whether there is a learned vector for hidden tokens, for objectives that replace rather than drop.
    """

    def __init__(
        self,
        frontend: Frontend,
        transformer: Transformer,
        positions: nn.Module,
        *,
        prefix: int = 0,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        if frontend.dim != transformer.dim:
            raise ValueError(f"frontend.dim={frontend.dim}: must equal transformer.dim={transformer.dim}")
        self.frontend = frontend
        self.transformer = transformer
        self.positions = positions
        self.dim, self.depth = transformer.dim, transformer.depth
        self.prefix = nn.Parameter(torch.randn(prefix, self.dim) * 0.02) if prefix else None
        # U[0, 1), as wav2vec 2.0 draws it
        self.mask_token = nn.Parameter(torch.rand(self.dim)) if mask_token else None

    @property
    def n_prefix(self) -> int:
        return 0 if self.prefix is None else len(self.prefix)

    def skips_parameters(self, hide: Hide, *, output: bool = True) -> bool:
        """Whether some parameters get no gradient in some updates of an objective that hides tokens so.

        They are the mask token where nothing is replaced, blocks that are left out, features that are not trained, and
        the norm behind the blocks where none but these are read.

        Args:
            output: whether the objective reads the output, and not the layers before it alone.
        """
        return (
            (self.mask_token is not None and hide != "replace")
            or self.transformer.layer_drop > 0
            or getattr(self.frontend, "grad_mult", 1.0) == 0
            or (not output and self.transformer.pre and isinstance(self.transformer.norm, nn.LayerNorm))
        )

    def refuse_learned(
        self,
        learned: bool,
        does: str,
        *,
        so: str = "the target would collapse onto the prediction",
        choose: str = "a fixed target such as log_mel",
    ) -> None:
        """For objectives whose target is what the frontend measures.

        Args:
            learned: whether that is features which the frontend learns.
            does: the objective and what it does, such as "MAE reconstructs".
            so: what would become of it.
            choose: the way out.

        Raises:
            ValueError: it is learned.
        """
        if learned:
            name = type(self.frontend).__name__
            raise ValueError(
                f"{does} what the frontend measures, and {name} learns what it measures, so {so}; choose {choose}"
            )

    def refuse_lookahead(self, objective: str) -> None:
        """For objectives that predict what is to come.

        Raises:
            ValueError: what is encoded of a token depends on later ones.
        """
        if not self.transformer.causal:
            raise ValueError(
                f"transformer.causal=false: {objective} predicts tokens to come, which an encoder that sees them only "
                "copies; set it to true"
            )
        if isinstance(self.positions, READ_CONTENT):
            raise ValueError(
                f"positions: {type(self.positions).__name__} reads tokens to come, which {objective} predicts; choose "
                "sincos, flat_sincos, learned or none"
            )

    def tokens(self, raw: Raw, *, late: bool = False) -> Tokens:
        """What the frontend makes of a batch.

        Args:
            late: leave the projection of features to `forward`, where the frontend can: for objectives that drop most
                tokens, and encode the rest no more than once.
        """
        if late and self.frontend.late and not isinstance(self.positions, READ_CONTENT):
            return self.frontend(raw, late=True)
        return self.frontend(raw)

    def forward(
        self,
        tokens: Tokens,
        plan: MaskPlan | None = None,
        hide: Hide = "none",
        *,
        layers: Sequence[int] = (),
        point: Point = "block",
        until: int | None = None,
        frozen: int = 0,
    ) -> Encoded:
        """Encode tokens, hiding what `plan` names.

        Args:
            tokens: of B clips.
            plan: R masked copies of them; needed unless `hide` is "none".
            hide: "replace" puts the mask token in the place of hidden tokens; "drop" leaves them out, so that the
                Transformer works on visible tokens only; "unseen" keeps them, and no token attends to them.
            layers, point: see `Encoded.layers`.
            until: the last block to go through, see `Transformer.forward`.
            frozen: layers that get no gradient, from layer 0 up: where it is above 0 the frontend and all else before
                the blocks get none, and where it is above i, block i; see `Transformer.forward`.

        Raises:
            ValueError: `hide` without a plan, or "replace" in an encoder without a mask token.
        """
        if (hide == "none") != (plan is None):
            raise ValueError(f"hide={hide!r}: a mask plan is needed exactly when something is to be hidden")
        if plan is not None:
            # while the plan is still on the CPU: what it says of the copies then costs no wait for the device
            tokens = _copies(tokens, plan)
            plan = plan.to(tokens.x.device)
        x, lengths, late = tokens.x, tokens.lengths, tokens.project
        if late is not None and hide != "drop":
            x, late = late(x), None
        if plan is not None and hide == "replace":
            if self.mask_token is None:
                raise ValueError("encoder.mask_token is false: this objective replaces hidden tokens, set it to true")
            x = torch.where(plan.masked[..., None], self.mask_token.to(x.dtype), x)
        seen = x
        if plan is not None and hide == "drop" and isinstance(self.positions, READ_CONTENT):
            # what is dropped must not be seen by them either
            seen = x.masked_fill(plan.masked[..., None], 0.0)
        added = self.positions(seen, tokens)
        if plan is not None and hide == "drop":
            x, lengths = take(x, plan.keep), plan.keep_lengths
            added = take(added.expand(len(x), -1, -1), plan.keep)
        if late is not None:
            x = late(x)
        x = x + added.to(x.dtype)
        if self.prefix is not None:
            x = torch.cat([self.prefix.to(x.dtype).expand(len(x), -1, -1), x], 1)
            lengths = lengths + self.n_prefix
        if int(lengths.min()) < x.shape[1]:
            x = x * valid_mask(lengths, x.shape[1], x.device)[..., None]
        attended = None
        if plan is not None and hide == "unseen":
            attended = torch.nn.functional.pad(~plan.masked, (self.n_prefix, 0), value=True)
        bias: Sequence[Tensor] = ()
        if self.transformer.bias is not None:
            coords = shared(tokens.coords)
            if plan is not None and hide == "drop":
                coords = take(tokens.coords, plan.keep)
            bias = self.transformer.bias(coords, tokens, self.n_prefix)
        if frozen:
            x, bias = x.detach(), [each.detach() for each in bias]
        x, kept = self.transformer(
            x, lengths, layers=layers, point=point, attended=attended, bias=bias, until=until, frozen=frozen
        )
        return Encoded(x=x, lengths=lengths, layers=kept, n_prefix=self.n_prefix)


class Encoders(nn.ModuleDict):
    """The encoders of several modalities by name, each with its own Transformer or all on one trunk.

    Attributes:
        own_blocks: of each Transformer so many of the first blocks are no other's; all of them without a trunk.
        own_norms: whether the layer norms of the others are no other's either.
        shared: whether there is a trunk.
    """

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        super().__init__(encoders)
        columns = list(zip(*(encoder.transformer.blocks for encoder in encoders.values()), strict=False))
        shared = [len({id(block.attention) for block in column}) == 1 for column in columns]
        self.shared = any(shared)
        self.own_blocks = shared.index(True) if self.shared else len(columns)
        self.own_norms = len(set(map(id, columns[-1]))) > 1

    def __getitem__(self, modality: str) -> Encoder:
        encoder = super().__getitem__(modality)
        assert isinstance(encoder, Encoder)
        return encoder

    def joint(self) -> Transformer:
        """The shared blocks alone, for sequences of several modalities; with norms of its own where each has some.

        It goes on from layer `own_blocks` of the encoders.

        Raises:
            ValueError: nothing is shared.
        """
        if not self.shared:
            raise ValueError("backbone=separate: no block sees several modalities; set it to shared")
        first = next(iter(self.values()))
        assert isinstance(first, Encoder)
        return upper(first.transformer, first=self.own_blocks, own_norms=self.own_norms)


def _copies(tokens: Tokens, plan: MaskPlan) -> Tokens:
    """The tokens of each masked copy: (B, ...) -> (R, ...)."""
    if plan.is_identity and len(plan.rows) == len(tokens.x):
        return tokens

    source = plan.rows.to(tokens.x.device)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, source)

    x = tokens.x.index_select(0, source)
    return replace(
        tokens,
        x=x,
        lengths=tokens.lengths[plan.rows.cpu()],
        coords=tokens.coords[:1].expand(len(x), -1, -1) if tokens.coords.stride(0) == 0 else tokens.coords[source],
        feat=rows(tokens.feat),
        pre_norm=rows(tokens.pre_norm),
    )

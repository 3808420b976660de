"""One process or several: ranks, sums over them, and a gather whose gradient is exact.

Every function does the obvious nothing on one process, so callers never ask which it is. Several processes are started
by `torchrun`, and `setup` reads the environment variables that it sets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def setup(device: str = "auto") -> torch.device:
    """Join the other processes, if there are any, and say which device this one works on. May be called again.

    Args:
        device: "auto" (a GPU if there is one), or a name that torch knows; each process takes the GPU of its own rank.

    Raises:
        ValueError: a GPU is asked for and torch sees none.
    """
    chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"trainer.device={device}: torch sees no GPU here; use cpu, or auto to take what there is")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not _together():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def shutdown() -> None:
    """Leave the other processes; the last call of a program."""
    if _together():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait for all."""
    if _together():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, on the tensor's own device; a new tensor without gradient, except on one process."""
    if not _together():
        return tensor
    total = _sendable(tensor).clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor, in the order of ranks; first dimensions may differ, the others not. No gradient."""
    if not _together():
        return [tensor]
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[rank()] = len(tensor)
    counts = all_reduce_sum(sizes).tolist()
    own = _sendable(tensor)
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count].to(tensor.device) for part, count in zip(parts, counts, strict=True)]


def gather(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in the order of ranks, with an exact gradient.

    Every rank's loss may depend on every row, so a row's gradient is the sum of what all ranks' losses send back to
    it. `torch.distributed.all_gather` sends nothing back, and putting a rank's own rows into its result loses what the
    other ranks' losses say about them.

    Args:
        tensor: (B, ...) the rows of this rank; B may differ between ranks.

    Returns:
        (sum of B, ...).
    """
    return _Gather.apply(tensor) if _together() else tensor


def everyone(*rows: Tensor, exchange: bool) -> tuple[Tensor, ...]:
    """`gather` of each of some tensors; these themselves where ranks exchange nothing, as while evaluating."""
    return tuple(gather(each) for each in rows) if exchange else rows


def places(count: int, *, exchange: bool) -> Tensor:
    """(count,) int64, where the rows of this rank, which has so many, are in what `everyone` gives."""
    before = sum(int(part) for part in all_gather(torch.tensor([count]))[: rank()]) if exchange else 0
    return torch.arange(before, before + count)


def against_all(term: Callable[..., Tensor], own: Tensor, *parameters: Tensor, beside: Sequence[Tensor] = ()) -> Tensor:
    """The sum over ranks of term(own, theirs, beside theirs, whether they are one's own, *parameters), with gradient.

    The rows of one rank after the other pass by, so that what `term` takes of memory does not grow with their number;
    in the backward pass they pass by once more, and each rank is told what the others' terms say about its rows: the
    sum of all ranks' results has the exact gradient.

    Args:
        term: gives a scalar; it must depend on its arguments alone.
        own: (B, ...) the rows of this rank; B may differ between ranks.
        parameters: further tensors that get a gradient, the same on all ranks.
        beside: further tensors of B rows, without gradient.
    """
    if not _together():
        return term(own, own, beside, True, *parameters)
    return _AgainstAll.apply(term, own, beside, *parameters)


def parts_of(size: int, chunk: int | None, *, agreed: bool) -> int:
    """How many parts of at most `chunk` rows hold `size` of them; one where there is no such bound.

    Args:
        agreed: of the ranks' numbers the largest, so that all do the same; all ranks call it together.
    """
    if chunk is None:
        return 1
    parts = -(-size // chunk)
    return max(int(theirs) for theirs in all_gather(torch.tensor([parts]))) if agreed else parts


def whole(tensor: Tensor) -> Tensor:
    """A tensor that lies in parts on all ranks, put together on each of them; any other as it is.

    All ranks call it together.
    """
    # of the tensors that torch knows only the one in parts has this, and importing its class takes long
    gathered = getattr(tensor, "full_tensor", None)
    return tensor if gathered is None else gathered()


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have whole, where `like` has its shape and lies in parts."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the main process."""
    if _together():
        for tensor in tensors:
            sent = _sendable(tensor)
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)


def gather_text(text: str) -> list[str]:
    """Every rank's text."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return [bytes(part.tolist()).decode() for part in all_gather(own)]


def broadcast_text(text: str) -> str:
    """The main process's text, on every rank."""
    return gather_text(text)[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = all_gather(tensor)
        ctx.start = sum(len(part) for part in parts[: rank()])
        ctx.size = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0])[ctx.start : ctx.start + ctx.size]


class _AgainstAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, term: Callable[..., Tensor], own: Tensor, beside: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.term, ctx.beside = term, beside
        ctx.save_for_backward(own, *parameters)
        terms = [
            term(own, theirs, others, source == rank(), *parameters)
            for source, (theirs, *others) in _passing([own, *beside])
        ]
        return torch.stack(terms).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own, *parameters = ctx.saved_tensors
        sums = [torch.zeros_like(tensor) for tensor in (own, *parameters)]
        for source, (theirs, *others) in _passing([own, *ctx.beside]):
            mine, passing, *rest = (tensor.detach().requires_grad_() for tensor in (own, theirs, *parameters))
            with torch.enable_grad():
                value = ctx.term(mine, passing, others, source == rank(), *rest)
            found = torch.autograd.grad(value, (mine, passing, *rest), gradients[0], materialize_grads=True)
            for total, part in zip(sums, (found[0], *found[2:]), strict=True):
                total += part
            back = _sendable(found[1]).clone()
            dist.reduce(back, dst=source)
            if source == rank():
                sums[0] += back.to(own.device)
        return None, sums[0], None, *sums[1:]


def _passing(tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Each rank's tensors, of which the first dimensions are the same on a rank, one rank after the other."""
    sizes = [int(size) for size in all_gather(torch.tensor([len(tensors[0])]))]
    for source, size in enumerate(sizes):
        passed = []
        for tensor in tensors:
            sent = _sendable(tensor)
            sent = sent if source == rank() else sent.new_empty(size, *sent.shape[1:])
            dist.broadcast(sent, src=source)
            passed.append(sent.to(tensor.device))
        yield source, passed


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sendable(tensor: Tensor) -> Tensor:
    """The tensor as the backend takes it: contiguous, and on the GPU for nccl."""
    tensor = tensor.detach().contiguous()
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor

"""One objective on several processes: a copy in each (DDP), or its parameters spread over all of them (FSDP2)."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmssl import distributed
from mmssl.types import Batch, Loss

# what is put together for its own forward and backward pass, and then let go: the blocks of every Transformer
_BLOCK = re.compile(r"(^|\.)blocks\.\d+$")


def parallelize(
    objective: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *, sharded: bool
) -> nn.Module:
    """What to call for the loss of a micro-batch; on one process the objective itself.

    An objective may say `skips_parameters`, true where some of its parameters get no gradient in some updates.
    """
    if distributed.world_size() == 1:
        return objective
    skips = getattr(objective, "skips_parameters", False)
    if sharded:
        return Sharded(objective, optimizer, device, skips=skips)
    model = DistributedDataParallel(objective, find_unused_parameters=skips)
    # buffers stay equal on all processes without being sent: they count updates, or make up a teacher; set here
    # because the name of the argument depends on the version of torch
    model.broadcast_buffers = False
    return model


class Sharded(nn.Module):
    """An objective of which each process holds a part of every parameter, of its gradient and of its optimizer state.

    Source: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054), section 5, all three stages; torch's `fully_shard`.
    Each block of a Transformer is a unit, or each part of it that another block holds as well, and what is in none is
    one more, the root. The parameters of a unit are whole
    only while it is at work: a block's in its forward and again in its backward pass, the root's in between as well.
    The objective stays the same object with the same names; its parameters, and with them those of the optimizer, are
    new ones. It must fit the device of each process before it is sharded. In bfloat16 autograd keeps each weight of
    the forward pass in that precision until its backward pass, sharded or not.

    All processes must call the same units in the same order: a block that one of them leaves out, all leave out.
    `gathered` frees an evaluation from that.

    Args:
        skips: whether some parameters of the root get no gradient in some updates, on all processes or on a few.
    """

    def __init__(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *, skips: bool
    ) -> None:
        super().__init__()
        # inside: importing these takes about as long as the rest of torch, and few runs are sharded
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # all begin with the weights of the main process, as with DDP
        distributed.copy_from_main([*objective.parameters(), *objective.buffers()])
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        blocks = _units(objective)
        trained = [block for block in blocks if any(parameter.requires_grad for parameter in block.parameters())]
        # the last one's backward pass follows its forward pass at once
        self.released: list[Any] = [block for block in blocks if block not in trained[-1:]]
        self.kept: list[Any] = [block for block in blocks if block in trained[-1:]]
        self.root: Any = _Root(objective, skips)
        for block in self.released:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for module in (*self.kept, self.root):
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
        for name in ("statistics", "begin"):
            register_fsdp_forward_method(self.root, name)
        _hand_over(optimizer, names, dict(objective.named_parameters()))

    def forward(self, batch: Batch) -> Loss:
        total, loss = self.root(batch)
        return replace(loss, total=total)

    def statistics(self, batch: Batch) -> Tensor:
        """See `gradients.share_statistics`."""
        found: Tensor = self.root.statistics(batch)
        return found


class _Root(nn.Module):
    """What torch sees of an objective: it looks for tensors in tuples, and finds none in a Loss."""

    def __init__(self, objective: nn.Module, skips: bool) -> None:
        super().__init__()
        self.objective = objective
        self.skips = skips
        self.last = True
        self.reached: set[int] = set()

    def forward(self, batch: Batch) -> tuple[Tensor, Loss]:
        loss: Loss = self.objective(batch)
        total = self._agreed(loss.total) if self.skips and torch.is_grad_enabled() else loss.total
        return total, replace(loss, total=loss.total.detach())

    def statistics(self, batch: Batch) -> Tensor:
        found: Tensor = self.objective.statistics(batch)  # type: ignore[operator]
        return found

    def begin(self) -> None:
        """A forward pass of nothing: torch wants the root's first one before any of its blocks."""

    def _agreed(self, total: Tensor) -> Tensor:
        """The loss, with a gradient of zero for each parameter of the root that only other processes' losses depend on.

        Gradients are added up over processes in one piece, so all must send those of the same parameters. One that no
        loss depends on gets none, as on one process: a gradient of zero would let weight decay and Adam move it.
        """
        # the root's are whole here, and those of blocks, but for the last, in parts
        own = [p for p in self.parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
        self.reached |= _reached(total)
        if not self.last:
            return total
        mine = [id(parameter) in self.reached for parameter in own]
        self.reached.clear()
        anyone = distributed.all_reduce_sum(torch.tensor(mine, dtype=torch.int64)).tolist()
        rest = [p.flatten()[:0] for p, here, there in zip(own, mine, anyone, strict=True) if there and not here]
        return total + torch.cat(rest).sum() if rest else total


@contextlib.contextmanager
def exchanging(model: nn.Module, last: bool) -> Iterator[None]:
    """For both passes of a micro-batch: gradients add up, and are exchanged in the backward pass of the last one."""
    if isinstance(model, Sharded):
        model.root.last = last
        model.root.set_requires_gradient_sync(last)
        # the next micro-batch begins with the same parameters
        model.root.set_reshard_after_backward(last, recurse=False)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, each process has all parameters whole, and may call any part of the objective as often as it likes.

    All processes enter together. It takes the memory of the parameters, without gradients.
    """
    if not isinstance(model, Sharded):
        yield
        return
    model.root.begin()
    for unit in (*model.released, *model.kept, model.root):
        unit.unshard()
    for block in model.released:
        block.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for block in model.released:
            block.set_reshard_after_forward(True)
        for unit in (*model.released, *model.kept, model.root):
            unit.reshard()


def _units(objective: nn.Module) -> list[nn.Module]:
    """The blocks of every Transformer; of those that share parts, as with norms of their own, these parts alone."""
    blocks = [module for name, module in objective.named_modules() if _BLOCK.search(name)]
    holders = Counter(id(part) for block in blocks for part in block.children())
    units: dict[int, nn.Module] = {}
    for block in blocks:
        shared = [part for part in block.children() if holders[id(part)] > 1]
        units |= {id(unit): unit for unit in shared or [block]}
    return list(units.values())


def _reached(total: Tensor) -> set[int]:
    """The `id` of each parameter that a loss depends on."""
    found: set[int] = set()
    seen: set[Any] = set()
    left: list[Any] = [total.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            left += [inner for inner, _ in node.next_functions]
    return found


def _hand_over(optimizer: torch.optim.Optimizer, names: dict[int, str], parameters: dict[str, nn.Parameter]) -> None:
    """Let an optimizer go on with other parameters of the same names."""
    for group in optimizer.param_groups:
        old = group["params"]
        group["params"] = new = [parameters[names[id(parameter)]] for parameter in old]
        for before, after in zip(old, new, strict=True):
            memory = optimizer.state.pop(before, {})
            if memory:
                optimizer.state[after] = {key: distributed.part(value, after) for key, value in memory.items()}

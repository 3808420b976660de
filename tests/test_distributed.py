"""Functions of several processes. As a program, this file is one of two processes and prints what it found."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mmssl import distributed

ROWS = (3, 2)  # of each process: they need not have equally many
PARTS = ((None, True), (2, True), (2, False), (1, True))


def inputs() -> tuple[list[Tensor], Tensor]:
    """Each process's rows, and weights that make its loss differ from the other's."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 4, generator=generator, dtype=torch.float64) for count in ROWS]
    return rows, torch.randn(sum(ROWS), sum(ROWS), generator=generator, dtype=torch.float64)


def loss(own: Tensor, everyone: Tensor, weights: Tensor) -> Tensor:
    """A contrast of a process's rows with all rows; the sum over processes is that of all rows with all."""
    return ((own @ everyone.T).tanh() * weights).sum()


SCALE = 0.7


def term(own: Tensor, theirs: Tensor, beside: list[Tensor], itself: bool, scale: Tensor) -> Tensor:
    """A contrast of a process's rows with another's, in which each row's number tells it apart, and so does its own."""
    assert len(theirs) in ROWS  # the rows of one process at a time
    weights = torch.cos(own.detach()[:, :1] * beside[0]) - itself * torch.eye(len(own), len(theirs))
    return (scale * (own @ theirs.T).tanh() * weights).sum()


def one_of_two() -> None:
    torch.set_num_threads(1)
    distributed.setup("cpu")
    distributed.setup("cpu")  # may be called again
    rank = distributed.rank()
    rows, weights = inputs()
    own = rows[rank].requires_grad_()
    first = sum(ROWS[:rank])
    everyone = distributed.gather(own)
    loss(own, everyone, weights[first : first + len(own)]).backward()
    assert own.grad is not None
    passed, scale = rows[rank].detach().requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    numbers = torch.arange(first, first + len(own))
    against = distributed.against_all(term, passed, scale, beside=[numbers])
    (3 * against).backward()
    assert passed.grad is not None
    assert scale.grad is not None
    distributed.barrier()
    found = {
        "rank": rank,
        "world": distributed.world_size(),
        "main": distributed.is_main(),
        "everyone": everyone.tolist(),
        "gradient": own.grad.tolist(),
        "against": [against.item(), passed.grad.tolist(), scale.grad.item()],
        "parts": [distributed.parts_of(len(own), chunk, agreed=agreed) for chunk, agreed in PARTS],
        "sum": distributed.all_reduce_sum(torch.tensor([1.0, rank])).tolist(),
        "texts": distributed.gather_text("é" * rank),
        "from_main": distributed.broadcast_text(f"rank {rank}"),
    }
    distributed.shutdown()
    print(json.dumps(found))


@pytest.mark.processes
def test_two_processes_gather_with_the_gradient_of_one_and_add_up() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    for process, (_, error) in zip(processes, said, strict=True):
        assert process.returncode == 0, error
    ranks: list[dict[str, Any]] = [json.loads(printed) for printed, _ in said]

    rows, weights = inputs()
    everyone = torch.cat(rows).requires_grad_()
    loss(everyone, everyone, weights).backward()
    assert everyone.grad is not None
    gradient = torch.tensor(ranks[0]["gradient"] + ranks[1]["gradient"], dtype=torch.float64)
    assert torch.allclose(gradient, everyone.grad, rtol=1e-12)
    assert [(own["rank"], own["world"], own["main"]) for own in ranks] == [(0, 2, True), (1, 2, False)]
    # every two rows by hand, of which a row and itself are told apart by one less
    whole, scale = torch.cat(rows).requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    told = torch.cos(whole.detach()[:, :1] * torch.arange(sum(ROWS))) - torch.eye(sum(ROWS))
    value = (scale * (whole @ whole.T).tanh() * told).sum()
    (3 * value).backward()
    assert whole.grad is not None
    assert scale.grad is not None
    totals, parts, slopes = zip(*(own["against"] for own in ranks), strict=True)
    rows_grad = torch.tensor([row for part in parts for row in part], dtype=torch.float64)
    assert sum(totals) == pytest.approx(value.item(), rel=1e-6)
    assert sum(slopes) == pytest.approx(scale.grad.item(), rel=1e-6)
    assert torch.allclose(rows_grad, whole.grad, rtol=1e-6)
    assert [own["parts"] for own in ranks] == [[1, 2, 2, 3], [1, 2, 1, 3]]
    for own in ranks:
        assert own["everyone"] == everyone.tolist()
        assert own["sum"] == [2.0, 1.0]
        assert own["texts"] == ["", "é"]
        assert own["from_main"] == "rank 0"


def test_on_one_process_nothing_happens() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather(x) is x
    assert distributed.all_reduce_sum(x) is x
    assert distributed.all_gather(x) == [x]
    assert distributed.against_all(lambda own, theirs, beside, itself: (own @ theirs.T).sum() * itself, x).requires_grad
    assert distributed.parts_of(5, 2, agreed=True) == 3
    assert distributed.whole(x) is x
    assert distributed.part(x, x) is x
    distributed.copy_from_main([x])
    assert distributed.gather_text("a") == ["a"]
    assert distributed.broadcast_text("a") == "a"
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.shutdown()


def test_setup_names_the_device() -> None:
    assert distributed.setup("cpu") == torch.device("cpu")
    assert distributed.setup("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, so asking for one is no error")
def test_a_gpu_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"trainer.device=cuda: torch sees no GPU here; use cpu"):
        distributed.setup("cuda")


if __name__ == "__main__":
    one_of_two()

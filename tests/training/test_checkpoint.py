import errno
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.training import checkpoint
from mmssl.training.checkpoint import export_encoder, latest, load, read_encoder, read_tensors, save, write_tensors
from mmssl.training.optimizer import build_optimizer


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network with a frozen part, after two updates."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3).requires_grad_(False))
    optimizer = build_optimizer(module, lr=0.1)
    for _ in range(2):
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def put(folder: Path, step: int, keep: int = 2, **state: Any) -> Path:
    module, optimizer = trained()
    return save(
        folder, module, optimizer, rng={"0.cpu": torch.get_rng_state()}, state={"step": step, **state}, keep=keep
    )


def silent(sentence: str) -> None:
    raise AssertionError(f"nothing should be said here: {sentence}")


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    module, optimizer = trained()
    rng = torch.get_rng_state()
    path = save(tmp_path, module, optimizer, rng={"0.cpu": rng}, state={"step": 2, "recipe": "a: ä"}, keep=1)
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3).requires_grad_(False))
    again = build_optimizer(other, lr=0.1)
    state, random = load(path, other, again)
    assert state == {"format": 1, "step": 2, "recipe": "a: ä"}
    assert torch.equal(random["0.cpu"], rng)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert optimizer.state[mine].keys() == again.state[theirs].keys()
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, again.state[theirs][key])


def test_training_on_does_not_write_into_the_checkpoint(tmp_path: Path) -> None:
    path = put(tmp_path, 2)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    module, optimizer = trained()
    load(path, module, optimizer)
    module(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_optimizer_tensors_are_named_after_parameters(tmp_path: Path) -> None:
    tensors = load_file(put(tmp_path, 2) / "optimizer.safetensors")
    assert {name for name in tensors if name.startswith("0.weight/")} == {
        "0.weight/step",
        "0.weight/exp_avg",
        "0.weight/exp_avg_sq",
    }
    assert not any(name.startswith("2.") for name in tensors)


def test_nothing_is_pickled_or_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = trained()

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("pickle was used")

    for place, names in ((pickle, ("load", "loads", "dump", "dumps")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    load(put(tmp_path, 1), module, optimizer)


def test_a_transformer_that_two_encoders_hold_is_written_once(tmp_path: Path) -> None:
    shared = nn.Linear(50, 50)
    both = nn.ModuleDict({"speech": nn.Sequential(shared), "image": nn.Sequential(shared, nn.Linear(50, 2))})
    file = tmp_path / "both.safetensors"
    write_tensors(file, both.state_dict())
    assert file.stat().st_size < 4 * (50 * 50 + 50 + 102) + 2000
    back = read_tensors(file)
    assert back.keys() == both.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in both.state_dict().items())


def test_views_of_one_memory_and_odd_types_come_back_as_they_were(tmp_path: Path) -> None:
    memory = torch.arange(12.0)
    tensors: dict[str, Tensor] = {
        "all": memory,
        "front": memory[:5],
        "square": memory.view(3, 4).T,
        "expanded": torch.ones(1, 3).expand(4, 3),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "nothing": torch.zeros(0, 3),
        "yes": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "x", tensors)
    back = read_tensors(tmp_path / "x")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(back[name], value)
        assert back[name].dtype == value.dtype


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'extra' is dict, and only tensors are saved"):
        write_tensors(tmp_path / "x", {"extra": {}})  # type: ignore[dict-item]


def test_a_torn_weight_file_is_a_clear_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.zeros(100)})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-50])
    with pytest.raises(ValueError, match="x: this is not a whole safetensors file"):
        read_tensors(tmp_path / "x")


def test_the_newest_are_kept_and_latest_names_the_last(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        put(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_10", "step_12"]
    assert latest(tmp_path, say=silent) == tmp_path / "step_12"


def test_without_checkpoints_there_is_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere", say=silent) is None


def test_latest_may_be_set_back_by_hand_and_the_abandoned_future_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step, keep=3)
    (tmp_path / "latest").write_text("step_1\n")
    assert latest(tmp_path, say=silent) == tmp_path / "step_1"
    put(tmp_path, 2, keep=3, mark="new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_2"]
    assert json.loads((tmp_path / "step_2" / "state.json").read_text())["mark"] == "new"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_torn_checkpoint_is_passed_over_with_one_sentence(tmp_path: Path, file: str, how: str) -> None:
    put(tmp_path, 1)
    torn = put(tmp_path, 2) / file
    if how == "cut":
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    else:
        torn.unlink()
    said: list[str] = []
    assert latest(tmp_path, say=said.append) == tmp_path / "step_1"
    assert len(said) == 1
    assert "step_2" in said[0]
    assert file in said[0]


def test_a_folder_that_was_never_finished_is_passed_over_and_later_removed(tmp_path: Path) -> None:
    put(tmp_path, 1)
    (tmp_path / "step_2.tmp").mkdir()
    (tmp_path / "step_2.tmp" / "model.safetensors").write_bytes(b"x")
    said: list[str] = []
    assert latest(tmp_path, say=said.append) == tmp_path / "step_1"
    assert len(said) == 1
    put(tmp_path, 2)
    assert latest(tmp_path, say=silent) == tmp_path / "step_2"


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)

    def full(tensors: object, path: Path, metadata: object) -> None:
        if path.name == "optimizer.safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        path.write_bytes(b"some of it")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        put(tmp_path, 2)
    assert raised.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
    assert latest(tmp_path, say=silent) == tmp_path / "step_1"


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 5).requires_grad_(False))
    with pytest.raises(ValueError, match=r"'2.bias' is \(3,\) in the checkpoint and \(5,\) in the model"):
        load(path, other, build_optimizer(other, lr=0.1))
    fewer = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"'1.bias' is missing in the model"):
        load(path, fewer, build_optimizer(fewer, lr=0.1))


def test_an_encoder_is_exported_with_its_config_and_its_head(tmp_path: Path) -> None:
    objective = nn.ModuleDict({"encoder": nn.Linear(2, 3), "head": nn.Linear(3, 4)})
    config = {"format": 1, "classes": ["Ä", "b"]}
    export_encoder(tmp_path, objective["encoder"], config)
    assert read_encoder(tmp_path)[2] == {}
    export_encoder(tmp_path, objective["encoder"], config, objective=objective)
    back, encoder, head = read_encoder(tmp_path)
    assert back == config
    assert encoder.keys() == {"weight", "bias"}
    assert torch.equal(encoder["weight"], objective["encoder"].weight)
    assert head.keys() == {"head.weight", "head.bias"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_a_folder_without_an_encoder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json here"):
        read_encoder(tmp_path)

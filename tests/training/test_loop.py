import errno
import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy import KILLED, Diverse, Loader, Toy, batch, built, gradient, run, start

from mmssl.training import RunStopped, TrainSettings, checkpoint, train
from mmssl.training.resume import held
from mmssl.types import BadClip, Batch, Loss


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def notes(folder: Path) -> str:
    return "\n".join(line["note"] for line in lines(folder) if "note" in line)


def weights(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in objective.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", [Toy, Diverse])
def test_eight_micro_batches_give_the_gradient_of_one_big_batch(tmp_path: Path, kind: type[Toy]) -> None:
    one = gradient(tmp_path / "one", kind, loader=Loader(32))
    eight = gradient(tmp_path / "eight", kind, loader=Loader(4), accumulate=8)
    last = gradient(tmp_path / "last", kind, loader=Loader(4))
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (one, eight, last)]
    assert F.cosine_similarity(flat[0], flat[1], dim=0) > 1 - 1e-12
    assert torch.allclose(flat[0], flat[1], rtol=1e-12)
    # or the test would hold for any average of micro-batches
    assert F.cosine_similarity(flat[0], flat[2], dim=0) < 0.99999


def test_the_gradient_is_that_of_the_sum_over_the_count(tmp_path: Path) -> None:
    found = gradient(tmp_path, loader=Loader(6))
    objective = built()
    loss = objective(batch(range(6)))
    (loss.total / loss.count).backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.allclose(found[name], parameter.grad, rtol=1e-12, atol=1e-15)


def test_clipping_shortens_all_gradients_together(tmp_path: Path) -> None:
    free, clipped = gradient(tmp_path / "free"), gradient(tmp_path / "clipped", clip=0.1)
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    assert norm > 0.1
    for name, value in free.items():
        assert torch.allclose(clipped[name], value * (0.1 / norm), rtol=1e-9, atol=1e-15)
    assert math.isclose(lines(tmp_path / "clipped")[-1]["grad_norm"], norm, rel_tol=1e-9)


def test_each_group_learns_at_rate_times_scale_times_schedule(tmp_path: Path) -> None:
    objective = built()
    optimizer = torch.optim.SGD(
        [{"params": [objective.up.weight], "lr_scale": 0.5}, {"params": [objective.down.weight]}], lr=0.2
    )
    seen = []

    def note(step: int) -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])

    objective.then = note
    train(
        objective,
        Loader(),
        run=tmp_path,
        optimizer=optimizer,
        schedule=lambda step: step / 4,
        settings=TrainSettings(steps=2, device="cpu"),
    )
    assert seen == [[0.2 * 0.5 * 0.25, 0.2 * 0.25], [0.2 * 0.5 * 0.5, 0.2 * 0.5]]


@pytest.mark.processes
def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    unbroken = built(dropout=0.3)
    final = run(tmp_path / "unbroken", unbroken, **KILLED)
    process = start("killed", tmp_path / "killed")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said
    assert (tmp_path / "killed" / "checkpoints" / "latest").read_text() == "step_5\n"
    resumed = built(dropout=0.3)
    with torch.no_grad():  # nothing may come from how the resumed objective was built
        for value in resumed.parameters():
            value.fill_(0.5)
    assert run(tmp_path / "killed", resumed, resume=True, **KILLED)["loss"] == final["loss"]
    assert same(weights(unbroken), weights(resumed))
    steps = [line["step"] for line in lines(tmp_path / "killed") if "loss" in line]
    assert steps == [5, 10, 14]


@pytest.mark.parametrize("at", range(1, 8))
def test_a_run_goes_on_to_the_bit_from_any_update(tmp_path: Path, at: int) -> None:
    # updates 3 and 6 end epochs of the loader, where it draws random numbers
    unbroken, first, second = (built(dropout=0.3) for _ in range(3))
    run(tmp_path / "unbroken", unbroken, steps=8)
    run(tmp_path / "cut", first, steps=at)
    run(tmp_path / "cut", second, steps=8, resume=True)
    assert same(weights(unbroken), weights(second))
    assert not same(weights(first), weights(second))


def test_dropout_differs_between_seeds_and_not_with_what_the_loader_or_the_evaluation_draws(tmp_path: Path) -> None:
    class Quiet(Loader):
        def __iter__(self):  # type: ignore[no-untyped-def]
            while True:
                k, self.consumed = self.consumed, self.consumed + 1
                yield batch(range(k * self.size, (k + 1) * self.size))

    def drawing(step: int) -> dict[str, float]:
        return {"drawn": float(torch.rand(()))}

    plain, quiet, evaluated, other = (built(dropout=0.3) for _ in range(4))
    run(tmp_path / "plain", plain, steps=4)
    run(tmp_path / "quiet", quiet, steps=4, loader=Quiet())
    run(tmp_path / "evaluated", evaluated, steps=4, evaluate=drawing, eval_every=1)
    run(tmp_path / "other", other, steps=4, seed=1)
    assert same(weights(plain), weights(quiet))
    assert same(weights(plain), weights(evaluated))
    assert not same(weights(plain), weights(other))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_status_and_a_sentence(
    tmp_path: Path, number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def told(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    stopped = built(dropout=0.3, then=told)
    with pytest.raises(SystemExit) as raised:
        run(tmp_path / "stopped", stopped, steps=9)
    assert raised.value.code == status
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert f"stopped by {number.name} after update 6" in said
    assert "to go on from there, start the same run again" in said
    unbroken, resumed = built(dropout=0.3), built(dropout=0.3)
    run(tmp_path / "unbroken", unbroken, steps=9)
    run(tmp_path / "stopped", resumed, steps=9, resume=True)
    assert same(weights(unbroken), weights(resumed))


def test_a_signal_at_the_last_update_stops_nothing(tmp_path: Path) -> None:
    assert "loss" in run(tmp_path, built(then=lambda step: os.kill(os.getpid(), signal.SIGTERM)), steps=1)
    assert "stopped by" not in notes(tmp_path)


def test_a_second_signal_does_what_it_always_does(tmp_path: Path) -> None:
    # a program that was started in the background of a shell is deaf to SIGINT, and so would this test be
    before = signal.default_int_handler
    inherited = signal.signal(signal.SIGINT, before)

    def told(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        # another thread may be given a signal, and two that nobody has answered yet are one
        while signal.getsignal(signal.SIGINT) is not before:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, built(then=told), steps=9)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_torn_checkpoint_is_passed_over_and_the_run_ends_the_same(tmp_path: Path) -> None:
    unbroken, resumed = built(dropout=0.3), built(dropout=0.3)
    run(tmp_path / "unbroken", unbroken, steps=8)
    run(tmp_path / "torn", built(dropout=0.3), steps=6, save_every=3)
    model = tmp_path / "torn" / "checkpoints" / "step_6" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    run(tmp_path / "torn", resumed, steps=8, resume=True)
    assert same(weights(unbroken), weights(resumed))
    said = notes(tmp_path / "torn")
    assert said.count("passed over") == 1
    assert "goes on after update 3 of 8" in said


def test_a_full_disk_does_not_end_a_run_that_can_be_saved_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = checkpoint.write_tensors
    full = [True]

    def sometimes(path: Path, tensors: Any) -> None:
        if full[0] and "step_4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", sometimes)
    run(tmp_path, built(), steps=7, save_every=2)
    assert "step_4: could not be saved (No space left on device)" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_6", "step_7"]


def test_a_disk_that_is_full_at_the_end_is_one_clear_error_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_tensors

    def late(path: Path, tensors: Any) -> None:
        if "step_2" not in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", late)
    steps: list[int] = []
    with pytest.raises(OSError, match=r"step_7: could not be saved \(No space left on device\); make room"):
        run(tmp_path, built(then=steps.append), steps=7, save_every=2)
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_2"]


@pytest.mark.parametrize("mended", [True, False])
def test_an_encoder_that_cannot_be_exported_is_told_from_a_checkpoint_that_cannot_be_saved(
    tmp_path: Path, mended: bool
) -> None:
    here = tmp_path / "encoder.safetensors"
    exports = []

    def export() -> None:
        exports.append(here)
        if len(exports) == 1 or not mended:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(here))

    said = rf"{here}: could not be exported \(No space left on device\)"
    if mended:
        run(tmp_path, built(), steps=4, save_every=2, export=export)
        assert re.search(rf"{said}; the checkpoint {tmp_path}/checkpoints/step_2 is saved", notes(tmp_path))
    else:
        with pytest.raises(OSError, match=f"^{said}; make room, and start the same run again"):
            run(tmp_path, built(), steps=4, save_every=2, export=export)
    assert "could not be saved" not in notes(tmp_path)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_4\n"


def test_a_folder_in_which_a_run_is_going_on_is_refused_until_it_ends(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(FileExistsError, match="another run is going on in this folder; wait until"):
        run(tmp_path, built(), steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    run(tmp_path, built(), steps=2)
    run(tmp_path, built(), steps=4, resume=True)


def test_a_folder_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, built(), steps=2)
    with pytest.raises(FileExistsError, match="this folder holds another run; resume it, or choose another folder"):
        run(tmp_path, built(), steps=2)


def test_resuming_before_the_first_checkpoint_starts_the_run(tmp_path: Path) -> None:
    assert run(tmp_path, built(), steps=2, resume=True) == run(tmp_path / "new", built(), steps=2)
    assert "there is no checkpoint yet, so the run starts" in notes(tmp_path)


def test_resuming_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    first = run(tmp_path, built(), steps=3, evaluate=lambda step: {"score": 0.5}, eval_every=2)
    assert first["evaluation/score"] == 0.5
    steps: list[int] = []
    assert run(tmp_path, built(then=steps.append), steps=3, resume=True) == first
    assert steps == []


def test_a_changed_recipe_or_machine_is_said_when_a_run_goes_on(tmp_path: Path) -> None:
    run(tmp_path, built(), steps=2, recipe="a: 1\nb: 2\n")
    assert (tmp_path / "recipe.yaml").read_text() == "a: 1\nb: 2\n"
    run(tmp_path, built(), steps=3, recipe="a: 1\nb: 3\n", resume=True, accumulate=2)
    said = notes(tmp_path)
    assert "- b: 2; + b: 3" in said
    assert "not to the bit, because of accumulate 1 -> 2" in said


def test_other_data_are_said_when_a_run_goes_on_and_what_was_not_noted_is_not(tmp_path: Path) -> None:
    run(tmp_path, built(), steps=1)  # as of a version that noted none
    run(tmp_path, built(), steps=2, resume=True, data={"data.train": "4 rows (a)"})
    assert "not to the bit" not in notes(tmp_path)
    run(tmp_path, built(), steps=3, resume=True, data={"data.train": "4 rows (a)"})
    assert "not to the bit" not in notes(tmp_path)
    run(tmp_path, built(), steps=4, resume=True, data={"data.train": "5 rows (b)"})
    assert "but not to the bit, because of data.train 4 rows (a) -> 5 rows (b)" in notes(tmp_path)
    run(tmp_path, built(), steps=5, resume=True, data={"data.train": "5 rows (b)"})
    assert notes(tmp_path).count("not to the bit") == 1


class Broken(Toy):
    """Gives NaN for every batch that holds one of some clips."""

    bad: frozenset[str] = frozenset()

    def forward(self, batch: Batch) -> Loss:
        loss = super().forward(batch)
        return Loss(loss.total * math.nan, loss.count, loss.metrics) if self.bad & set(batch.ids) else loss


def test_a_bad_update_is_skipped_and_its_clips_are_named(tmp_path: Path) -> None:
    objective = built(Broken)
    objective.bad = frozenset(["clip5"])
    steps: list[int] = []
    objective.then = steps.append
    # attempt 1 has clips 0 to 3 and 4 to 7, of which only the second are bad
    final = run(tmp_path, objective, steps=3, accumulate=2, log_every=3)
    assert math.isfinite(final["loss"])
    assert steps == [1, 2, 3]
    (found,) = [line for line in lines(tmp_path) if "not_finite" in line.get("verdict", {})]
    assert found["ids"] == ["clip4", "clip5", "clip6", "clip7"]
    assert "at update 1 from these clips: clip4, clip5, clip6, clip7;" in found["verdict"]["not_finite"]


def test_each_clip_that_a_loss_leaves_out_is_named_once_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = Toy.forward

    def leaving(self: Toy, batch: Batch) -> Loss:
        odd = {f"clip{int(name.removeprefix('clip')) % 7}": "too short" for name in batch.ids}  # met again and again
        return replace(forward(self, batch), left_out=odd)

    monkeypatch.setattr(Toy, "forward", leaving)
    run(tmp_path, built(), steps=1)
    rows = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert rows == [{"id": f"clip{n}", "reason": "too short"} for n in range(4)]
    run(tmp_path, built(), steps=5, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == [f"clip{n}" for n in range(7)]
    assert f"clips that are left out of the loss are named in {tmp_path / 'left_out.jsonl'}" in capsys.readouterr().err


def test_a_skipped_update_moves_no_weight(tmp_path: Path) -> None:
    clean, broken = built(), built(Broken)
    broken.bad = frozenset(["clip1"])

    class After(Loader):
        """Leaves out the micro-batch that the other run skips."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            self.consumed += 1
            return super().__iter__()

    run(tmp_path / "clean", clean, loader=After(), steps=2)
    run(tmp_path / "broken", broken, steps=2)
    assert same(weights(clean), weights(broken))


def test_ten_bad_updates_in_a_row_stop_the_run_and_it_is_saved(tmp_path: Path) -> None:
    objective = built(Broken)
    objective.bad = frozenset(f"clip{n}" for n in range(8, 1000))
    with pytest.raises(RunStopped, match=r"10 attempts in a row gave no update, at last: NaN or infinity at update 3"):
        run(tmp_path, objective, steps=30)
    state = json.loads((tmp_path / "checkpoints" / "step_2" / "state.json").read_text())
    assert state["consumed"] == 12


def test_batches_without_anything_to_learn_are_skipped_by_name(tmp_path: Path) -> None:
    class Empty(Toy):
        def forward(self, batch: Batch) -> Loss:
            loss = super().forward(batch)
            return Loss(loss.total * 0, 0, nothing="all of it is known") if "clip0" in batch.ids else loss

    run(tmp_path, built(Empty), steps=2)
    why = "hold nothing to learn from (all of it is known)"
    assert f"update 1 is skipped: its 4 clips {why}: clip0, clip1, clip2 and 1 more" in notes(tmp_path)
    assert lines(tmp_path)[0]["ids"] == ["clip0", "clip1", "clip2", "clip3"]


def test_a_loss_without_a_gradient_is_a_clear_error(tmp_path: Path) -> None:
    class Detached(Toy):
        def forward(self, batch: Batch) -> Loss:
            return Loss(super().forward(batch).total.detach(), 1)

    with pytest.raises(ValueError, match="the loss has no gradient"):
        run(tmp_path, built(Detached), steps=1)


@pytest.mark.parametrize("name", ["not_finite", "chance_plateau"])
def test_a_verdict_stops_a_run_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    class Guessing(Toy):
        def forward(self, batch: Batch) -> Loss:
            loss = super().forward(batch)
            total = loss.total * (math.nan if name == "not_finite" and "clip8" in batch.ids else 1.0)
            return Loss(total, loss.count, {"accuracy": (0.1, 1), "chance_accuracy": (0.1, 1)})

    settings: dict[str, Any] = {"steps": 700, "log_every": 100, "save_every": 0}
    with pytest.raises(RunStopped, match="NaN" if name == "not_finite" else "chance_plateau: accuracy 0.1000 is that"):
        run(tmp_path, built(Guessing), loader=Loader(1), stop_on=[name], **settings)
    stopped = 8 if name == "not_finite" else 500
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{stopped}\n"
    assert name in [line for line in lines(tmp_path) if "verdict" in line][-1]["verdict"]


def test_a_line_of_the_log_has_the_means_since_the_line_before(tmp_path: Path) -> None:
    still: dict[str, Any] = {"schedule": lambda step: 0.0, "log_every": 2, "accumulate": 2}
    final = run(tmp_path, built(), steps=4, **still)
    first, second = lines(tmp_path)
    for line, numbers in ((first, range(16)), (second, range(16, 32))):
        loss = built()(batch(numbers))
        assert math.isclose(line["loss"], loss.total.item() / loss.count, rel_tol=1e-12)
        assert math.isclose(line["metrics"]["error"], line["loss"], rel_tol=1e-12)
        assert line["lr"] == 0.0
        assert line["grad_norm_max"] >= line["grad_norm"] > 0
    assert [line["step"] for line in (first, second)] == [2, 4]
    assert [line["clips"] for line in (first, second)] == [16, 32]
    assert 0 < first["seconds"] < second["seconds"]
    assert final == {"loss": second["loss"], "error": second["metrics"]["error"]}


def test_evaluation_happens_in_time_and_in_evaluation_mode(tmp_path: Path) -> None:
    objective = built()
    seen = []

    def evaluate(step: int) -> dict[str, float]:
        seen.append((step, objective.training))
        return {"score": step / 10}

    final = run(tmp_path, objective, steps=5, evaluate=evaluate, eval_every=2)
    assert seen == [(2, False), (4, False), (5, False)]
    assert objective.training
    assert final["evaluation/score"] == 0.5
    assert [line["evaluation"] for line in lines(tmp_path) if "evaluation" in line][-1] == {"score": 0.5}


def scored(folder: Path, scores: list[float], **options: Any) -> tuple[dict[str, float], Toy, list[int]]:
    """A run whose evaluations after every second update give these, and the updates after which it exported."""
    objective, exports = built(dropout=0.3), []

    def evaluate(step: int) -> dict[str, float]:
        return {"loss": 1.0, "accuracy": scores[step // 2 - 1]}

    def export() -> None:
        exports.append(int(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"]))

    settings: dict[str, Any] = {"steps": 12, "eval_every": 2, "save_every": 3, "log_every": 3, "best": "accuracy"}
    settings["evaluate"] = evaluate
    return run(folder, objective, **({"export": export} | settings | options)), objective, exports


def test_the_best_weights_are_exported_and_a_run_that_gets_no_better_ends(tmp_path: Path) -> None:
    # better after 2, 4 and 8; equal is no better
    scores = [0.1, 0.5, 0.4, 0.6, 0.6, math.nan]
    final, _, exports = scored(tmp_path / "whole", scores)
    assert exports == [2, 4, 8]
    assert (final["best/accuracy"], final["best/step"]) == (0.6, 8)
    assert (tmp_path / "whole" / "checkpoints" / "latest").read_text() == "step_12\n"
    final, _, exports = scored(tmp_path / "short", [0.1, 0.5, 0.4, 0.5, 0.9, 0.9], patience=2)
    assert exports == [2, 4]
    assert (tmp_path / "short" / "checkpoints" / "latest").read_text() == "step_8\n"
    assert "accuracy was best after update 4, with 0.5, and 2 evaluations since then were no better" in notes(
        tmp_path / "short"
    )
    assert [line["step"] for line in lines(tmp_path / "short") if line.get("ended")] == [8]


@pytest.mark.parametrize("at", [3, 4, 5, 6, 7])
def test_a_run_that_waits_for_better_scores_goes_on_to_the_bit(tmp_path: Path, at: int) -> None:
    scores = [0.1, 0.5, 0.4, 0.3, 0.9, 0.9]
    first, unbroken, exports = scored(tmp_path / "unbroken", scores, patience=2)

    def killed(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    dies = built(dropout=0.3, then=killed)
    settings = {"steps": 12, "eval_every": 2, "save_every": 3, "log_every": 3, "best": "accuracy", "patience": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", dies, evaluate=lambda step: {"accuracy": scores[step // 2 - 1]}, **settings)
    again, resumed, more = scored(tmp_path / "cut", scores, patience=2, resume=True)
    assert (again, exports) == (first, [2, 4])
    assert same(weights(unbroken), weights(resumed))
    # the checkpoint after update 3 knows of the best so far, and that after 6 that nothing was better
    assert more == ([2, 4] if at == 3 else [4] if at < 7 else [])
    # and a run that has ended stays so
    assert scored(tmp_path / "cut", scores, patience=2, resume=True)[0] == first


def test_a_score_that_is_never_finite_leaves_the_last_weights(tmp_path: Path) -> None:
    _, _, exports = scored(tmp_path, [math.nan] * 6, steps=4)
    assert exports[-1] == 4


def test_weights_that_could_not_be_exported_are_not_the_best(tmp_path: Path) -> None:
    tried = []

    def export() -> None:
        tried.append(len(tried))
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "encoder.safetensors")

    scored(tmp_path, [0.9, 0.5, 0.4], steps=6, save_every=6, export=export)
    assert tried == [0, 1]  # after the second evaluation again, though it is no better than what was lost
    assert "could not be exported (No space left on device); no checkpoint yet" in notes(tmp_path)


def test_the_least_loss_is_the_best_and_one_that_is_not_evaluated_is_refused(tmp_path: Path) -> None:
    losses = [0.5, 0.2, 0.3]
    final = run(tmp_path / "a", built(), steps=3, eval_every=1, best="loss",
                evaluate=lambda step: {"loss": losses[step - 1]})  # fmt: skip
    assert (final["best/loss"], final["best/step"]) == (0.2, 2)
    with pytest.raises(ValueError, match=r"trainer.best=wer: evaluations of this run give none, but loss; choose one"):
        run(tmp_path / "b", built(), steps=3, eval_every=1, best="wer", evaluate=lambda step: {"loss": 1.0})
    assert (tmp_path / "b" / "checkpoints" / "step_1").is_dir()
    with pytest.raises(ValueError, match=r"trainer.best=wer: is told by evaluations, and there are none"):
        run(tmp_path / "c", built(), steps=3, eval_every=1, best="wer")


def test_a_line_about_an_evaluation_says_so_and_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"loss": 0.51234, "feature_std": 1.0, "target_std": 1.0, "wer": math.nan, "accuracy": 0.25}
    run(tmp_path / "many", built(), steps=2, evaluate=lambda step: scores, eval_every=2)
    assert "\nvalidation after update 2: loss 0.5123  accuracy 0.25  wer nan\n" in capsys.readouterr().err
    run(tmp_path / "own", built(), steps=2, evaluate=lambda step: {"score": 0.5}, eval_every=2)
    assert "\nvalidation after update 2: score 0.5\n" in capsys.readouterr().err


def test_in_bfloat16_products_are_rounded_and_weights_are_not(tmp_path: Path) -> None:
    seen = []

    class Single(Toy):
        def forward(self, batch: Batch) -> Loss:
            x = batch.raw.data.float()
            y = self.down(x)
            seen.append((y.dtype, self.down.weight.dtype))
            return Loss(y.float().square().sum(), len(x))

    run(tmp_path / "low", built(Single).float(), steps=1, precision="bfloat16")
    run(tmp_path / "full", built(Single).float(), steps=1)
    assert seen == [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]


def test_statistics_are_gone_when_the_update_is_over(tmp_path: Path) -> None:
    objective = built(Diverse)
    run(tmp_path, objective, steps=2, accumulate=2)
    assert objective.global_statistics is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"trainer.steps=0: must be at least 1"),
        ({"steps": 1, "clip": 0.0}, r"trainer.clip=0.0: must be above 0"),
        ({"steps": 1, "eval_every": -1}, r"trainer.eval_every=-1: must be at least 0"),
        ({"steps": 1, "precision": "float16"}, r"trainer.precision=float16: must be float32 or bfloat16"),
        ({"steps": 1, "sharding": "half"}, r"trainer.sharding=half: must be none or full"),
        ({"steps": 1, "threads": 0}, r"trainer.threads=0"),
        ({"steps": 1, "best": "loss"}, r"trainer.best=loss: is told by evaluations; set trainer.eval_every"),
        (
            {"steps": 1, "best": "score", "eval_every": 1},
            r"trainer.best=score: must be loss, wer, cer, accuracy or map",
        ),
        ({"steps": 1, "patience": 1}, r"trainer.patience=1: must be at least 1, and wait for something"),
        ({"steps": 1, "best": "loss", "eval_every": 1, "patience": 0}, r"trainer.patience=0: must be at least 1"),
        ({"steps": 1, "stop_on": ["boredom"]}, r"no verdict is called 'boredom'; one of: dead_codebook"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings)


def test_one_process_has_all_weights_and_says_so(tmp_path: Path) -> None:
    alone, asked = built(), built()
    run(tmp_path / "alone", alone, steps=2)
    run(tmp_path / "asked", asked, steps=2, sharding="full")
    assert "trainer.sharding=full: nothing is sharded on one process; torchrun starts several" in notes(
        tmp_path / "asked"
    )
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), asked.parameters(), strict=True))


class Breaking(Loader):
    """A loader whose clips cannot be read from some micro-batch on, until they were mended."""

    mended = False

    def __iter__(self) -> Iterator[Batch]:
        for n, part in enumerate(super().__iter__(), start=self.consumed):
            if n >= 5 and not self.mended:
                raise BadClip("nan.wav", "1 sample is NaN")
            yield part


def test_a_bad_clip_costs_no_update_before_it_and_the_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    settings = {"steps": 8, "save_every": 0}
    unbroken = built(dropout=0.3)
    run(tmp_path / "unbroken", unbroken, **settings)
    broken = built(dropout=0.3)
    with pytest.raises(BadClip):
        run(tmp_path / "broken", broken, loader=Breaking(), **settings)
    loader = Breaking()
    loader.mended = True
    resumed = built(dropout=0.3)
    run(tmp_path / "broken", resumed, loader=loader, resume=True, **settings)
    assert same(weights(unbroken), weights(resumed))


def test_an_evaluation_that_fails_costs_no_update(tmp_path: Path) -> None:
    def evaluate(step: int) -> dict[str, float]:
        raise ValueError("valid.jsonl:3: the label 'zebra' is not among the 2 classes")

    with pytest.raises(ValueError, match="zebra"):
        run(tmp_path, built(), evaluate=evaluate, steps=4, eval_every=4, save_every=0)
    assert checkpoint.latest(tmp_path / "checkpoints", say=print) is not None


@pytest.mark.parametrize("steps", [4, 8])
def test_an_evaluation_that_failed_is_made_up_for_when_the_run_goes_on(tmp_path: Path, steps: int) -> None:
    # after update 4, the last one or not, the validation clips cannot be read at the first two starts
    settings: dict[str, Any] = {"steps": steps, "eval_every": 2, "best": "accuracy", "patience": 3}
    scores = {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.6}
    exports: list[int] = []
    evaluated: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        evaluated.append(step)
        if step == 4 and evaluated.count(4) < 3:
            raise BadClip("valid.wav", "no such file")
        return {"accuracy": scores[step] + 0.0 * float(torch.rand(()))}

    unbroken = built(dropout=0.3)
    first = run(tmp_path / "unbroken", unbroken, evaluate=lambda step: {"accuracy": scores[step]}, **settings)
    for _ in range(2):
        with pytest.raises(BadClip):
            run(tmp_path / "broken", built(dropout=0.3), evaluate=evaluate, resume=True, **settings)
    resumed = built(dropout=0.3)
    settings["export"] = lambda: exports.append(evaluated[-1])
    mended = run(tmp_path / "broken", resumed, evaluate=evaluate, resume=True, **settings)
    assert mended == first
    assert (mended["best/accuracy"], mended["best/step"], exports) == (0.7, 4, [4])
    assert same(weights(unbroken), weights(resumed))
    made = [line["step"] for line in lines(tmp_path / "broken") if "evaluation" in line]
    assert made == list(range(2, steps + 1, 2))
    # and once it was made it is not made again
    assert run(tmp_path / "broken", built(), evaluate=evaluate, resume=True, **settings) == first
    assert evaluated == [2, 4, 4, *made[1:]]


def test_an_evaluation_that_a_verdict_came_before_is_made_up_for_and_may_end_the_run(tmp_path: Path) -> None:
    class Guessing(Toy):
        def forward(self, batch: Batch) -> Loss:
            loss = super().forward(batch)
            return Loss(loss.total, loss.count, {"accuracy": (0.1, 1), "chance_accuracy": (0.1, 1)})

    evaluated: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        evaluated.append(step)
        return {"loss": float(len(evaluated))}

    settings: dict[str, Any] = {"steps": 700, "log_every": 100, "save_every": 0, "eval_every": 250, "patience": 1}
    settings |= {"best": "loss", "evaluate": evaluate, "stop_on": ["chance_plateau"], "loader": Loader(1)}
    with pytest.raises(RunStopped, match="chance_plateau"):
        run(tmp_path, built(Guessing), **settings)
    assert evaluated == [250]
    for _ in range(2):  # the second finds it made, and the run ended
        run(tmp_path, built(Guessing), resume=True, **settings)
        assert evaluated == [250, 500]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_500\n"
    assert "and 1 evaluations since then were no better, so the run ends" in notes(tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_a_run_that_is_told_to_stop_while_it_evaluates_does_not_evaluate_again(tmp_path: Path, older: bool) -> None:
    evaluated: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        evaluated.append(step)
        if len(evaluated) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    with pytest.raises(SystemExit):
        run(tmp_path, built(), steps=4, eval_every=2, evaluate=evaluate)
    if older:  # of a version that did not note which evaluation was the last
        path = tmp_path / "checkpoints" / "step_2" / "state.json"
        state = json.loads(path.read_text())
        del state["evaluated"]
        path.write_text(json.dumps(state))
    run(tmp_path, built(), steps=4, eval_every=2, evaluate=evaluate, resume=True)
    assert evaluated == [2, 4]


class Leaving(Loader):
    """Counts epochs of two micro-batches, and cannot read a clip from the third micro-batch on."""

    def __iter__(self) -> Iterator[Batch]:
        for part in super().__iter__():
            last = self.consumed - 1
            self.epoch_start = (last // 2, last // 2 * 2)
            self.remark = f"{self.consumed - 2} clips could not be read" if self.consumed > 2 else ""
            yield part


def test_clips_that_are_left_out_are_told_of_at_once_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, built(), loader=Leaving(), steps=6, log_every=1, save_every=5)
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    notes = [(line["step"], line["note"]) for line in lines if "note" in line]
    assert notes == [(3, "1 clips could not be read"), (6, "4 clips could not be read")]


def test_a_run_goes_on_from_the_start_of_its_epoch(tmp_path: Path) -> None:
    run(tmp_path, built(), loader=Leaving(), steps=5)
    loader = Leaving()
    run(tmp_path, built(), loader=loader, steps=5, resume=True)
    assert (loader.consumed, loader.epoch_start) == (5, (2, 4))

"""`mmssl topics` from rows with units to rows with topics."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import mmssl.topics
from mmssl.assemble import pretrain
from mmssl.cli import app
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.recipe import load
from mmssl.topics import _counts, write_topics
from mmssl.units import write_units

CODES = 8


def manifest_of(path: Path, clips: list[list[int]]) -> Path:
    """Rows with units; nobody looks for their sounds."""
    rows = [
        {"id": str(n), "audio": f"{n}.wav", "units": {"rate": 50, "values": units}} for n, units in enumerate(clips)
    ]
    write_manifest(path, rows)
    return path


def two_kinds(count: int, seed: int) -> list[list[int]]:
    """Even clips have the units 0 to 3, odd ones 4 to 7."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(4, size=30) + 4 * (n % 2)).tolist() for n in range(count)]


def topics_of(path: Path) -> list[int]:
    return [row["topic"] for row in Manifest(path)]


def test_clips_of_two_kinds_have_two_topics_in_every_manifest(tmp_path: Path) -> None:
    train = manifest_of(tmp_path / "train.jsonl", two_kinds(40, 0))
    valid = manifest_of(tmp_path / "valid.jsonl", two_kinds(7, 1))
    found = write_topics([train, valid], tmp_path / "t", topics=2, codes=CODES)
    first, second = topics_of(tmp_path / "t" / "train.jsonl")[:2]
    assert {first, second} == {0, 1}
    assert topics_of(tmp_path / "t" / "train.jsonl") == [first, second] * 20
    assert topics_of(tmp_path / "t" / "valid.jsonl") == ([first, second] * 4)[:7]
    assert [one.clips for one in found] == [40, 7]
    assert found[0].perplexity == pytest.approx(2.0)
    for before, after in zip(Manifest(train), Manifest(tmp_path / "t" / "train.jsonl"), strict=True):
        assert {key: value for key, value in after.items() if key != "topic"} == before


def test_the_same_clips_in_another_order_told_apart_by_pairs_of_units(tmp_path: Path) -> None:
    """0, 1, 2, ... and 0, 2, 1, ... have the same units equally often, and no pair in common."""
    clips = [[0, 1, 2] * 10 if n % 2 else [0, 2, 1] * 10 for n in range(20)]
    path = manifest_of(tmp_path / "train.jsonl", clips)
    write_topics([path], tmp_path / "one", topics=2, codes=3)
    assert len(set(topics_of(tmp_path / "one" / "train.jsonl"))) == 1
    write_topics([path], tmp_path / "two", topics=2, codes=3, ngram=2)
    first, second = topics_of(tmp_path / "two" / "train.jsonl")[:2]
    assert first != second
    assert topics_of(tmp_path / "two" / "train.jsonl") == [first, second] * 10


def test_runs_of_units_are_counted_by_hand(tmp_path: Path) -> None:
    manifest = Manifest(manifest_of(tmp_path / "m.jsonl", [[0, 0, 1, 2, 2, 0, 1], [2]]))
    # a unit that goes on counts once: 0 1 2 0 1
    assert _counts(manifest, np.arange(2), 3, "units", 1).toarray().tolist() == [[2, 2, 1], [0, 0, 1]]
    pairs = _counts(manifest, np.arange(2), 3, "units", 2).toarray().reshape(2, 3, 3)
    assert pairs[0].tolist() == [[0, 2, 0], [0, 0, 1], [1, 0, 0]]
    assert not pairs[1].any()


def test_topics_that_are_there_are_used_and_not_found_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = manifest_of(tmp_path / "train.jsonl", two_kinds(20, 0))
    write_topics([train], tmp_path / "t", topics=2, codes=CODES)
    before = (tmp_path / "t" / "train.jsonl").read_bytes()
    monkeypatch.setattr(mmssl.topics, "_fit", None)
    later = manifest_of(tmp_path / "later.jsonl", two_kinds(4, 3))
    write_topics([train, later], tmp_path / "t", topics=2, codes=CODES)
    assert (tmp_path / "t" / "train.jsonl").read_bytes() == before
    assert topics_of(tmp_path / "t" / "later.jsonl") == topics_of(tmp_path / "t" / "train.jsonl")[:4]
    with pytest.raises(ValueError, match="the topics here was made with topics=2, and not 3"):
        write_topics([train], tmp_path / "t", topics=3, codes=CODES)


def test_they_are_those_of_the_library_from_its_own_fit(tmp_path: Path) -> None:
    from sklearn.decomposition import LatentDirichletAllocation

    rng = np.random.default_rng(5)
    clips = [rng.choice(CODES, p=rng.dirichlet([0.3] * CODES), size=40).tolist() for _ in range(30)]
    manifest = Manifest(manifest_of(tmp_path / "train.jsonl", clips))
    write_topics([manifest], tmp_path / "t", topics=4, codes=CODES, seed=2)
    counts = _counts(manifest, np.arange(30), CODES, "units", 1)
    model = LatentDirichletAllocation(n_components=4, total_samples=30, random_state=2)
    for number in range(mmssl.topics.PASSES):
        [places] = mmssl.topics.scattered(30, 2 + number)
        model.partial_fit(counts[places])
    assert topics_of(tmp_path / "t" / "train.jsonl") == model.transform(counts).argmax(1).tolist()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    train = manifest_of(tmp_path / "train.jsonl", two_kinds(4, 0))
    refused = [
        ({"topics": 1}, "a choice takes two"),
        ({"ngram": 0}, "ngram=0"),
        ({"codes": 500, "ngram": 3}, "125,000,000 runs of that length"),
        ({"key": "units"}, "give another key"),
        ({"of": "other"}, "train.jsonl:[1-4]: no 'other'; the row has audio, id, units"),
        ({"codes": 5}, "train.jsonl:[24]: unit . at step . is none of the 5"),
    ]
    for number, (settings, said) in enumerate(refused):
        with pytest.raises(ValueError, match=said):
            write_topics([train], tmp_path / str(number), **{"topics": 2, "codes": CODES, **settings})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="would be written over"):
        write_topics([train], tmp_path, topics=2, codes=CODES)


def test_the_command_writes_what_hubert_learns_from(sounds: Path, tmp_path: Path) -> None:
    rows = [{"audio": str(path), "seconds": 0.7} for path in sorted(sounds.rglob("*.wav"))]
    write_manifest(tmp_path / "train.jsonl", rows)
    units = write_units([tmp_path / "train.jsonl"], tmp_path / "u", codes=4, features="mfcc", rate=8000)[0].manifest
    given = ["topics", str(units), "--topics", "2", "--codes", "4", "--out", str(tmp_path / "t")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{tmp_path / 't' / 'train.jsonl'}: 16 clips, ")
    assert done.stdout.endswith(" of 2 topics in use\n")
    # low and high chirps are what the clips differ in
    labels = {row["topic"]: set() for row in Manifest(tmp_path / "t" / "train.jsonl")}
    for row in Manifest(tmp_path / "t" / "train.jsonl"):
        labels[row["topic"]].add(Path(row["audio"]).parent.name)
    assert sorted(map(sorted, labels.values())) == [["high"], ["low"]]
    toy = [
        "transformer.dim=16", "transformer.depth=1", "transformer.heads=2", "positions.kernel=7", "positions.groups=2",
        "frontend.bands=8", "objective.dim=8", "trainer.steps=2", "data.workers=0",
    ]  # fmt: skip
    label_sets = ["objective.units.units=4", "objective.topics={topic: 2}"]
    data = f"data.train={tmp_path / 't' / 'train.jsonl'}"
    run = pretrain(load("small/hubert_speech", [*toy, *label_sets, data]), tmp_path / "run")
    assert '"topic_accuracy"' in (run / "log.jsonl").read_text()

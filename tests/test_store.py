"""Embeddings on disk: the same however they were written, and never lost to one bad clip or to a cut."""

import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mmssl import clips, store
from mmssl.build import build_encoder
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.embed import Embedder
from mmssl.files import alone
from mmssl.store import Written, write_embeddings
from mmssl.types import BadClip

SPEECH: dict[str, Any] = {
    "format": 1,
    "modality": "speech",
    "frontend": {"name": "waveform", "layers": [[8, 10, 5], [8, 4, 4], [8, 4, 4]], "rate": 8000},
    "positions": {"name": "conv", "kernel": 8, "groups": 2},
    "transformer": {"dim": 16, "depth": 2, "heads": 2},
    "encoder": {},
    "augment_eval": [],
}
KEPT: dict[str, Any] = {"layers": [0, 2], "tokens": True, "batch_size": 2}


def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(build_encoder(SPEECH), SPEECH)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 clips, of which three cannot be read, two of them at the beginning."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []
    for n in range(13):
        path = folder / f"{n}.wav"
        soundfile.write(path, rng.standard_normal(300 + 70 * n) / 4, 8000)
        if n in (0, 1, 7):
            path.write_bytes(b"rubbish")
        rows.append({"audio": str(path), "id": f"clip {n}", "seconds": 0.1})
    write_manifest(folder / "m.jsonl", rows)
    return folder / "m.jsonl"


def arrays(path: Path | None) -> dict[str, np.ndarray]:
    assert path is not None
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_a_clip_whose_vector_overflows_in_any_layer_is_a_bad_clip(manifest: Path, tmp_path: Path) -> None:
    broken = embedder()
    broken.encoder.transformer.blocks[1].mlp.down.weight.mul_(torch.inf)  # the second layer alone
    good = [str(Manifest(manifest)[place]["audio"]) for place in (2, 3)]
    told: dict[str, str] = {}
    with pytest.raises(BadClip, match="its vector is not finite; on_bad_clip=skip"):
        broken.embed(good, layer="all")
    assert set(broken.embed(good, layer=2, on_bad_clip="skip").bad) == set(good)
    with pytest.raises(ValueError, match="none of the 2 clips can be read; .*its vector is not finite"):
        write_embeddings(broken, good, tmp_path / "e", tell=told.__setitem__, **KEPT)


def test_a_file_holds_what_embed_gives(manifest: Path, tmp_path: Path) -> None:
    first, last = embedder().embed(manifest, layer=[0, 2], on_bad_clip="skip")
    told: dict[str, str] = {}
    done = write_embeddings(embedder(), manifest, tmp_path / "sub" / "e", tell=told.__setitem__, **KEPT)
    assert done == Written(tmp_path / "sub" / "e.npz", 13, 3, 16)
    found = arrays(done.path)
    assert found["ids"].tolist() == first.ids
    assert found["layers"].tolist() == [0, 2]
    for layer, one in enumerate((first, last)):
        assert found["scene"][layer] == pytest.approx(one.scene.numpy(), abs=1e-5, nan_ok=True)
        assert found["tokens"][layer] == pytest.approx(one.tokens.numpy(), abs=1e-5)
    assert np.array_equal(found["valid"], first.valid.numpy())
    assert first.time_ms is not None
    assert found["time_ms"] == pytest.approx(first.time_ms.numpy())
    assert dict(zip(found["bad_ids"].tolist(), found["bad_reasons"].tolist(), strict=True)) == first.bad == told
    assert [path.name for path in done.path.parent.iterdir()] == ["e.npz"]  # type: ignore[union-attr]
    one = write_embeddings(embedder(), Manifest(manifest)[2:5], tmp_path / "one.npz")
    assert set(arrays(one.path)) == {"ids", "scene"}
    assert arrays(one.path)["scene"] == pytest.approx(embedder().embed(Manifest(manifest)[2:5]).scene.numpy(), abs=1e-5)


def test_parquet_holds_the_same_with_null_rows(manifest: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    whole = arrays(write_embeddings(embedder(), manifest, tmp_path / "e.npz", **KEPT).path)
    path = write_embeddings(embedder(), manifest, tmp_path / "e.parquet", **KEPT).path
    assert parquet.ParquetFile(path).num_row_groups > 1
    table = parquet.read_table(path)
    assert table.column_names == ["id", "scene_0", "scene_2", "tokens_0", "tokens_2", "time_ms", "error"]
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == whole["ids"].tolist()
    assert {row["id"]: row["error"] for row in rows if row["error"]} == dict(
        zip(whole["bad_ids"].tolist(), whole["bad_reasons"].tolist(), strict=True)
    )
    for n, row in enumerate(rows):
        if row["error"] is not None:
            assert row["scene_0"] is row["tokens_2"] is row["time_ms"] is None
            continue
        valid = whole["valid"][n]
        assert np.array(row["scene_2"], np.float32) == pytest.approx(whole["scene"][1, n])
        assert np.array(row["tokens_0"], np.float32) == pytest.approx(whole["tokens"][0, n, valid])
        assert np.array(row["time_ms"], np.float32) == pytest.approx(whole["time_ms"][n, valid])
    plain = parquet.read_table(write_embeddings(embedder(), manifest, tmp_path / "s.parquet").path)
    assert plain.column_names == ["id", "scene", "error"]
    assert plain["scene"].null_count == 3


def test_parquet_without_pyarrow_is_one_sentence(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"e\.parquet: Parquet takes pyarrow: pip install mmssl\[parquet\]; or name"):
        write_embeddings(embedder(), manifest, tmp_path / "e.parquet")
    assert not list(tmp_path.iterdir())


def test_a_job_that_was_cut_off_goes_on(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = arrays(write_embeddings(embedder(), manifest, tmp_path / "whole.npz", **KEPT).path)
    write, written = store._write_part, []

    def dies(path: Path, *given: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *given)

    monkeypatch.setattr(store, "_write_part", dies)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(embedder(), manifest, tmp_path / "e.npz", **KEPT)
    assert not (tmp_path / "e.npz").exists()

    read: list[int] = []
    reading = clips.Clips.read
    monkeypatch.setattr(store, "_write_part", write)
    monkeypatch.setattr(clips.Clips, "read", lambda self, place: read.append(place) or reading(self, place))
    found = arrays(write_embeddings(embedder(), manifest, tmp_path / "e.npz", **KEPT).path)
    # 2 and 2 clips were done
    assert read == list(range(4, 13))
    assert set(found) == set(whole)
    for name, values in whole.items():
        assert found[name].tolist() == values.tolist() or found[name] == pytest.approx(values, abs=1e-5, nan_ok=True)


def test_a_cut_while_parts_are_put_together_loses_none(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(parts: Any, path: Path, layers: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setitem(store.FORMATS, ".npz", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*e\.npz'"):
            write_embeddings(embedder(), manifest, tmp_path / "e.npz", **KEPT)
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz.merging"]
    monkeypatch.setattr(clips.Clips, "read", None)
    assert write_embeddings(embedder(), manifest, tmp_path / "e.npz", **KEPT).bad == 3


def test_several_processes_write_one_file(manifest: Path, tmp_path: Path) -> None:
    whole = arrays(write_embeddings(embedder(), manifest, tmp_path / "whole.npz", **KEPT).path)
    for number in (2, 3):
        assert write_embeddings(embedder(), manifest, tmp_path / "e.npz", part=(number, 3), **KEPT).path is None
    settings = {**KEPT, "batch_size": 3}
    found = arrays(write_embeddings(embedder(), manifest, tmp_path / "e.npz", part=(1, 3), **settings).path)
    assert found["ids"].tolist() == whole["ids"].tolist()
    assert found["tokens"] == pytest.approx(whole["tokens"], abs=1e-5)
    assert found["scene"] == pytest.approx(whole["scene"], abs=1e-5, nan_ok=True)
    with pytest.raises(ValueError, match="part=4/3: counts from 1"):
        write_embeddings(embedder(), manifest, tmp_path / "e.npz", part=(4, 3))


def interrupted(monkeypatch: pytest.MonkeyPatch, suffix: str, other: Callable[[], object]) -> None:
    """Let another process do something while the first file with that suffix is written, but not yet in its place."""
    whole, waiting = store._whole, [other]

    @contextmanager
    def slow(path: Path, *mark: str) -> Iterator[Path]:
        with whole(path, *mark) as unfinished:
            yield unfinished
            if path.suffix == suffix and waiting:
                waiting.pop()()

    monkeypatch.setattr(store, "_whole", slow)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_one_part_may_be_started_twice_at_the_same_moment(
    suffix: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = arrays(write_embeddings(embedder(), manifest, tmp_path / "whole.npz", **KEPT).path)
    out = tmp_path / "new" / "e.npz"

    def half(number: int) -> Path | None:
        return write_embeddings(embedder(), manifest, out, part=(number, 2), **KEPT).path

    interrupted(monkeypatch, suffix, lambda: half(1))
    assert half(1) is None
    found = arrays(half(2))
    assert found["ids"].tolist() == whole["ids"].tolist()
    assert found["scene"] == pytest.approx(whole["scene"], abs=1e-5, nan_ok=True)
    assert [path.name for path in out.parent.iterdir()] == ["e.npz"]


@pytest.mark.parametrize("other", [{"batch_size": 3}, {"batch_size": 1}, {"part": (2, 3)}])
def test_processes_that_divide_the_same_clips_otherwise_write_each_clip_once(
    other: dict[str, Any], manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = arrays(write_embeddings(embedder(), manifest, tmp_path / "whole.npz", **KEPT).path)
    half: dict[str, Any] = {"part": (1, 2), **KEPT}
    # while the first part of the first process is not yet in its place, as where both were started at once
    interrupted(
        monkeypatch, ".npz", lambda: write_embeddings(embedder(), manifest, tmp_path / "e", **{**half, **other})
    )
    write_embeddings(embedder(), manifest, tmp_path / "e", **half)
    done = write_embeddings(embedder(), manifest, tmp_path / "e", **KEPT)
    assert done == Written(tmp_path / "e.npz", 13, 3, 16)
    found = arrays(done.path)
    assert set(found) == set(whole)
    for name, expected in whole.items():
        if expected.dtype == np.float32:
            assert found[name] == pytest.approx(expected, abs=1e-5, nan_ok=True)
        else:
            assert found[name].tolist() == expected.tolist()


def test_of_two_jobs_that_start_at_the_same_moment_one_is_refused(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"part": (1, 2), **KEPT}
    interrupted(
        monkeypatch, ".json", lambda: write_embeddings(embedder(), manifest, tmp_path / "e", **{**given, "layers": [1]})
    )
    with pytest.raises(ValueError, match=r"another job, where layers is \[1\] and not \[0, 2\]; delete it"):
        write_embeddings(embedder(), manifest, tmp_path / "e", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz.parts"]


def test_a_process_whose_clips_were_done_by_another_ends_in_peace(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Written] = []
    interrupted(
        monkeypatch, ".npz", lambda: done.append(write_embeddings(embedder(), manifest, tmp_path / "e", **KEPT))
    )
    left = write_embeddings(embedder(), manifest, tmp_path / "e", part=(1, 2), **KEPT)
    assert (left.path, left.clips) == (None, 13)
    assert done == [Written(tmp_path / "e.npz", 13, 3, 16)]
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz"]

    # but a folder that nobody put together is missed
    interrupted(monkeypatch, ".npz", lambda: shutil.rmtree(tmp_path / "f.npz.parts"))
    with pytest.raises(FileNotFoundError, match=r"f\.npz\.parts"):
        write_embeddings(embedder(), manifest, tmp_path / "f", **KEPT)


@pytest.mark.parametrize("listed", ["all", "none"])
def test_parts_that_another_process_takes_are_left_to_it(
    listed: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, parts = store._finish, store._parts

    def beaten(folder: Path, merging: Path, *given: Any) -> Written | None:
        with alone(folder / "job.json"):  # it is about to
            assert finish(folder, merging, *given) is None
        assert folder.exists()

        def takes(where: Path) -> list[Path]:
            found = parts(where)
            folder.rename(merging)
            return found if listed == "all" else []

        with monkeypatch.context() as patched:
            patched.setattr(store, "_parts", takes)
            return finish(folder, merging, *given)

    with monkeypatch.context() as patched:
        patched.setattr(store, "_finish", beaten)
        assert write_embeddings(embedder(), manifest, tmp_path / "e", **KEPT) == Written(None, 13, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz.merging"]
    assert write_embeddings(embedder(), manifest, tmp_path / "e", **KEPT).path == tmp_path / "e.npz"


def test_who_comes_while_parts_are_put_together_leaves_them_to_that(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = arrays(write_embeddings(embedder(), manifest, tmp_path / "whole.npz", **KEPT).path)
    out, put_together = tmp_path / "e" / "e.npz", store.FORMATS[".npz"]

    def late(*given: Any) -> None:
        assert [path.name for path in out.parent.iterdir()] == ["e.npz.merging"]
        for part in ((1, 2), (1, 1)):
            assert write_embeddings(embedder(), manifest, out, part=part, **KEPT) == Written(None, 13, 0, 0)
        with pytest.raises(ValueError, match=r"e\.npz\.merging: holds parts of another job, where layers"):
            write_embeddings(embedder(), manifest, out, **{**KEPT, "layers": [1]})
        put_together(*given)

    monkeypatch.setitem(store.FORMATS, ".npz", late)
    found = arrays(write_embeddings(embedder(), manifest, out, **KEPT).path)
    assert found["scene"] == pytest.approx(whole["scene"], abs=1e-5, nan_ok=True)
    assert [path.name for path in out.parent.iterdir()] == ["e.npz"]


def test_a_folder_of_parts_that_does_not_say_its_job_is_refused(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "e.npz.parts").mkdir()
    (tmp_path / "e.npz.parts" / "000000000000-000000000002.npz").write_bytes(b"of something")
    with pytest.raises(ValueError, match=r"e\.npz\.parts: has no job\.json, which says what .*; delete it, or choose"):
        write_embeddings(embedder(), manifest, tmp_path / "e", **KEPT)
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz.parts"]


def test_fewer_processes_go_on_where_more_were_cut_off(manifest: Path, tmp_path: Path) -> None:
    whole = arrays(write_embeddings(embedder(), manifest, tmp_path / "whole.npz", **KEPT).path)
    write_embeddings(embedder(), manifest, tmp_path / "e.npz", part=(2, 3), **KEPT)
    assert write_embeddings(embedder(), manifest, tmp_path / "e.npz", part=(1, 2), **KEPT).path is None
    found = arrays(write_embeddings(embedder(), manifest, tmp_path / "e.npz", **KEPT).path)
    assert found["ids"].tolist() == whole["ids"].tolist()
    assert found["scene"] == pytest.approx(whole["scene"], abs=1e-5, nan_ok=True)


def test_parts_of_another_job_are_left_alone(manifest: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"part": (1, 2), **KEPT}
    write_embeddings(embedder(), manifest, tmp_path / "e.npz", **given)
    with pytest.raises(
        ValueError, match=r"e\.npz\.parts: holds parts of another job, where layers is \[0, 2\] and not"
    ):
        write_embeddings(embedder(), manifest, tmp_path / "e.npz", **{**given, "layers": [1]})
    other = embedder()
    with torch.no_grad():
        other.encoder.transformer.blocks[1].attention.qkv.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match="another job, where encoder is"):
        write_embeddings(other, manifest, tmp_path / "e.npz", **given)
    rows = [{**row, "id": row["id"].replace("clip 3", "clip three")} for row in Manifest(manifest)]
    write_manifest(tmp_path / "m.jsonl", rows)
    with pytest.raises(ValueError, match="other clips, number 3 was clip 3 and is clip three; delete it, or choose"):
        write_embeddings(embedder(), tmp_path / "m.jsonl", tmp_path / "e.npz", **given)
    half = Embedder(build_encoder(SPEECH), SPEECH, precision="bfloat16")
    with pytest.raises(ValueError, match="another job, where precision is float32 and not bfloat16"):
        write_embeddings(half, manifest, tmp_path / "e.npz", **given)
    assert json.loads((tmp_path / "e.npz.parts" / "job.json").read_text())["layers"] == [0, 2]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layers": [3]}, "has layers 0 to 2"),
        ({"pool": "maen"}, "pool='maen': choose mean"),
        ({"window": -1.0}, "window=-1, overlap=-0.25: seconds"),
        ({"batch_size": 0}, "both must be above 0"),
        ({"on_bad_clip": "leave"}, "choose raise or skip"),
    ],
)
def test_settings_that_no_clip_can_have_are_refused_before_anything_is_written(
    wrong: dict[str, Any], words: str, manifest: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        write_embeddings(embedder(), manifest, tmp_path / "e.npz", **wrong)
    assert not list(tmp_path.iterdir())


def test_a_weighting_beside_other_layers_has_no_number_in_an_npz(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"e.npz: layers=.*: an .npz names layers by numbers"):
        write_embeddings(embedder(), manifest, tmp_path / "e.npz", layers=[-1, ((0, 0.5), (1, 0.5))])
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_part_is_that_of_the_next_job(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Manifest(manifest)[2:7]
    with pytest.raises(ValueError, match="this encoder has no class token"):
        write_embeddings(embedder(), good, tmp_path / "e.npz", pool="class")
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz.parts"]
    reading, waiting = clips.Clips.read, ["last"]

    def slow(self: clips.Clips, place: int) -> clips.Item:
        if waiting:
            write_embeddings(embedder(), good, tmp_path / "e.npz", part=(1, 5), pool=waiting.pop())
        return reading(self, place)

    # one that another takes before it has a part leaves it to that
    monkeypatch.setattr(clips.Clips, "read", slow)
    with pytest.raises(ValueError, match="another job, where pool is last and not mean"):
        write_embeddings(embedder(), good, tmp_path / "e.npz", pool="mean")
    done = write_embeddings(embedder(), good, tmp_path / "e.npz", pool="last")
    assert arrays(done.path)["scene"] == pytest.approx(embedder().embed(good, pool="last").scene.numpy(), abs=1e-5)


def test_no_more_clips_are_held_than_a_part_has(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "WINDOW_GROUPS", 2)
    write, before, sizes = store._write_part, [], []

    def watched(path: Path, found: Any, layers: Any) -> None:
        gc.collect()
        assert not any(one() is not None for one in before), "embeddings that are on disk are still in memory"
        before.extend(weakref.ref(one.tokens) for one in found)
        sizes.append(len(found[0].ids))
        write(path, found, layers)

    monkeypatch.setattr(store, "_write_part", watched)
    write_embeddings(embedder(), manifest, tmp_path / "e.npz", **KEPT)
    assert sizes == [2, 2, 4, 4, 1]


def test_bad_clips_can_end_the_job_and_nothing_but_bad_clips_does(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0.wav: not a sound"):
        write_embeddings(embedder(), manifest, tmp_path / "e.npz", on_bad_clip="raise")
    with pytest.raises(ValueError, match="none of the 2 clips can be read; the first is clip 0"):
        write_embeddings(embedder(), Manifest(manifest)[:2], tmp_path / "none.npz")
    assert not (tmp_path / "none.npz.parts").exists()


def test_one_name_may_be_of_a_good_and_of_a_bad_clip(manifest: Path, tmp_path: Path) -> None:
    rows = [{**row, "id": "same"} for row in Manifest(manifest)[1:3]]
    write_manifest(tmp_path / "m.jsonl", rows)
    found = arrays(write_embeddings(embedder(), tmp_path / "m.jsonl", tmp_path / "e.npz").path)
    assert np.isnan(found["scene"]).all(1).tolist() == [True, False]
    assert found["bad_ids"].tolist() == ["same"]

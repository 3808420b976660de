"""`mmssl units` from files to the rows that name their units."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mmssl.units
from mmssl.assemble import export_config, finetune, pretrain
from mmssl.build import build_encoder
from mmssl.cli import app
from mmssl.data.manifest import Manifest, write_manifest
from mmssl.data.units import read_units
from mmssl.embed import load
from mmssl.modalities.speech.mfcc import MFCC
from mmssl.modalities.speech.reader import read
from mmssl.recipe import load as load_recipe
from mmssl.resolve import resolve
from mmssl.training.checkpoint import export_encoder, read_tensors
from mmssl.types import Raw
from mmssl.units import Spectral, Written, scattered, write_units

MFCC_UNITS = {"codes": 4, "features": "mfcc", "rate": 8000, "frames": 10_000}


@pytest.fixture(scope="module")
def manifests(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten clips and four, as train.jsonl and valid.jsonl."""
    folder = tmp_path_factory.mktemp("manifests")
    files = sorted(sounds.rglob("*.wav"))
    files = [*files[1::3], *files[2::3], *files[::3]]  # low and high ones in both
    for name, part in (("train", files[:10]), ("valid", files[10:14])):
        write_manifest(folder / f"{name}.jsonl", [{"audio": str(path), "seconds": 0.7} for path in part])
    return [folder / "train.jsonl", folder / "valid.jsonl"]


@pytest.fixture(scope="module")
def written(manifests: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Written]]:
    out = tmp_path_factory.mktemp("units") / "mfcc"
    return out, write_units(manifests, out, **MFCC_UNITS)  # type: ignore[arg-type]


def units_of(row: dict[str, object], codes: int = 4) -> list[int]:
    found: list[int] = read_units(row["units"], [codes]).values[0, :, 0].tolist()
    return found


def test_every_frame_has_its_nearest_center(written: tuple[Path, list[Written]]) -> None:
    out, found = written
    centers = read_tensors(out / "codebook.safetensors")["centers"]
    assert centers.shape == (4, 39)
    mfcc = MFCC(rate=8000)
    total = 0
    for one, name in zip(found, ("train", "valid"), strict=True):
        assert one.manifest == out / f"{name}.jsonl"
        for row in Manifest(one.manifest):
            wave = read(row["audio"], rate=8000)
            [x] = mfcc(wave[None], torch.tensor([len(wave)]))
            # as the definition has it, by distances
            assert units_of(row) == torch.cdist(x, centers).argmin(1).tolist()
            assert read_units(row["units"], [4]).rate == 100.0
            total += len(x)
    assert sum(one.units for one in found) == total
    assert [one.clips for one in found] == [10, 4]
    assert all(1 < one.perplexity <= 4 for one in found)


def test_a_step_of_lloyds_algorithm_over_all_frames_brings_hardly_anything(written: tuple[Path, list[Written]]) -> None:
    out, _ = written
    mfcc, frames = MFCC(rate=8000), []
    for row in Manifest(out / "train.jsonl"):
        wave = read(row["audio"], rate=8000)
        frames.append(mfcc(wave[None], torch.tensor([len(wave)]))[0])
    x = torch.cat(frames)
    centers = read_tensors(out / "codebook.safetensors")["centers"]
    before, nearest = torch.cdist(x, centers).square().min(1)
    means = torch.stack([x[nearest == code].mean(0) for code in range(4)])
    after = torch.cdist(x, means).square().amin(1)
    assert before.sum() < 1.02 * after.sum()
    assert before.sum() < 0.8 * (x - x.mean(0)).square().sum()


def test_nothing_is_pickled_and_nothing_is_left_over(written: tuple[Path, list[Written]]) -> None:
    out, _ = written
    assert sorted(path.name for path in out.iterdir()) == [
        "codebook.json", "codebook.safetensors", "train.00000.safetensors", "train.jsonl",
        "valid.00000.safetensors", "valid.jsonl",
    ]  # fmt: skip


def test_shards_and_parts_change_no_unit(
    manifests: list[Path], written: tuple[Path, list[Written]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmssl.units, "SHARD", 3)
    [first] = write_units(manifests[:1], tmp_path / "u", part=(1, 2), **MFCC_UNITS)  # type: ignore[arg-type]
    assert first.manifest is None
    [second] = write_units(manifests[:1], tmp_path / "u", part=(2, 2), **MFCC_UNITS)  # type: ignore[arg-type]
    assert second.manifest is not None
    assert len(list((tmp_path / "u").glob("train.0*.safetensors"))) == 4
    before, after = Manifest(written[0] / "train.jsonl"), Manifest(second.manifest)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [units_of(row) for row in after] == [units_of(row) for row in before]


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(
    manifests: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmssl.units, "SHARD", 3)
    out = tmp_path / "u"
    [whole] = write_units(manifests[:1], out, **MFCC_UNITS)  # type: ignore[arg-type]
    expected = (out / "train.jsonl").read_bytes()
    kept, lost, torn = (out / f"train.0000{number}.safetensors" for number in (0, 1, 2))
    dates = kept.stat().st_mtime_ns, torn.stat().st_mtime_ns
    (out / "train.jsonl").unlink()
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[:40])
    seen: list[int] = []
    each = mmssl.units.Embedder.each

    def counted(self, inputs, see, **settings):
        seen.append(len(inputs))
        return each(self, inputs, see, **settings)

    monkeypatch.setattr(mmssl.units.Embedder, "each", counted)
    [again] = write_units(manifests[:1], out, **MFCC_UNITS)  # type: ignore[arg-type]
    assert again == whole
    assert (out / "train.jsonl").read_bytes() == expected
    assert seen == [3, 3]  # two shards of four; no sample is drawn again
    assert kept.stat().st_mtime_ns == dates[0]


def test_shards_of_other_clips_are_written_again(manifests: list[Path], tmp_path: Path) -> None:
    moved = tmp_path / "m" / "train.jsonl"
    rows = list(Manifest(manifests[0]))
    write_manifest(moved, rows)
    write_units([moved], tmp_path / "u", **MFCC_UNITS)  # type: ignore[arg-type]
    write_manifest(moved, [{**row, "id": f"new {row['id']}"} for row in reversed(rows)])
    write_units([moved], tmp_path / "u", **MFCC_UNITS)  # type: ignore[arg-type]
    for row in Manifest(tmp_path / "u" / "train.jsonl"):
        samples = len(read(row["audio"], rate=8000))
        assert len(units_of(row)) == (samples - 200) // 80 + 1


def test_shards_of_other_files_of_the_same_names_are_written_again(manifests: list[Path], tmp_path: Path) -> None:
    rows = [{**row, "id": str(n)} for n, row in enumerate(Manifest(manifests[0]))]
    write_manifest(tmp_path / "m" / "train.jsonl", rows)
    write_units([tmp_path / "m" / "train.jsonl"], tmp_path / "u", **MFCC_UNITS)  # type: ignore[arg-type]
    before = {row["id"]: units_of(row) for row in Manifest(tmp_path / "u" / "train.jsonl")}
    files = {"0": rows[1]["audio"], "1": rows[0]["audio"]}
    changed = [{**row, "audio": files.get(row["id"], row["audio"])} for row in rows]
    changed[2] |= {"start": 0.1, "duration": 0.2, "seconds": 0.2}
    write_manifest(tmp_path / "m" / "train.jsonl", changed)
    write_units([tmp_path / "m" / "train.jsonl"], tmp_path / "u", **MFCC_UNITS)  # type: ignore[arg-type]
    after = {row["id"]: units_of(row) for row in Manifest(tmp_path / "u" / "train.jsonl")}
    assert (after["0"], after["1"]) == (before["1"], before["0"])
    assert before["0"] != before["1"]
    assert len(after["2"]) == (1600 - 200) // 80 + 1
    assert all(after[id] == before[id] for id in before.keys() - {"0", "1", "2"})


def test_a_bad_clip_is_left_out_and_named(manifests: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    rows = list(Manifest(manifests[1]))
    write_manifest(tmp_path / "bad.jsonl", [rows[0], {"id": "b", "audio": str(broken), "seconds": 1.0}, *rows[1:]])
    given = [tmp_path / "bad.jsonl"]
    with pytest.raises(ValueError, match="broken.wav"):
        write_units(given, tmp_path / "u", **MFCC_UNITS)  # type: ignore[arg-type]
    [found] = write_units(given, tmp_path / "u", on_bad_clip="skip", **MFCC_UNITS)  # type: ignore[arg-type]
    assert list(found.bad) == ["b"]
    assert found.manifest is not None
    assert [row["id"] for row in Manifest(found.manifest)] == [row["id"] for row in rows]
    write_manifest(tmp_path / "all.jsonl", [{"id": "b", "audio": str(broken), "seconds": 1.0}])
    with pytest.raises(ValueError, match="none of its clips can be read"):
        write_units([tmp_path / "all.jsonl"], tmp_path / "v", on_bad_clip="skip", **MFCC_UNITS)  # type: ignore[arg-type]


def test_the_chain_of_two_iterations(
    manifests: list[Path], tmp_path: Path, written: tuple[Path, list[Written]]
) -> None:
    """Units of MFCC, HuBERT, units of its first block, HuBERT again; and those units are what `embed` gives."""
    out, _ = written
    toy = [
        "transformer.dim=16", "transformer.depth=2", "transformer.heads=2", "positions.kernel=7", "positions.groups=2",
        "frontend.bands=8", "objective.dim=8", "trainer.steps=2", "trainer.eval_every=2", "data.workers=0",
    ]  # fmt: skip

    def hubert(units: Path, codes: int, run: str) -> Path:
        data = [f"data.train={units / 'train.jsonl'}", f"data.valid={units / 'valid.jsonl'}"]
        recipe = load_recipe("small/hubert_speech", [*toy, *data, f"objective.units.units={codes}"])
        return pretrain(recipe, tmp_path / run)

    first = hubert(out, 4, "first")
    found = write_units(manifests, tmp_path / "layer1", codes=3, model=first, layer=1, frames=200)
    second = hubert(tmp_path / "layer1", 3, "second")
    assert '"accuracy"' in (second / "log.jsonl").read_text()

    centers = read_tensors(tmp_path / "layer1" / "codebook.safetensors")["centers"]
    embedded = load(first).embed(manifests[1], layer=1)
    assert found[1].manifest is not None
    for row, x, valid in zip(Manifest(found[1].manifest), embedded.tokens, embedded.valid, strict=True):
        assert units_of(row, 3) == torch.cdist(x[valid], centers).argmin(1).tolist()
        assert read_units(row["units"], [3]).rate == 50.0

    # the same folder with other weights in it
    shutil.rmtree(first)
    second.rename(first)
    with pytest.raises(
        ValueError, match="the codebook here was made with weights='.*', and not '.*'; choose another fol"
    ):
        write_units(manifests, tmp_path / "layer1", codes=3, model=first, layer=1, frames=200)


def test_each_place_is_looked_at_once_and_the_first_lie_all_over() -> None:
    for count in (1, 2, 7, 1000, 1024):
        places = np.concatenate(list(scattered(count, seed=3)))
        assert sorted(places.tolist()) == list(range(count))
    first = np.sort(next(scattered(100_000, seed=0)))
    assert len(first) == 200
    assert np.diff(first).max() < 3 * 100_000 / 200


def test_what_does_not_go_together_is_refused(
    manifests: list[Path], written: tuple[Path, list[Written]], tmp_path: Path
) -> None:
    out, _ = written
    refused = [
        ({"features": "mfcc", "model": out}, "either features"),
        ({}, "either features"),
        ({"features": "mfcc", "codes": 1}, "codes=1: from 2 to 65536"),
        ({"features": "mfcc", "part": (3, 2)}, "part=3/2"),
        ({"features": "mfcc", "part": (2, 2)}, "holds no codebook yet"),
        ({"features": "mfcc", "codes": 5000, "rate": 8000}, "fewer than codes=5000"),
        ({"features": "pitch"}, "choose mfcc or logmel"),
    ]
    for number, (settings, said) in enumerate(refused):
        with pytest.raises(ValueError, match=said):
            write_units(manifests, tmp_path / str(number), **{"codes": 4, **settings})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was made with codes=4, and not 5"):
        write_units(manifests, out, **{**MFCC_UNITS, "codes": 5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="would be written over"):
        write_units(manifests, manifests[0].parent, **MFCC_UNITS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each with a name of its own"):
        write_units([manifests[0], manifests[0]], out, **MFCC_UNITS)  # type: ignore[arg-type]


def test_the_command_says_what_it_wrote(manifests: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "u"
    given = ["units", *map(str, manifests), "--features", "logmel", "--rate", "8000", "--codes", "3", "--out", str(out)]
    done = CliRunner().invoke(app, [*given, "--frames", "300"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{out / 'train.jsonl'}: 10 clips, ")
    assert lines[1].endswith(" of 3 codes in use")
    assert json.loads((out / "codebook.json").read_text())["features"] == "logmel"


def test_a_crop_that_loses_its_place_is_refused_before_training(written: tuple[Path, list[Written]]) -> None:
    out, _ = written
    data = [f"data.train={out / 'train.jsonl'}", "objective.units.units=4"]
    crop = "augment={train: [{name: random_crop, seconds: 1}]}"
    with pytest.raises(ValueError, match="random_crop moves clips away from their units; use random_span"):
        pretrain(load_recipe("small/hubert_speech", [*data, crop]), out / "never")
    with pytest.raises(ValueError, match="train.jsonl:1: no 'other'; the row has"):
        pretrain(load_recipe("small/hubert_speech", [data[0], "objective.units={other: 4}"]), out / "never2")


def test_the_codes_of_a_codec_are_those_of_its_own_class(manifests: list[Path], tmp_path: Path) -> None:
    """EnCodec at random weights, two codebooks; a clip's codes are the same alone and beside others."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        target_bandwidths=[1.0], sampling_rate=8000, num_filters=2, num_residual_layers=1, hidden_size=8,
        upsampling_ratios=[8, 5], codebook_size=32, codebook_dim=8, num_lstm_layers=1,
    )  # fmt: skip
    codec = transformers.EncodecModel(config).eval()
    # all zero in a new one, where every code is the first: so what the encoder says of a clip, all along it
    with torch.no_grad():
        said = codec.encoder(read(Manifest(manifests[1])[0]["audio"], rate=8000)[None, None])[0].t()
    for layer in codec.quantizer.layers:
        layer.codebook.embed.copy_(said[:: len(said) // 32][:32])
    codec.save_pretrained(tmp_path / "codec")
    [found] = write_units(manifests[1:], tmp_path / "u", codec=tmp_path / "codec", bandwidth=1.0)
    assert found.manifest is not None
    for row in Manifest(found.manifest):
        wave = read(row["audio"], rate=8000)
        with torch.no_grad():
            codes = codec.encode(wave[None, None], bandwidth=1.0).audio_codes[0, 0].t()
        units = read_units(row["units"], [32] * codes.shape[1])
        assert units.rate == 200.0
        assert torch.equal(units.values[0], codes)
        assert codes.shape == (-(-len(wave) // 40), codec.quantizer.get_num_quantizers_for_bandwidth(1.0))
    assert found.perplexity > 1.5
    with pytest.raises(ValueError, match="bandwidth=3: .* knows"):
        write_units(manifests[1:], tmp_path / "v", codec=tmp_path / "codec", bandwidth=3.0)
    with pytest.raises(ValueError, match="layer=3: .*codec has layers 0 to 0"):
        write_units(manifests[1:], tmp_path / "v", codec=tmp_path / "codec", bandwidth=1.0, layer=3)
    with pytest.raises(ValueError, match="a codec has its own"):
        write_units(manifests[1:], tmp_path / "v", codec=tmp_path / "codec", codes=3)


def test_a_codec_that_is_no_folder_asks_no_network(manifests: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for codec in (tmp_path / "missing", "runs/vq", "codec"):
        with pytest.raises(ValueError, match=f"{codec}: no such folder; give the folder of a run"):
            write_units(manifests[1:], tmp_path / "u", codec=codec)


def test_the_chain_of_codes(manifests: list[Path], tmp_path: Path) -> None:
    """vq-wav2vec, its codes in rows, BERT that reads them, CTC on its encoder, transcripts of held-out codes."""
    toy = [
        "transformer.dim=16",
        "transformer.depth=2",
        "transformer.heads=2",
        "trainer.steps=2",
        "trainer.eval_every=2",
    ]
    data = [f"data.train={manifests[0]}", f"data.valid={manifests[1]}", "objective.codes=6"]
    first = pretrain(load_recipe("small/vq_wav2vec_speech", [*toy, *data, "frontend.bands=8"]), tmp_path / "vq")
    assert (first / "objective.safetensors").is_file()
    with pytest.raises(ValueError, match="was pretrained and not fine-tuned"):
        load(first).predict(manifests[1])

    spelled = tmp_path / "spelled.jsonl"
    write_manifest(spelled, [{**row, "text": "lo"} for row in Manifest(manifests[1])])
    out = tmp_path / "codes"
    found = write_units([manifests[0], spelled], out, codec=first, key="codes")
    assert [one.clips for one in found] == [10, 4]
    objective = load(first).objective
    for row in Manifest(out / "spelled.jsonl"):
        wave = read(row["audio"], rate=8000)
        codes, tokens = objective.codes(Raw(wave[None], torch.tensor([len(wave)]), ["a"], 8000.0))
        units = read_units(row["codes"], [6, 6])
        assert torch.equal(units.values, codes)
        assert units.rate == 1000 / tokens.step_ms == 50.0

    small = [*toy, "positions.kernel=4", "positions.groups=2"]
    codes_of = ["frontend.codes=[6,6]", f"data.train={out / 'train.jsonl'}", f"data.valid={out / 'spelled.jsonl'}"]
    second = pretrain(load_recipe("small/bert_codes_speech", [*small, *codes_of]), tmp_path / "bert")
    assert '"codes_1_accuracy"' in (second / "log.jsonl").read_text()
    embedded = load(second).embed(out / "spelled.jsonl")
    for row, valid in zip(Manifest(out / "spelled.jsonl"), embedded.valid, strict=True):
        assert int(valid.sum()) == row["codes"]["count"]
    assert embedded.time_ms is not None
    assert embedded.time_ms[0, :2].tolist() == [10.0, 30.0]
    numbers = read_units(next(iter(Manifest(out / "spelled.jsonl")))["codes"], [6, 6]).values[0].t()
    alone = load(second).embed(numbers)
    torch.testing.assert_close(alone.scene[0], embedded.scene[0], rtol=1e-4, atol=1e-5)

    labelled = [f"data.train={out / 'spelled.jsonl'}", f"data.valid={out / 'spelled.jsonl'}", f"init={second}"]
    third = finetune(
        load_recipe("small/ctc_speech", [*toy[3:], *labelled, "modality=codes", "augment={}"]), tmp_path / "ctc"
    )
    said = load(third).predict(out / "spelled.jsonl")
    assert len(said) == 4
    assert all(isinstance(text, str) for text in said)


def test_a_run_without_codes_is_no_codec(manifests: list[Path], tmp_path: Path) -> None:
    config = export_config(
        resolve(load_recipe("small/wav2vec2_speech", [f"data.train={manifests[0]}"])), Manifest(manifests[0])
    )
    export_encoder(tmp_path / "run", build_encoder(config), config)
    with pytest.raises(ValueError, match="holds an encoder without the objective that trained it"):
        write_units(manifests, tmp_path / "u", codec=tmp_path / "run")


@pytest.mark.parametrize(("rate", "step"), [(16_000, 10.0), (22_050, 220 / 22.05), (11_025, 110 / 11.025)])
def test_units_lie_in_time_where_their_frames_do(rate: int, step: float) -> None:
    measured = Spectral("logmel", rate=rate)
    assert measured.step_ms == pytest.approx(step)
    # quiet for 20 s, then loud: the first loud frame, by its own rate, reaches to where that begins
    wave = torch.cat([torch.zeros(20 * rate), torch.ones(rate)]) * torch.randn(21 * rate) * 0.1
    tokens = measured.tokens(Raw(wave[None], torch.tensor([len(wave)]), ["a"], float(rate)))
    energies = tokens.x[0].mean(1)
    first = int((energies > energies.min() + 1).nonzero()[0])
    begins = first * measured.step_ms / 1000
    assert 20 - measured.span_ms / 1000 <= begins + 1e-6 <= 20 + measured.step_ms / 1000

"""The command line, from a folder of files to scores, and what it says when something is wrong."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from mmssl.cli import app, evaluate
from mmssl.data.manifest import Manifest
from mmssl.tasks import Task

TOY = ["transformer.dim=16", "transformer.depth=2", "transformer.heads=2", "objective.decoder_dim=16"]
TOY += ["objective.decoder_depth=1", "objective.decoder_heads=2", "data.workers=0", "data.batch_size=6"]
TWO_STEPS = ["trainer.steps=2", "trainer.eval_every=2", "trainer.log_every=1", "trainer.save_every=1"]


def mmssl(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    result = mmssl(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def said(*arguments: object) -> str:
    """The sentence of a command that fails."""
    result = mmssl(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("mmssl: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("mmssl: ").strip()


@pytest.fixture(scope="module")
def manifests(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifests")
    text = ok("manifest", pictures, "--modality", "image", "--split-from", 1, "--label-from", -1, "--out", out)
    assert text.splitlines() == [f"{out / 'test.jsonl'}: 4 clips", f"{out / 'train.jsonl'}: 12 clips"]
    return out


@pytest.fixture(scope="module")
def pretrained(manifests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "mae"
    text = ok("pretrain", "small/mae_image", *data(manifests), *TOY, *TWO_STEPS, "--out", run)
    assert f"{run}: done" in text
    return run


def data(manifests: Path) -> list[str]:
    return [f"data.train={manifests / 'train.jsonl'}", f"data.valid={manifests / 'test.jsonl'}"]


def test_from_files_to_scores(pretrained: Path, manifests: Path, pictures: Path, tmp_path: Path) -> None:
    assert "8 clips, width 16, layer -1" in ok("embed", pretrained, pictures / "train/checks", pictures / "test/checks",
                                               "--out", tmp_path / "e.npz")  # fmt: skip
    with np.load(tmp_path / "e.npz", allow_pickle=False) as arrays:
        assert arrays["scene"].shape == (8, 16)
        assert np.isfinite(arrays["scene"]).all()

    clips = ["--train", manifests / "train.jsonl", "--test", manifests / "test.jsonl"]
    assert ok("evaluate", pretrained, *clips, "--task", "knn", "--k", 3, "--layer", 2).startswith("knn: accuracy ")

    few = [
        "--strength",
        0.1,
        "--labels-per-class",
        2,
        "--draws",
        2,
        "--layer",
        "0,2",
        "--valid",
        manifests / "test.jsonl",
    ]
    assert "2 labels a class, 2 draws" in ok("evaluate", pretrained, *clips, *few, "--baseline", "random")

    tuned = tmp_path / "tuned"
    ok("finetune", "small/classify_image", f"init={pretrained}", *data(manifests), *TWO_STEPS, "--out", tuned)
    ok("evaluate", tuned, "--task", "classify", "--test", manifests / "test.jsonl", "--out", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"]["n"] == 4
    config = json.loads((tuned / "config.json").read_text())
    assert config["classes"] == ["checks", "stripes"]
    assert config["transformer"]["dim"] == 16


def test_every_layer_can_be_embedded_with_its_tokens(pretrained: Path, manifests: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    ok("embed", pretrained, manifests / "test.jsonl", "--layer", "all", "--tokens", "--out", out)
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["layers"].tolist() == [0, 1, 2]
        assert arrays["tokens"].shape == (3, 4, 16, 16)


def test_the_same_command_resumes_and_another_recipe_is_refused(pretrained: Path, manifests: Path) -> None:
    before = (pretrained / "encoder.safetensors").read_bytes()
    command = ["pretrain", "small/mae_image", *data(manifests), *TOY]
    ok(*command, *TWO_STEPS, "trainer.log_every=2", "--out", pretrained)
    assert (pretrained / "encoder.safetensors").read_bytes() == before
    sentence = said(*command, *TWO_STEPS, "trainer.steps=3", "--out", pretrained)
    assert sentence.startswith(f"{pretrained}: holds another run, in which trainer.steps is 2 and not 3")


def test_a_folder_with_other_files_is_left_alone(pretrained: Path, manifests: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    sentence = said("pretrain", "small/mae_image", *data(manifests), "--out", tmp_path)
    assert sentence == f"{tmp_path}: holds files that are not of a run; choose another folder with --out"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["pretrain", "small/mae_image", "objective.mask_ration=0.5"],
            "command line 'objective.mask_ration=0.5': unknown key 'objective.mask_ration'. "
            "Did you mean 'objective.mask_ratio'? Keys here: target, mask, mask_ratio, decoder_mask, "
            "decoder_mask_ratio, position_noise, decoder_dim, decoder_depth, decoder_heads, decoder_mlp_dim, "
            "decoder_eps, decoder_window, decoder_global_blocks.",
        ),
        (
            ["pretrain", "small/mae_imag"],
            "no recipe is called 'small/mae_imag'. Did you mean 'small/mae_image'? `mmssl recipes` lists",
        ),
        (["pretrain", "small/mae_image"], "small/mae_image.yaml:"),
        (["pretrain", "small/mae_image", "data.train=no.jsonl"], "no.jsonl: no such manifest"),
        (["pretrain", "small/classify_image"], "small/classify_image.yaml:"),
        (["finetune", "small/mae_image"], "small/mae_image.yaml:"),
        (["finetune", "small/ctc_speech", "init=nowhere"], "command line 'init=nowhere': init=nowhere: no such folder"),
        (["embed", "nowhere", "a.wav"], "nowhere: no such folder"),
        (["embed", "nowhere", "a.wav", "--layer", "last"], "nowhere: no such folder"),
        (["evaluate", "nowhere", "--test", "a.jsonl"], "nowhere: no such folder"),
        (["manifest", "nowhere"], "nowhere: no such folder"),
        (["manifest", "a.jsonl"], "a.jsonl: a manifest already"),
        (["manifest", "a.jsonl", "--stats", "small/mae_audio"], "a.jsonl: no such manifest"),
        (["manifest", ".", "--modality", "smell"], "--modality smell: one of speech, audio, "),
        (["manifest", ".", "--column", "text"], "--column text: expected NAME=VALUE"),
        (["manifest", ".", "--key-from", "speaker=first"], "--key-from: 'first' is no number"),
        (["manifest", ".", "--key-from", "audio=1"], "scan: 'audio' says where a clip lies"),
        (["manifest", ".", "--split", "train=most"], "--split: 'most' is no number"),
        (
            ["manifest", ".", "--split", "train=0.8,valid=0.1"],
            "splits: the shares train=0.8,valid=0.1 add up to 0.9, not",
        ),
        (["manifest", ".", "--split", "train=1.5,valid=-0.5"], "splits: the shares train=1.5,valid=-0.5 must all be"),
        (["recipes", "no"], "no recipe is called 'no'."),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    arguments: Sequence[str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(*arguments).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSSL_TRACEBACK", "1")
    assert isinstance(mmssl("manifest", "nowhere").exception, ValueError)


def test_a_pretrained_encoder_keeps_its_shape(pretrained: Path, manifests: Path, tmp_path: Path) -> None:
    command = ["finetune", "small/classify_image", f"init={pretrained}", *data(manifests), "--out", tmp_path / "run"]
    sentence = said(*command, "transformer.depth=4")
    assert sentence.startswith(f"command line 'transformer.depth=4': the encoder comes from init={pretrained}, where")
    assert "Did you mean 'transformer.depth'?" in said(*command, "transformer.dept=4")
    assert "is for speech" in said("finetune", "small/ctc_speech", f"init={pretrained}")


def test_bad_files_are_named_and_left_out_of_a_manifest(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "good.png").write_bytes((pictures / "train/checks/1.png").read_bytes())
    (folder / "bad.png").write_bytes(b"<html>")
    result = mmssl("manifest", folder, "--modality", "image")
    assert result.exit_code == 0
    assert result.stdout == f"{folder / 'manifest.jsonl'}: 1 clips\n"
    assert result.stderr.startswith(f"left out: {folder / 'bad.png'}: ")


def test_files_that_were_passed_over_are_counted_in_a_line(sounds: Path, tmp_path: Path) -> None:
    for name in ("a.wav", "b.caf"):  # a file is what its content says
        (tmp_path / name).write_bytes((sounds / "train/low/0.wav").read_bytes())
    for name in ("a.txt", "1.mp4", "2.MP4", "3.webm", "notes.md", "README", "1.jpg"):
        (tmp_path / name).write_bytes(b"")
    result = mmssl("manifest", tmp_path, "--modality", "audio", "--out", tmp_path / "out" / "a.jsonl")
    assert result.stdout == f"{tmp_path / 'out' / 'a.jsonl'}: 2 clips, 1 with text\n"
    assert result.stderr == (
        "passed over: 2 .mp4 (--modality video), 1 .jpg (--modality image), 1 .webm (--modality video), "
        "1 without suffix, 1 .md\n"
    )


def test_a_folder_that_gives_no_row_is_refused_with_the_way_out(
    pictures: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sentence = said("manifest", pictures, "--out", tmp_path)
    assert sentence.startswith(f"{pictures}: no audio file here (")
    assert sentence.endswith("; found 16 .png; --modality image looks for those")
    sounds = tmp_path_factory.mktemp("sounds")
    (sounds / "a.wav").write_bytes(b"")
    sentence = said("manifest", sounds, "--modality", "image")
    assert sentence.endswith("; found 1 .wav; --modality speech and --modality audio look for those")
    file = tmp_path / "pictures.jsonl"
    sentence = said("manifest", pictures, "--modality", "image", "--split-from", 1, "--out", file)
    assert sentence == f"--out {file}: the rows have splits, with a file for each; give a folder"
    assert not file.exists()
    shares = "train=0.999999,test=0.000001"
    sentence = said("manifest", pictures, "--modality", "image", "--split", shares, "--out", tmp_path / "empty")
    assert sentence.startswith(f"--split {shares}: none of the 16 rows falls to test; give it a larger share, or")
    assert not (tmp_path / "empty").exists()
    sentence = said("manifest", pictures, "--modality", "image", "--label-from", 3, "--out", tmp_path)
    assert sentence == (
        f"{pictures}: none of the 16 files gives a row; the first is {pictures / 'test/checks/15.png'}: "
        "has no folder of level 3 to take its label from (its folders: ['test', 'checks'])"
    )
    one = pictures / "test/checks/15.png"
    assert said("manifest", one) == f"{one}: a file; give the folder that it lies in"
    assert list(tmp_path.iterdir()) == []


def test_a_wav_file_that_was_cut_off_is_told_of(sounds: Path, tmp_path: Path) -> None:
    whole = (sounds / "train/low/0.wav").read_bytes()
    (tmp_path / "whole.wav").write_bytes(whole)
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])
    result = mmssl("manifest", tmp_path)
    assert result.stdout == f"{tmp_path / 'manifest.jsonl'}: 2 clips\n"
    assert result.stderr.startswith(f"odd: 1 of the clips; the first is {tmp_path / 'half.wav'}, which ends after 0.19")
    assert "remark" not in (tmp_path / "manifest.jsonl").read_text()


def test_shards_of_webdataset_are_listed_trained_on_and_embedded_where_they_lie(
    pretrained: Path, pictures: Path, tmp_path: Path
) -> None:
    files = sorted((pictures / "train").rglob("*.png"))
    (tmp_path / "shards").mkdir()
    for number, part in enumerate((files[:7], files[7:])):
        with tarfile.open(tmp_path / "shards" / f"{number:03}.tar", "w") as shard:
            for n, file in enumerate(part):
                for suffix, content in (
                    (".png", file.read_bytes()),
                    (".cls", b"1"),
                    (".txt", file.parent.name.encode()),
                ):
                    info = tarfile.TarInfo(f"{number}{n:05}{suffix}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    tars = sorted((tmp_path / "shards").iterdir())
    rows = tmp_path / "m.jsonl"
    text = ok("manifest", *tars, "--modality", "image,text", "--out", rows)
    assert text == f"{rows}: {len(files)} clips, {len(files)} with text\n"
    listed = Manifest(rows)
    assert [row["text"] for row in listed] == [file.parent.name for file in files]
    assert {row["label"] for row in listed} == {1}
    assert {row["image"] for row in listed} == {str(tar) for tar in tars}

    ok("pretrain", "small/mae_image", f"data.train={rows}", *TOY, "trainer.steps=1", "--out", tmp_path / "run")

    def vectors(*inputs: Path) -> tuple[list[str], np.ndarray]:
        ok("embed", pretrained, *inputs, "--out", tmp_path / "e.npz")
        with np.load(tmp_path / "e.npz") as found:
            return found["ids"].tolist(), found["scene"]

    _, plain = vectors(*files)
    ids, inside = vectors(tmp_path / "shards")
    assert ids[0] == f"{tars[0]}#000000.png"
    assert ids[-1] == f"{tars[1]}#1{len(files) - 8:05}.png"
    assert inside == pytest.approx(plain, abs=1e-5)
    assert vectors(rows)[1] == pytest.approx(plain, abs=1e-5)
    # of a torn one what is whole, and a row for the rest; it ends within its second picture
    tars[0].write_bytes(tars[0].read_bytes()[: 512 * 7 + 10])
    ids, inside = vectors(tars[0])
    assert ids == [f"{tars[0]}#000000.png", f"{tars[0]}#000001.png", str(tars[0])]
    assert np.isnan(inside).all(1).tolist() == [False, True, True]
    assert said("manifest", tmp_path, tars[0]) == f"{tars[0]}: give one folder, or tar files alone"


def test_clips_that_could_not_be_read_are_counted_apart(pretrained: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    clips = [pictures / "train/checks/1.png", tmp_path / "missing.png", tmp_path / "missing.png"]
    text = ok("embed", pretrained, *clips, "--out", out)
    assert text == f"{out}: 1 clips, 2 could not be read, width 16, layer -1\n"
    assert said("embed", pretrained, *clips, "--on-bad-clip", "raise", "--out", tmp_path / "other.npz").endswith(
        "no such file or directory; on_bad_clip=skip (--on-bad-clip skip) goes on without such clips"
    )


def test_a_full_disk_is_named_with_the_file(pretrained: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "e.npz.tmp").symlink_to("/dev/full")
    command = ["embed", pretrained, pictures, "--out", tmp_path / "e.npz"]
    assert said(*command) == f"{tmp_path / 'e.npz'}: no space left on device"
    # what was computed is kept, and enough once there is room
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz.merging"]
    assert ok(*command).startswith(f"{tmp_path / 'e.npz'}: 16 clips")


def test_processes_that_share_the_work_say_what_is_missing(pretrained: Path, pictures: Path, tmp_path: Path) -> None:
    command = ["embed", pretrained, pictures, "--out", tmp_path / "e.npz", "--part"]
    assert ok(*command, "2/2") == f"{tmp_path / 'e.npz'}: part 2/2 is done, and others are not yet\n"
    assert ok(*command, "1/2") == f"{tmp_path / 'e.npz'}: 16 clips, width 16, layer -1\n"
    assert said(*command, "half") == "--part: 'half' is no number"


def test_recipes_are_listed_and_printed() -> None:
    lines = [line.split("\t") for line in ok("recipes").splitlines()]
    assert [line[0] for line in lines if line[0] in ("paired/clip_speech_text_base", "speech/wav2vec2_base")] == [
        "paired/clip_speech_text_base",
        "speech/wav2vec2_base",
    ]
    assert all(len(line) == 3 for line in lines)  # whoever reads it is no terminal
    assert ok("recipes", "image/mae_base").startswith("# MAE")


def test_who_has_seen_enough_and_what_is_no_text_end_no_command() -> None:
    program = "import sys, mmssl.cli as cli; cli.app = {}; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program.format(r"lambda: print('a\udce9.png')")], capture_output=True, check=True
    )
    assert done.stdout == b"a\\udce9.png\n"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-u", "-m", "mmssl", "recipes"], stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("name", ["pretrain", "finetune", "embed", "search", "evaluate", "manifest", "recipes"])
def test_each_command_teaches_by_an_example(name: str) -> None:
    assert f"Example: mmssl {name} " in " ".join(ok(name, "--help").split())


def test_the_example_of_manifest_writes_what_it_says(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [example] = [one.epilog for one in app.registered_commands if one.epilog and "mmssl manifest " in one.epilog]
    monkeypatch.chdir(tmp_path)
    for speaker in range(10):
        for digit in ("one", "two"):
            path = tmp_path / "digits" / f"speaker {speaker}" / digit / "1.wav"
            path.parent.mkdir(parents=True)
            path.write_bytes((sounds / "train/low/0.wav").read_bytes())
    ok(*shlex.split(example.removeprefix("Example: mmssl ")))
    parts = {side: list(Manifest(tmp_path / "manifests" / "digits" / f"{side}.jsonl")) for side in ("train", "valid")}
    speakers = {side: {row["speaker"] for row in rows} for side, rows in parts.items()}
    assert speakers["train"] | speakers["valid"] == {f"speaker {speaker}" for speaker in range(10)}
    assert len(speakers["valid"]) == 1
    assert {row["label"] for row in parts["train"]} == {"one", "two"}


def test_the_help_of_evaluate_says_of_each_task_what_it_is() -> None:
    choices, option = get_args(get_type_hints(evaluate, include_extras=True)["task"])
    assert choices == Task
    assert set(re.findall(r"[a-z-]+", option.help)) >= set(get_args(Task))


def test_help_answers_at_once_and_imports_no_torch() -> None:
    code = (
        "import resource, sys\n"
        "from mmssl.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'numpy'} & set(sys.modules)), usage.ru_utime + usage.ru_stime)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    heavy, _, seconds = done.stdout.strip().splitlines()[-1].rpartition(" ")
    assert heavy == "[]"
    # of this process alone, whatever else the machine does
    assert float(seconds) < 1.0


def test_every_command_keeps_the_memory_that_it_frees_and_help_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("mmssl.cli.keep_freed_memory", lambda: asked.append(True))
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    assert {"pretrain", "embed", "units"} <= set(commands)
    for number, command in enumerate(app.registered_commands, 1):
        assert command.callback is not None
        with pytest.raises(TypeError):  # none of its arguments is given
            command.callback(nothing=None)
        assert len(asked) == number
    ok("units", "--help")
    assert len(asked) == len(commands)


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mmssl", "recipes"], capture_output=True, text=True, check=True)
    assert "small/mae_image" in done.stdout


def test_the_constants_of_normalization_are_measured(manifests: Path, pictures: Path, tmp_path: Path) -> None:
    text = ok("manifest", manifests / "train.jsonl", "--stats", "small/mae_image")
    assert text.startswith("frontend.mean=")
    assert "12 clips" in text
    # a folder is listed and measured in one go, on its training split
    again = ok(
        "manifest", pictures, "--modality", "image", "--split-from", 1, "--stats", "small/mae_image", "--out", tmp_path
    )
    assert text.splitlines()[0] in again

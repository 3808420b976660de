"""Every recipe that ships: complete, buildable as written, and trainable at toy size."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mmssl.assemble import export_config, finetune, pretrain
from mmssl.build import build_encoders, build_objective
from mmssl.data.manifest import Manifest, split_rows, write_manifest
from mmssl.data.scan import scan
from mmssl.data.units import write_shard
from mmssl.modalities import MODALITIES
from mmssl.objectives import LABELLED
from mmssl.recipe import Recipe, header, load, shipped
from mmssl.resolve import resolve

FOLDER = Path(__file__).parents[1] / "recipes"
TRUNK = ("transformer.dim", "transformer.depth", "transformer.heads")
RECIPES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


@pytest.fixture(scope="session")
def manifests(sounds: Path, pictures: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Modality -> folder with train.jsonl and test.jsonl, which have labels and texts."""
    folder = tmp_path_factory.mktemp("manifests")
    for name, files in (("speech", sounds), ("audio", sounds), ("image", pictures), ("video", videos)):
        kind = MODALITIES[name]
        found = scan(
            files,
            media=kind.media,
            probe=kind.probe,
            suffixes=kind.suffixes,
            label_from=-1,
            text_from=-1,
            split_from=1,
            progress=False,
        )
        for split, rows in split_rows(found.rows).items():
            if name in ("image", "video"):  # with sound as long as a video here
                sound = folder / "beside.wav"
                soundfile.write(sound, np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000)
                rows = [{**row, "audio": str(sound), "seconds": 2.0} for row in rows]
            units = {"rate": 50, "values": [step // 4 % 3 for step in range(40)]}  # longer than every sound
            write_manifest(folder / name / f"{split}.jsonl", [{**row, "units": units} for row in rows])
            if name == "speech":  # two codebooks' codes of the same clips
                values = np.arange(40 * len(rows))[:, None] // 3 % [3, 2]
                shard = folder / f"{split}.safetensors"
                write_shard(shard, values, rate=50, lengths=np.full(len(rows), 40), of="sounds")
                coded = [
                    {**row, "seconds": 0.8, "codes": {"path": str(shard), "first": 40 * n, "count": 40}}
                    for n, row in enumerate(rows)
                ]
                write_manifest(folder / "codes" / f"{split}.jsonl", coded)
    return {name: folder / name for name in MODALITIES}


def kind(recipe: Recipe) -> str:
    """The modality whose files a recipe reads; all have words beside them, and pictures and videos have sound."""
    modality = recipe.get("modality")
    if isinstance(modality, str):
        return modality
    return next((name for name in modality if name not in ("text", "audio")), "audio")


def data(recipe: Recipe, side: str, path: Path, manifests: dict[str, Path]) -> dict[str, Path]:
    """The setting of a manifest, or of one for each modality where the objective takes them in turn."""
    if recipe.get("objective.of") is None:
        return {f"data.{side}": path}
    return {f"data.{side}.{name}": manifests[name] / path.name for name in recipe.get("modality")}


def toy(name: str, manifests: dict[str, Path]) -> Recipe:
    """The recipe with the sizes of a toy and nothing else changed."""
    written = load(name)
    folder = manifests[kind(written)]
    sizes = {
        **data(written, "train", folder / "train.jsonl", manifests),
        **data(written, "valid", folder / "test.jsonl", manifests),
        "data.workers": 0,
        "transformer.dim": 16,
        "transformer.depth": 2,
        "transformer.heads": 2,
        "trainer.steps": 2,
        "trainer.accumulate": 1,
        "trainer.eval_every": 2,
        "trainer.save_every": 0,
    }
    per_name = {
        "waveform": {
            "frontend.layers": [[8, k, s] for k, s in ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))]
        },
        "codes": {"frontend.codes": "[3, 2]", "frontend.rate": 50},
        "conv": {"positions.kernel": 7, "positions.groups": 2},
        "stacked_conv": {"positions.kernel": 7, "positions.groups": 2},
        "wav2vec2": {"objective.dim": 8, "objective.codes": 4, "objective.negatives": 3},
        "data2vec": {"objective.top_k": 2},
        "jepa": {"objective.predictor_dim": 16, "objective.predictor_depth": 1, "objective.predictor_heads": 2},
        "data2vec2": {
            "objective.top_k": 2,
            "objective.clones": 2,
            "objective.decoder_dim": 16,
            "objective.decoder_depth": 1,
            "objective.decoder_groups": 2,
        },
        "hubert": {"objective.dim": 8, "objective.units": "{units: 3}"},
        "best_rq": {"objective.codes": 8},
        "cae": {"objective.regressor_heads": 2, "objective.decoder_heads": 2},
        "siglip": {"objective.dim": 16},
    }
    per_name["encodec_mae"] = {"objective.units": "{units: 3}", "objective.weights": "{}"}
    decoder = {"objective.decoder_dim": 16, "objective.decoder_depth": 1, "objective.decoder_heads": 2}
    per_name |= dict.fromkeys(("mae", "siam_mae", "vic_mae", "cross_video_mae", "denoise", "dbot"), decoder)
    per_name["encodec_mae"] |= decoder
    per_name |= dict.fromkeys(("av_mae", "cav_mae"), decoder)
    per_name["slip"] = {"objective.ssl_hidden": 8, "objective.ssl_dim": 8, "data.batch_size": 2}
    if not name.startswith("small/"):  # 16 frames of 224 x 224 are 1,568 tokens otherwise
        per_name["tubes"] = {"frontend.size.1": 56, "frontend.size.2": 56, "data.batch_size": 2}
    for section in ("frontend", "positions", "objective"):
        sizes |= per_name.get(written.get(f"{section}.name"), {})
    inner = per_name.get(written.get("objective.of.name"), {})
    sizes |= {key.replace("objective", "objective.of"): value for key, value in inner.items()}
    if written.get("schedule.warmup") is not None:
        sizes["schedule.warmup"] = 1
    if written.get("objective.same") is not None:
        sizes["objective.same"] = "text"
    if isinstance(written.get("backbone"), dict):  # one block of two is shared
        sizes["backbone.own_blocks"] = 1
    for modality, own in written.get("modality").items() if written.get("backbone") else ():
        narrow = per_name.get(own["frontend"]["name"], {}) | per_name.get(own["positions"]["name"], {})
        sizes |= {key if key.startswith("data.") else f"modality.{modality}.{key}": v for key, v in narrow.items()}
        if "transformer" in own:
            small = {key: sizes.pop(key, value) for key, value in zip(TRUNK, (16, 2, 2), strict=True)}
            sizes |= {f"modality.{modality}.{key}": value for key, value in small.items()}
    return load(name, [f"{key}={value}" for key, value in sizes.items()])


def test_all_recipes_are_found() -> None:
    assert sorted(shipped()) == RECIPES
    assert len(RECIPES) == 89


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_page_that_says_how_to_run_it(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    said = header(text)
    assert set(said) == {"title", "run", "cost", "result"}
    command = "finetune" if load(name).get("objective.name") in LABELLED else "pretrain"
    assert said["run"].startswith(f"mmssl {command} {name} ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_as_written(name: str, manifests: dict[str, Path]) -> None:
    train = manifests[kind(load(name))] / "train.jsonl"
    written = data(load(name), "train", train, manifests)
    recipe = resolve(load(name, [f"{key}={path}" for key, path in written.items()]))
    config = export_config(recipe, Manifest(train))
    # the large ones without memory for their weights
    with torch.device("cpu" if name.startswith("small/") else "meta"):
        objective = build_objective(config, build_encoders(config))
    count = sum(parameter.numel() for parameter in objective.parameters())
    # as transformers counts wav2vec 2.0 base for pretraining
    assert count == 95_044_608 if name == "speech/wav2vec2_base" else count > 1_000_000


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_two_steps_at_toy_size(name: str, manifests: dict[str, Path], tmp_path: Path) -> None:
    recipe = toy(name, manifests)
    train = finetune if recipe.get("objective.name") in LABELLED else pretrain
    run = train(recipe, tmp_path / "run")
    assert (run / "encoder.safetensors").stat().st_size > 0
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert '"step": 2' in lines[-1]
    assert '"evaluation"' in lines[-1]


def test_the_table_of_recipes_lists_them_all() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(listed) == RECIPES

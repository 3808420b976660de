"""Small recipes broken on purpose are named by the verdicts within a few updates, and as they ship they are not."""

import json
from pathlib import Path

import pytest
from torch import nn

from mmssl import assemble
from mmssl.assemble import train
from mmssl.build import Config
from mmssl.encoder import Encoder
from mmssl.recipe import load

RECIPES = ["mae_image", "data2vec_image", "data2vec2_image", "wav2vec2_speech", "best_rq_speech", "cpc_speech"]


def verdicts(recipe: str, manifest: Path, run: Path, *changes: str, updates: int = 60) -> set[str]:
    """Names of all verdicts of a run at a toy's size."""
    written = load(f"small/{recipe}", changes)
    sizes = {
        "data.train": manifest,
        "transformer.dim": 32,
        "transformer.depth": 2,
        "transformer.heads": 2,
        "trainer.steps": updates,
        "trainer.precision": "float32",
        "trainer.log_every": 10,
        "trainer.eval_every": 0,
        "trainer.save_every": 0,
    }
    sizes |= {"data.batch_size": 4} if "image" in recipe else {"data.max_seconds": 2}
    sizes |= {
        "data2vec": {"objective.top_k": 2},
        "data2vec2": {"objective.top_k": 2, "objective.clones": 2, "objective.decoder_dim": 16},
        "wav2vec2": {"objective.negatives": 10},
    }.get(str(written.get("objective.name")), {})
    if written.get("positions.name") == "learned":
        sizes["positions.grid"] = [4, 4]
    train(load(f"small/{recipe}", [*(f"{key}={value}" for key, value in sizes.items()), *changes]), run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name for line in lines for name in line.get("verdict", {})}


@pytest.fixture
def manifest(request: pytest.FixtureRequest) -> Path:
    """Of the recipe that the test is about."""
    recipe = request.node.callspec.params["recipe"]
    found: dict[str, Path] = request.getfixturevalue("seen" if "image" in recipe else "heard")
    return found["train"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_as_it_ships_raises_no_alarm(recipe: str, manifest: Path, tmp_path: Path) -> None:
    assert verdicts(recipe, manifest, tmp_path / "run") == set()


@pytest.mark.parametrize("recipe", ["mae_image", "data2vec_image", "wav2vec2_speech", "cpc_speech"])
def test_a_rate_a_hundred_times_too_high_is_named(recipe: str, manifest: Path, tmp_path: Path) -> None:
    rate = 100 * load(f"small/{recipe}").get("optimizer.lr")
    assert "high_rate" in verdicts(recipe, manifest, tmp_path / "run", f"optimizer.lr={rate}")


@pytest.mark.parametrize("recipe", ["data2vec_image", "data2vec2_image"])
def test_a_teacher_that_is_the_student_is_named(recipe: str, manifest: Path, tmp_path: Path) -> None:
    changes = "objective.ema_decay=0.0", "objective.ema_decay_end=0.0"
    assert verdicts(recipe, manifest, tmp_path / "run", *changes, updates=10) == {"fast_teacher"}


@pytest.mark.parametrize("recipe", ["data2vec_image", "data2vec2_image"])
def test_targets_without_a_norm_are_named(recipe: str, manifest: Path, tmp_path: Path) -> None:
    changes = "objective.layer_norm=none", "objective.target_norm=none"
    assert "free_targets" in verdicts(recipe, manifest, tmp_path / "run", *changes, updates=10)


@pytest.mark.parametrize("recipe", ["wav2vec2_speech", "best_rq_speech"])
def test_a_codebook_of_zeros_is_named(
    recipe: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = assemble.build_objective

    def broken(config: Config, encoder: Encoder) -> nn.Module:
        objective = build(config, encoder)
        codebook = objective.get_submodule("quantizer").codebook
        nn.init.zeros_(codebook)
        codebook.requires_grad_(False)  # one that learns is not dead: it leaves zero within ten updates
        return objective

    monkeypatch.setattr(assemble, "build_objective", broken)
    assert "constant_prediction" in verdicts(recipe, manifest, tmp_path / "run")

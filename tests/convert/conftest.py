from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# theirs.py serves these tests; pytest's import mode puts no folder on the path
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A model by its name, and the folder that it saved itself in."""
    # inside: without transformers the tests are left out, and this file is read all the same
    from theirs import LAYOUTS_OF, PREPROCESSORS, build, clips_of, write_json

    made: dict[str, tuple[Any, Path]] = {}

    def save(name: str) -> tuple[Any, Path]:
        if name not in made:
            model, folder = build(name), tmp_path_factory.mktemp("theirs")
            model.save_pretrained(folder)
            preprocessor = PREPROCESSORS[LAYOUTS_OF[name].modality]
            if "margin" in name:  # only what pictures are brought to says how large the margin is
                height, width = clips_of(name)[0].shape[1:]
                preprocessor = preprocessor | {
                    "do_resize": True,
                    "size": {"height": height, "width": width},
                    "resample": 3,
                }
            write_json(folder / "preprocessor_config.json", preprocessor)
            made[name] = model, folder
        return made[name]

    return save

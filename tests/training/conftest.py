import sys
from pathlib import Path

import pytest
import torch

# toy.py serves these tests and the programs that they start; pytest's import mode puts no folder on the path
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread_and_no_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # reads as not installed; its import takes long

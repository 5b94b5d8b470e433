"""The state file: what goes in comes out, and what does not belong is refused."""

from pathlib import Path

import pytest
import torch

from retrieval.errors import CheckpointError
from retrieval.training.state import load_state, save_state

SETTINGS = {"encoder": {"width": 8, "shape": (1, 2)}, "dataset": "abc"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "state.safetensors"
    tensors = {"w": torch.arange(6.0).view(2, 3), "count": torch.tensor([1, 2], dtype=torch.int32)}
    save_state(file, tensors, SETTINGS, {"step": 7, "best": 0.1, "last": None})
    return file


def zeros() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(2, 3), "count": torch.zeros(2, dtype=torch.int32)}


def test_tensors_and_progress_come_back(file: Path) -> None:
    tensors = zeros()
    assert load_state(file, tensors, SETTINGS) == {"step": 7, "best": 0.1, "last": None}
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3))
    assert tensors["count"].tolist() == [1, 2]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_other_settings_are_refused_by_name(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was trained with encoder width 8, not 9; use a new run folder"):
        load_state(file, zeros(), SETTINGS | {"encoder": {"width": 9, "shape": (1, 2)}})
    with pytest.raises(CheckpointError, match="was trained with dataset abc, not abd"):
        load_state(file, zeros(), SETTINGS | {"dataset": "abd"})


def test_a_damaged_file_or_one_with_other_tensors_is_refused(file: Path) -> None:
    for tensors in (zeros() | {"more": torch.zeros(1)}, {"w": torch.zeros(5)}):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_state(file, tensors, SETTINGS)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(file, zeros(), SETTINGS)

from pathlib import Path

import pytest
import torch

from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.errors import CheckpointError, InputError

CONFIG = HSTUConfig(num_items=7, max_length=5, width=4, qk_dim=4, v_dim=4)


def save_random(folder: Path, seed: int) -> HSTUEncoder:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    encoder = HSTUEncoder(CONFIG)
    info = CheckpointInfo(encoder=CONFIG, actions=("", "like"), dataset="d", split={"protocol": "all"}, training={})
    save_checkpoint(folder, encoder, info)
    return encoder


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved = save_random(tmp_path, 0)
    loaded, info = load_checkpoint(tmp_path)
    assert info.encoder == CONFIG
    assert info.actions == ("", "like")
    assert not loaded.training
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_halves_of_two_checkpoints_do_not_load_together(tmp_path: Path) -> None:
    save_random(tmp_path / "a", 0)
    save_random(tmp_path / "b", 1)
    (tmp_path / "b" / "encoder.safetensors").replace(tmp_path / "a" / "encoder.safetensors")
    with pytest.raises(CheckpointError, match="is not the file that"):
        load_checkpoint(tmp_path / "a")


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a trained encoder"):
        load_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"format": 1', '"format": 9', "format 9 is not the format 1"),
        ('"width": 4', '"width": 0', r"encoder\.hstu\.width"),
        ('"width": 4', '"width": 8', "does not fit"),
        ("{", "", "cannot be read"),
        ('"actions"', '"actoins"', "act"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    save_random(tmp_path, 0)
    file = tmp_path / "encoder.json"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(tmp_path)

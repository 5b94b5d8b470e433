import gc
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.errors import CheckpointError, InputError
from retrieval.files import sha256_of

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


def test_tables_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_random(tmp_path, 0)
    monkeypatch.setattr("retrieval.encoder.checkpoint._ROWS", 3)
    loaded, _ = load_checkpoint(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_loading_again_and_again_keeps_nothing(tmp_path: Path) -> None:
    tensors = len(save_random(tmp_path, 0).state_dict())

    def kept(loads: int) -> int:
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(loads):
            load_checkpoint(tmp_path)
        gc.collect()
        return sys.getallocatedblocks() - before

    kept(60)
    assert kept(60) < 60 * tensors, "safetensors' way to torch keeps two objects per tensor"


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    save_random(tmp_path, 0)
    weights = tmp_path / "encoder.safetensors"
    tensors = load_file(weights)
    description = (tmp_path / "encoder.json").read_text(encoding="utf-8")

    def refused(changed: dict[str, torch.Tensor], sentence: str) -> None:
        before = sha256_of(weights)
        save_file(changed, weights)
        text = description.replace(sha_as_saved, sha256_of(weights))
        (tmp_path / "encoder.json").write_text(text, encoding="utf-8")
        assert before != sha256_of(weights)
        with pytest.raises(CheckpointError, match=sentence):
            load_checkpoint(tmp_path)

    sha_as_saved = sha256_of(weights)
    name = min(tensors)
    refused({**tensors, "stray": torch.zeros(1)}, "it holds other tensors, among them stray")
    refused({key: tensor for key, tensor in tensors.items() if key != name}, f"other tensors, among them {name}")
    refused({**tensors, name: torch.zeros(1, 2, 3)}, rf"{name} has shape \[1, 2, 3\]")


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

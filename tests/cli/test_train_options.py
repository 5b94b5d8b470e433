"""The options of training reach the configuration, and validation chooses the checkpoint where there is any."""

import argparse
from pathlib import Path

import pytest

from retrieval.cli.main import main
from retrieval.cli.options import add_training_options, train_config
from retrieval.encoder.checkpoint import load_checkpoint
from retrieval.errors import ConfigError, InputError
from retrieval.training.config import TrainConfig
from tests.support import cyclic_histories, write_dataset

ITEM_FEATURES = {"id_dropout": 0.2, "attributes": {"genres": {"kind": "set", "buckets": 32}}}
OPTIONS = {
    "epochs": 3,
    "batch_size": 64,
    "visit_order": "time",
    "windows": "all",
    "learning_rate": 0.01,
    "schedule": "cosine",
    "warmup_steps": 10,
    "weight_decay": 0.1,
    "clip_norm": 2.0,
    "negatives": "mixed",
    "num_negatives": 100,
    "shared_negatives": False,
    "log_q": "standard",
    "temperature": 0.1,
    "stochastic_length": 1.6,
    "mask_share": 0.3,
    "query_action_share": 0.7,
    "action_weights": {"like": 1.0, "buy=now": 3.0},
    "sparse_items": True,
    "precision": "bfloat16",
    "ema_decay": 0.99,
    "validate_every": 2,
    "patience": 5,
    "seed": 9,
}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_training_options(parser)
    return parser.parse_args(arguments)


def test_every_hyperparameter_has_an_option(tmp_path: Path) -> None:
    features = tmp_path / "features.toml"
    features.write_text('[items]\nid_dropout = 0.2\n[items.attributes.genres]\nkind = "set"\nbuckets = 32\n')
    assert {*OPTIONS, "item_features"} == set(TrainConfig.model_fields)
    arguments = ["--features", str(features)]
    for name, value in OPTIONS.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, dict):
            for key, weight in value.items():
                arguments += ["--action-weight", f"{key}={weight}"]
        else:
            arguments += [f"--{option}", str(value)]
    assert train_config(parsed(arguments)) == TrainConfig.model_validate(OPTIONS | {"item_features": ITEM_FEATURES})


def test_defaults_are_those_of_the_configuration() -> None:
    assert train_config(parsed([])) == TrainConfig()
    assert train_config(parsed(["--seed", "3"]), learning_rate=0.5) == TrainConfig(seed=3, learning_rate=0.5)


def test_an_impossible_value_is_named() -> None:
    with pytest.raises(InputError, match="--action-weight like: is not NAME=VALUE"):
        train_config(parsed(["--action-weight", "like"]))
    with pytest.raises(ConfigError, match=r"command line: action_weights\.like"):
        train_config(parsed(["--action-weight", "like=-1"]))
    with pytest.raises(ConfigError, match="command line: stochastic_length"):
        train_config(parsed(["--stochastic-length", "2.5"]))


def test_validation_chooses_the_checkpoint_where_the_protocol_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", cyclic_histories(users=30, items=12, length=8), range(12))
    command = f"train {tmp_path}/data --preset demo --epochs 2"
    for protocol in ("stable", "paper"):
        assert main([*command.split(), "--protocol", protocol, "--out", f"{tmp_path}/{protocol}"]) == 0
    assert "validation 0." in capsys.readouterr().err
    assert 0 < load_checkpoint(tmp_path / "stable")[1].training["validation"] <= 1
    assert "validation" not in load_checkpoint(tmp_path / "paper")[1].training
    assert main([*command.split(), "--protocol", "paper", "--patience", "1", "--out", f"{tmp_path}/none"]) == 2
    assert "patience: there is no validation" in capsys.readouterr().err

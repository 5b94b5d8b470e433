"""Options that several commands share, and what they mean."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.errors import InputError

if TYPE_CHECKING:
    from retrieval.index.spec import IndexSpec
    from retrieval.training.trainer import TrainConfig

__all__ = [
    "add_device_option",
    "add_index_options",
    "add_json_option",
    "add_training_options",
    "index_spec",
    "pick_device",
    "train_config",
]


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def pick_device(name: str) -> str:
    """Resolve `--device`.

    Raises:
        InputError: the device does not exist here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    return name


def add_index_options(parser: argparse.ArgumentParser) -> None:
    """Add `--index` and `--search`."""
    parser.add_argument(
        "--index",
        default="Flat",
        metavar="FACTORY",
        help="Faiss factory string, e.g. IVF1024,Flat or HNSW32 (default: Flat, which is exact)",
    )
    parser.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="search parameter of the index, e.g. nprobe=64 or efSearch=200; may be repeated",
    )


def index_spec(parsed: argparse.Namespace) -> "IndexSpec":
    """Read what `add_index_options` added.

    Raises:
        InputError: a search parameter is not NAME=VALUE.
    """
    from retrieval.index.spec import IndexSpec

    search = {}
    for text in parsed.search:
        name, _, value = text.partition("=")
        try:
            search[name] = float(value)
        except ValueError:
            raise InputError(f"--search {text}: is not NAME=VALUE with a number") from None
    return IndexSpec(factory=parsed.index, search=search)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the encoder's preset and the hyperparameters that people change."""
    # Defaults live in TrainConfig alone: an option that is not given is not passed on.
    parser.add_argument("--preset", choices=("demo", "ml1m", "large-ml1m"), help="shape of the encoder (default: ml1m)")
    parser.add_argument("--epochs", type=int, help="passes over the users (default: 20)")
    parser.add_argument("--batch-size", type=int, help="users per step (default: 128)")
    parser.add_argument("--learning-rate", type=float, help="of AdamW (default: 0.001)")
    parser.add_argument("--num-negatives", type=int, help="items that a step contrasts with (default: 512)")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: 0)")


def train_config(parsed: argparse.Namespace, **defaults: float) -> "TrainConfig":
    """Read what `add_training_options` added.

    Args:
        parsed: the arguments.
        defaults: a command's own defaults, where they differ from TrainConfig's.

    Raises:
        ConfigError: a value is impossible.
    """
    from retrieval.training.trainer import TrainConfig

    names = ("epochs", "batch_size", "learning_rate", "num_negatives", "seed")
    given = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    return TrainConfig.parse(defaults | given, "command line")


def existing_path(text: str) -> Path:
    """Type of an argument that must name an existing file or folder."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return path

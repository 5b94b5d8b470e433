"""`retrieval train`: a dataset becomes an encoder."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.cli.console import progress, say
from retrieval.cli.options import add_device_option, add_training_options, pick_device, train_config

if TYPE_CHECKING:
    from retrieval.data.dataset import Dataset
    from retrieval.data.splits import Split
    from retrieval.encoder.config import HSTUConfig
    from retrieval.training.trainer import TrainConfig

__all__ = ["add_parser", "encoder_config", "train_with_progress"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("train", help="train an HSTU encoder on a dataset", description=__doc__)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder made by `retrieval ingest`")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of this training run")
    parser.add_argument(
        "--protocol",
        choices=("paper", "stable", "global-time", "all"),
        default="paper",
        help="which events train and which are kept for evaluation (default: paper)",
    )
    parser.add_argument("--split-time", type=int, metavar="SECONDS", help="moment of the global-time split, UTC")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    add_training_options(parser)
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Train."""
    from retrieval.data.dataset import Dataset
    from retrieval.data.splits import SplitInfo, split_dataset

    config = train_config(parsed)
    device = pick_device(parsed.device)
    dataset = Dataset(parsed.dataset)
    split = split_dataset(dataset, SplitInfo(protocol=parsed.protocol, time=parsed.split_time))
    encoder = encoder_config(dataset, parsed.preset or "ml1m")
    train_with_progress(dataset, split, encoder, config, parsed.out, resume=parsed.resume, device=device)
    say(f"encoder in {parsed.out}; watch the loss with: tensorboard --logdir {parsed.out / 'tensorboard'}")


def encoder_config(dataset: "Dataset", preset: str) -> "HSTUConfig":
    """A preset's encoder for a dataset; it reads actions if the dataset has any."""
    from retrieval.encoder.config import PRESETS

    actions = len(dataset.info.actions)
    return PRESETS[preset](num_items=len(dataset.vocabulary), num_actions=actions if actions > 1 else 0)


def train_with_progress(
    dataset: "Dataset",
    split: "Split",
    encoder: "HSTUConfig",
    config: "TrainConfig",
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
) -> None:
    """Train with a bar that shows loss (a running mean), speed and time left."""
    from retrieval.training.trainer import StepReport, train

    tokens, smooth, started = 0, 0.0, time.monotonic()
    with progress("train") as update:

        def on_step(report: StepReport) -> None:
            nonlocal tokens, smooth
            tokens += report.tokens
            smooth = report.loss if smooth == 0.0 else 0.98 * smooth + 0.02 * report.loss
            speed = tokens / (time.monotonic() - started)
            update(report.step, report.steps, f"loss {smooth:.3f}  {speed:,.0f} tokens/s")

        train(dataset, split, encoder, config, out, resume=resume, device=device, on_step=on_step)

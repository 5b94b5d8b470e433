"""`retrieval train`: a dataset becomes an encoder."""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.cli.console import progress, say
from retrieval.cli.options import add_device_option, add_training_options, pick_device, train_config

if TYPE_CHECKING:
    from retrieval.data.dataset import Dataset
    from retrieval.data.splits import Split
    from retrieval.encoder.config import EncoderConfig
    from retrieval.training.config import TrainConfig

__all__ = ["add_parser", "encoder_config", "train_with_progress"]

_SHAPE = ("layout", "max_length", "read_length", "read")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("train", help="train an encoder on a dataset", description=__doc__)
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
    check_features(dataset, parsed)
    encoder = encoder_config(dataset, parsed)
    train_with_progress(dataset, split, encoder, config, parsed.out, resume=parsed.resume, device=device)
    say(f"encoder in {parsed.out}; watch the loss with: tensorboard --logdir {parsed.out / 'tensorboard'}")


def encoder_config(dataset: "Dataset", parsed: argparse.Namespace, preset: str = "ml1m") -> "EncoderConfig":
    """The encoder that options ask for: it reads actions, context and auxiliary series if the dataset has any.

    Args:
        dataset: what it is for.
        parsed: what `add_training_options` added.
        preset: where they name none.

    Raises:
        ConfigError: the encoder cannot read them, or there are no actions to ask for.
    """
    from retrieval.encoder.presets import PRESETS

    preset = parsed.preset or preset
    actions = len(dataset.info.actions)
    config = PRESETS[preset](num_items=len(dataset.vocabulary), num_actions=actions if actions > 1 else 0)
    more = {"query_actions": parsed.query_actions, "kinds": tuple(kind.rows for kind in dataset.info.kinds)}
    more |= {name: value for name in _SHAPE if (value := getattr(parsed, name)) is not None}
    return type(config).parse(config.model_dump() | more, f"preset {preset}")


def check_features(dataset: "Dataset", parsed: argparse.Namespace) -> None:
    """Refuse a schema that names other context or series than the dataset has.

    Raises:
        ConfigError: it does.
    """
    from retrieval.data.features import FeatureSchema
    from retrieval.errors import ConfigError

    if parsed.features is None:
        return
    schema = FeatureSchema.load(parsed.features)
    named = [*schema.context, *schema.auxiliary]
    found = [kind.name for kind in dataset.info.kinds]
    if named != found:
        raise ConfigError(
            f"{parsed.features}: names context and series {named}, but {dataset.path} was ingested with {found}; "
            "ingest it again with this file"
        )


def train_with_progress(
    dataset: "Dataset",
    split: "Split",
    encoder: "EncoderConfig",
    config: "TrainConfig",
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
) -> None:
    """Train with a bar that shows loss (a running mean), speed and time left.

    Where the split holds queries out for validation, the encoder of the best NDCG@10 on them is kept, else the last.
    """
    from retrieval.data.splits import training_counts
    from retrieval.encoder.inference import embed_users, item_vectors
    from retrieval.encoder.protocol import UserEncoder
    from retrieval.evaluation.offline import mean_ndcg
    from retrieval.training.tables import table_sizes
    from retrieval.training.trainer import StepReport, train

    sizes = table_sizes(dataset, encoder, config, training_counts(dataset, split))
    say("rows of tables: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))

    def ndcg(trained: UserEncoder) -> float:
        embed = partial(embed_users, trained)
        return mean_ndcg(dataset, split.validation, embed, item_vectors(trained), trained.config.max_length)

    validate = ndcg if len(split.validation) else None
    tokens, smooth, started = 0, 0.0, time.monotonic()
    with progress("train") as update:

        def on_step(report: StepReport) -> None:
            nonlocal tokens, smooth
            tokens += report.tokens
            smooth = report.loss if smooth == 0.0 else 0.98 * smooth + 0.02 * report.loss
            speed = tokens / (time.monotonic() - started)
            judged = "" if report.validation is None else f"  validation {report.validation:.4f}"
            update(report.step, report.steps, f"loss {smooth:.3f}  {speed:,.0f} tokens/s{judged}")

        train(
            dataset,
            split,
            encoder,
            config,
            out,
            validate=validate,
            resume=resume,
            device=device,
            on_step=on_step,
        )

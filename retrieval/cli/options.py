"""Options that several commands share, and what they mean."""

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.encoder.presets import PRESETS
from retrieval.errors import InputError

if TYPE_CHECKING:
    from retrieval.histories.recorded import RecordedHistories
    from retrieval.index.choice import AutoIndex
    from retrieval.index.spec import IndexSpec
    from retrieval.rpc.client import RetrievalClient
    from retrieval.training.config import TrainConfig

__all__ = [
    "REGISTRY_HELP",
    "add_connection_options",
    "add_device_option",
    "add_features_option",
    "add_histories_option",
    "add_index_options",
    "add_json_option",
    "add_training_options",
    "connected",
    "index_spec",
    "opened_histories",
    "pick_device",
    "train_config",
]


REGISTRY_HELP = "folder of snapshots, or a URL such as s3://BUCKET/PREFIX"


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_connection_options(parser: argparse.ArgumentParser) -> None:
    """Add where a server is and how it is asked."""
    parser.add_argument("--address", default="localhost:50051", metavar="HOST:PORT", help="default: localhost:50051")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="default: 5")
    parser.add_argument("--tls-ca", type=existing_path, metavar="FILE", help="ask by TLS; who signs for the server")
    parser.add_argument("--tls-cert", type=existing_path, metavar="FILE", help="own certificate, for mutual TLS")
    parser.add_argument("--tls-key", type=existing_path, metavar="FILE", help="its key")
    parser.add_argument("--token-file", type=existing_path, metavar="FILE", help="bearer token, the file's one line")


def connected(parsed: argparse.Namespace) -> "RetrievalClient":
    """A client by what `add_connection_options` added.

    Raises:
        InputError: options that do not fit each other, or a file that cannot be used.
    """
    import grpc

    from retrieval.rpc.client import RetrievalClient

    if (parsed.tls_cert is None) != (parsed.tls_key is None):
        raise InputError("--tls-cert and --tls-key: one without the other")
    if parsed.tls_cert is not None and parsed.tls_ca is None:
        raise InputError("--tls-cert: needs --tls-ca, who signs for the server")
    credentials = token = None
    try:
        if parsed.tls_ca is not None:
            key, chain = (None if path is None else path.read_bytes() for path in (parsed.tls_key, parsed.tls_cert))
            credentials = grpc.ssl_channel_credentials(parsed.tls_ca.read_bytes(), key, chain)
        if parsed.token_file is not None:
            token = parsed.token_file.read_text(encoding="ascii").strip()
            if not token or len(token.split()) != 1:
                raise InputError(f"{parsed.token_file}: does not hold one token")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--tls-ca, --tls-cert, --tls-key, --token-file: {error}") from None
    return RetrievalClient(parsed.address, timeout=parsed.timeout, credentials=credentials, token=token)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def add_histories_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--histories`."""
    parser.add_argument(
        "--histories", metavar="STORE", help=f"{text}: a folder, made if it is missing, or redis://HOST:PORT/DATABASE"
    )


@contextmanager
def opened_histories(place: str | None, max_events: int | None = None) -> "Iterator[RecordedHistories | None]":
    """Open a store of histories while the block runs; None where no place is named.

    Raises:
        InputError, HistoryStoreError: as `open_histories`.
    """
    if place is None:
        yield None
        return
    from retrieval.histories.recorded import open_histories

    with closing(open_histories(place, max_events)) as store:
        yield store


def add_features_option(group: "argparse._ActionsContainer") -> None:
    """Add `--features`."""
    group.add_argument(
        "--features",
        type=existing_path,
        metavar="FILE",
        help="TOML: attributes of items, context of users, auxiliary series; see docs/features.md",
    )


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
    """Add `--index`, `--search` and `--index-recall`."""
    parser.add_argument(
        "--index",
        default="Flat",
        metavar="FACTORY",
        help="IVF512,Int8 (the nearest of 512 lists), a Faiss factory string, e.g. HNSW32, or auto: the fastest that "
        "reaches --index-recall, by measurement (default: Flat, which is exact)",
    )
    parser.add_argument(
        "--index-recall",
        type=float,
        metavar="SHARE",
        help="with --index auto: least recall@100 against exact search (default: 0.99)",
    )
    parser.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="search parameter of the index, e.g. nprobe=64 or efSearch=200; may be repeated",
    )


def index_spec(parsed: argparse.Namespace) -> "IndexSpec | AutoIndex":
    """Read what `add_index_options` added.

    Raises:
        InputError: a search parameter is not NAME=VALUE, or options exclude each other.
    """
    from retrieval.index.choice import AutoIndex
    from retrieval.index.spec import IndexSpec

    if parsed.index == "auto":
        if parsed.search:
            raise InputError("--search: is chosen too with --index auto")
        given = {} if parsed.index_recall is None else {"recall": parsed.index_recall}
        return AutoIndex.parse(given, "--index-recall")
    if parsed.index_recall is not None:
        raise InputError("--index-recall: says what --index auto must reach; the index is given")
    return IndexSpec(factory=parsed.index, search=_numbers(parsed.search, "--search"))


def _numbers(texts: list[str], option: str) -> dict[str, float]:
    """Read NAME=VALUE pairs."""
    numbers = {}
    for text in texts:
        # The last "=": a name may hold one.
        name, _, value = text.rpartition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise InputError(f"{option} {text}: is not NAME=VALUE with a number") from None
    return numbers


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the encoder's preset and the hyperparameters that people change."""
    # Defaults live in TrainConfig alone: an option that is not given is not passed on.
    group = parser.add_argument_group("training")
    group.add_argument("--preset", choices=tuple(PRESETS), help="the encoder and its shape (default: ml1m)")
    group.add_argument("--max-length", type=int, help="tokens of a history that are read (default: the preset's)")
    group.add_argument("--read-length", type=int, help="tokens that are read outside training (default: all of them)")
    group.add_argument(
        "--read", choices=("latest", "spread"), help="which these are: the latest, or half of them older ones"
    )
    group.add_argument("--epochs", type=int, help="passes over the users (default: 20)")
    group.add_argument("--batch-size", type=int, help="users, or windows, per step (default: 128)")
    group.add_argument(
        "--visit-order", choices=("random", "time"), help="of users; time suits streams (default: random)"
    )
    group.add_argument(
        "--windows",
        choices=("last", "all"),
        help="what is read of a history that is longer than the encoder reads: its end, or all (default: last)",
    )
    group.add_argument("--learning-rate", type=float, help="highest rate of AdamW (default: 0.001)")
    group.add_argument(
        "--schedule", choices=("constant", "cosine", "linear"), help="how the rate goes on (default: constant)"
    )
    group.add_argument("--warmup-steps", type=int, help="steps over which the rate rises from 0 (default: 0)")
    group.add_argument("--weight-decay", type=float, help="of AdamW (default: 0)")
    group.add_argument("--clip-norm", type=float, help="longest gradient of a step (default: any)")
    group.add_argument(
        "--negatives",
        choices=("full", "uniform", "popularity", "in-batch", "mixed"),
        help="items to contrast with: all, or how they are drawn (default: uniform)",
    )
    group.add_argument("--num-negatives", type=int, help="items that a step contrasts with (default: 512)")
    group.add_argument(
        "--shared-negatives",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a step's positions share their negatives or draw their own (default: shared)",
    )
    group.add_argument(
        "--log-q", choices=("none", "standard", "corrected"), help="correction for how they are drawn (default: none)"
    )
    group.add_argument("--temperature", type=float, help="of the softmax (default: 0.05)")
    group.add_argument(
        "--stochastic-length", type=float, metavar="ALPHA", help="thin long histories at random, 1 < ALPHA <= 2"
    )
    group.add_argument("--mask-share", type=float, help="of tokens that BERT4Rec has to fill in (default: 0.2)")
    group.add_argument(
        "--action-weight",
        dest="action_weights",
        action="append",
        metavar="ACTION=WEIGHT",
        help="weight of a positive action as a target, e.g. purchase=3 (default: 1); may be repeated",
    )
    group.add_argument(
        "--layout",
        choices=("joined", "interleaved"),
        help="an event as one token of item and action, or as two (default: joined)",
    )
    group.add_argument("--query-actions", action="store_true", help="let requests name the action that is to follow")
    group.add_argument(
        "--query-action-share", type=float, help="of positions that are then asked for their target's (default: 0.5)"
    )
    add_features_option(group)
    group.add_argument(
        "--sparse-items",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="update only the rows of the item table that a step names (default: above 100,000 items)",
    )
    group.add_argument("--precision", choices=("float32", "bfloat16"), help="of products (default: float32)")
    group.add_argument("--ema-decay", type=float, help="keep a running mean of the weights, for instance 0.999")
    group.add_argument("--validate-every", type=int, metavar="EPOCHS", help="where there is validation (default: 1)")
    group.add_argument("--patience", type=int, help="validations without a better one that end the run (default: any)")
    group.add_argument("--seed", type=int, help="seed of everything random (default: 0)")


def train_config(parsed: argparse.Namespace, **defaults: float) -> "TrainConfig":
    """Read what `add_training_options` added.

    Args:
        parsed: the arguments.
        defaults: a command's own defaults, where they differ from TrainConfig's.

    Raises:
        ConfigError: a value is impossible.
        InputError: a weight is not ACTION=WEIGHT.
    """
    from retrieval.data.features import FeatureSchema
    from retrieval.training.config import TrainConfig

    names = TrainConfig.model_fields.keys() - {"item_features"}
    given = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    if "action_weights" in given:
        given["action_weights"] = _numbers(given["action_weights"], "--action-weight")
    if parsed.features is not None:
        given["item_features"] = FeatureSchema.load(parsed.features).items
    return TrainConfig.parse(defaults | given, "command line")


def existing_path(text: str) -> Path:
    """Type of an argument that must name an existing file or folder."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return path

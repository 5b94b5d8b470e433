"""Encoders by name: the published hyperparameters, and our own.

HSTU: arXiv 2402.17152, table 4 and the public configurations beside it. SASRec: the same source's baseline.
"""

from collections.abc import Callable

from retrieval.encoder.config import BERT4RecConfig, EncoderConfig, GRU4RecConfig, HSTUConfig, SASRecConfig

__all__ = [
    "PRESETS",
    "bert4rec_ml1m",
    "gru4rec_ml1m",
    "hstu_best_ml1m",
    "hstu_books",
    "hstu_demo",
    "hstu_large_books",
    "hstu_large_ml1m",
    "hstu_large_ml20m",
    "hstu_ml1m",
    "hstu_ml20m",
    "hstu_stream",
    "sasrec_books",
    "sasrec_ml1m",
    "sasrec_ml20m",
]


def hstu_ml1m(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU on MovieLens-1M: D 50, 2 layers, 1 head."""
    return HSTUConfig(num_items=num_items, num_actions=num_actions)


def hstu_large_ml1m(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU-large on MovieLens-1M: D 50, 8 layers, 2 heads of 25."""
    return HSTUConfig(num_items=num_items, num_actions=num_actions, num_layers=8, num_heads=2, qk_dim=25, v_dim=25)


def hstu_best_ml1m(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU-large with sums divided by the number of visible keys and less dropout; docs/quality.md has its training."""
    changes = {"normalizer": "visible", "dropout": 0.1}
    return hstu_large_ml1m(num_items=num_items, num_actions=num_actions).model_copy(update=changes)


def hstu_ml20m(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU on MovieLens-20M: D 256, 4 layers, 4 heads of 64."""
    shape = {"width": 256, "num_layers": 4, "num_heads": 4, "qk_dim": 64, "v_dim": 64}
    return HSTUConfig(num_items=num_items, num_actions=num_actions, **shape)


def hstu_large_ml20m(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU-large on MovieLens-20M: D 256, 16 layers, 8 heads of 32."""
    shape = {"width": 256, "num_layers": 16, "num_heads": 8, "qk_dim": 32, "v_dim": 32}
    return HSTUConfig(num_items=num_items, num_actions=num_actions, **shape)


def hstu_books(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU on Amazon Books: D 64, 4 layers, 4 heads of 16, histories of 50 events, dropout 0.5."""
    shape = {"width": 64, "num_layers": 4, "num_heads": 4, "qk_dim": 16, "v_dim": 16, "max_length": 50}
    return HSTUConfig(num_items=num_items, num_actions=num_actions, dropout=0.5, **shape)


def hstu_large_books(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU-large on Amazon Books: D 64, 16 layers, 8 heads of 8, histories of 50 events, dropout 0.5."""
    shape = {"width": 64, "num_layers": 16, "num_heads": 8, "qk_dim": 8, "v_dim": 8, "max_length": 50}
    return HSTUConfig(num_items=num_items, num_actions=num_actions, dropout=0.5, **shape)


def hstu_demo(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """A small encoder for the demo: D 48, 2 layers, 2 heads of 24, histories of 100 events."""
    shape = {"width": 48, "num_heads": 2, "qk_dim": 24, "v_dim": 24, "max_length": 100}
    return HSTUConfig(num_items=num_items, num_actions=num_actions, dropout=0.1, **shape)


def hstu_stream(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU for catalogues like news, with popularity: D 47, 48 with that, 2 layers, 2 heads of 24, 50 events.

    To be trained on in-batch negatives in time order.
    """
    shape = {"width": 47, "num_heads": 2, "qk_dim": 24, "v_dim": 24, "max_length": 50}
    return HSTUConfig(num_items=num_items, num_actions=num_actions, dropout=0.1, popularity=True, **shape)


def sasrec_ml1m(*, num_items: int, num_actions: int = 0) -> SASRecConfig:
    """SASRec on MovieLens-1M: D 50, 2 layers, 1 head."""
    return SASRecConfig(num_items=num_items, num_actions=num_actions)


def sasrec_ml20m(*, num_items: int, num_actions: int = 0) -> SASRecConfig:
    """SASRec on MovieLens-20M: D 256, 4 layers, 4 heads."""
    shape = {"width": 256, "num_layers": 4, "num_heads": 4, "hidden": 256}
    return SASRecConfig(num_items=num_items, num_actions=num_actions, **shape)


def sasrec_books(*, num_items: int, num_actions: int = 0) -> SASRecConfig:
    """SASRec on Amazon Books: D 64, 4 layers, 4 heads, histories of 50 events, dropout 0.5."""
    shape = {"width": 64, "num_layers": 4, "num_heads": 4, "hidden": 64, "max_length": 50}
    return SASRecConfig(num_items=num_items, num_actions=num_actions, dropout=0.5, **shape)


def bert4rec_ml1m(*, num_items: int, num_actions: int = 0) -> BERT4RecConfig:
    """BERT4Rec on MovieLens-1M: D 64, 2 layers, 2 heads (the paper's shape)."""
    return BERT4RecConfig(num_items=num_items, num_actions=num_actions, width=64)


def gru4rec_ml1m(*, num_items: int, num_actions: int = 0) -> GRU4RecConfig:
    """GRU4Rec on MovieLens-1M: D 50 as its rivals, one layer of 128 units (our choice, not its paper's)."""
    return GRU4RecConfig(num_items=num_items, num_actions=num_actions)


PRESETS: dict[str, Callable[..., EncoderConfig]] = {
    "demo": hstu_demo,
    "ml1m": hstu_ml1m,
    "large-ml1m": hstu_large_ml1m,
    "best-ml1m": hstu_best_ml1m,
    "ml20m": hstu_ml20m,
    "large-ml20m": hstu_large_ml20m,
    "books": hstu_books,
    "large-books": hstu_large_books,
    "stream": hstu_stream,
    "sasrec-ml1m": sasrec_ml1m,
    "sasrec-ml20m": sasrec_ml20m,
    "sasrec-books": sasrec_books,
    "bert4rec-ml1m": bert4rec_ml1m,
    "gru4rec-ml1m": gru4rec_ml1m,
}

"""How large the tables are that a run learns: what bounds them is said in the schema of features and at ingest."""

import numpy as np
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.encoder.config import EncoderConfig
from retrieval.training.config import TrainConfig

__all__ = ["table_sizes"]


def table_sizes(
    dataset: Dataset, encoder: EncoderConfig, config: TrainConfig, item_counts: NDArray[np.int64]
) -> dict[str, int]:
    """Rows of every table by name; of items also how many have an embedding of their own.

    Args:
        dataset: the events.
        encoder: shape of the encoder.
        config: hyperparameters.
        item_counts: training events of each item, int64 `[N]`.
    """
    schema = config.item_features
    least = 0 if schema is None else schema.min_count
    sizes = {"items": encoder.num_items, "items with an id of their own": int((item_counts >= least).sum())}
    if schema is not None:
        learned = sorted((name, one) for name, one in schema.attributes.items() if one.kind != "vector")
        sizes |= {f"attribute {name}": attribute.buckets for name, attribute in learned}
        sizes |= {"overflow": schema.overflow} if schema.overflow else {}
    if encoder.num_actions:
        sizes["actions"] = encoder.num_actions
    for kind in dataset.info.kinds:
        sizes[f"{'context' if kind.context else 'series'} {kind.name}"] = kind.rows
    return sizes

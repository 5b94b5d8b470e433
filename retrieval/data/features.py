"""The schema of features: what items are made of beside their ids, and what is read beside the main series."""

import tomllib
from pathlib import Path

from pydantic import Field

from retrieval.config import Config
from retrieval.data.item_features import ItemFeatureSchema
from retrieval.errors import ConfigError

__all__ = ["FeatureSchema", "SideColumn"]


class SideColumn(Config):
    """Which values of a column have an embedding of their own; all others share one, with values never met.

    Attributes:
        min_count: users (context) or events (auxiliary) from which on a value has one.
        max_values: so many at most, the most frequent.
    """

    min_count: int = Field(default=1, ge=1)
    max_values: int = Field(default=65_535, ge=1, le=2**24)


class FeatureSchema(Config):
    """Contents of a schema file.

    Attributes:
        max_items: items of the catalogue at most; of more, ingest leaves out those that were met longest ago, with
            their events. One that only the items' file names counts as new.
        items: attributes of items; None: ids alone.
        context: static attributes of users, columns of the users' file: a token each in front of every history.
        auxiliary: slowly changing values, each a series: a column of the event log, in the log of series, or both.
    """

    max_items: int | None = Field(default=None, ge=1)
    items: ItemFeatureSchema | None = None
    context: dict[str, SideColumn] = Field(default_factory=dict)
    auxiliary: dict[str, SideColumn] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "FeatureSchema":
        """Read a TOML file.

        Raises:
            ConfigError: it cannot be read, or says what is unknown or impossible.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as TOML ({error})") from None
        return cls.parse(values, str(path))

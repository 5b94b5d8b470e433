"""Which index to build and how to search it."""

import re
from typing import Final

from pydantic import Field

from retrieval.config import Config

__all__ = ["IndexSpec"]

_LISTS_OF_CODES: Final = re.compile(r"IVF([1-9][0-9]{0,8}),Int8")


class IndexSpec(Config):
    """An index over unit vectors, compared by inner product.

    Attributes:
        factory: "Flat" searches exactly. "IVF1024,Int8" looks into the nearest of 1024 lists, by 8-bit codes that lose
            nothing (`codes`). "CAGRA64" is a graph of 64 neighbours an item, built on a GPU. Anything else is a Faiss
            factory string, e.g. "IVF1024,Flat" or "HNSW32".
        search: search-time parameters, e.g. {"nprobe": 64} or, of Faiss's, {"efSearch": 200}.
    """

    factory: str = "Flat"
    search: dict[str, float] = Field(default_factory=dict)

    def __str__(self) -> str:
        parameters = ", ".join(f"{name} {value:g}" for name, value in self.search.items())
        return f"{self.factory} ({parameters})" if parameters else self.factory

    @property
    def lists(self) -> int | None:
        """C of an index "IVFC,Int8"; None of any other."""
        found = _LISTS_OF_CODES.fullmatch(self.factory)
        return int(found[1]) if found else None

    @property
    def file(self) -> str:
        """Name of its file in a snapshot: the index's own, or Faiss's."""
        return "index.faiss" if self.lists is None else "index.safetensors"

"""Which index to build and how to search it."""

from pydantic import Field

from retrieval.config import Config

__all__ = ["IndexSpec"]


class IndexSpec(Config):
    """A Faiss index over unit vectors, compared by inner product.

    Attributes:
        factory: a Faiss factory string; "Flat" searches exactly, "IVF1024,Flat" or "HNSW32" approximately.
        search: search-time parameters by their Faiss name, e.g. {"nprobe": 64} or {"efSearch": 200}.
    """

    factory: str = "Flat"
    search: dict[str, float] = Field(default_factory=dict)

    def __str__(self) -> str:
        parameters = ", ".join(f"{name} {value:g}" for name, value in self.search.items())
        return f"{self.factory} ({parameters})" if parameters else self.factory

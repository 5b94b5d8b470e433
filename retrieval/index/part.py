"""Some of a searcher's items: those of the index, or those added to it. Which are eligible, and scanning them."""

from weakref import WeakKeyDictionary

from numpy.typing import NDArray

from retrieval.errors import FilterError
from retrieval.index.attributes import Attributes, Eligible
from retrieval.index.exact import Scanner
from retrieval.index.filter import Filter

__all__ = ["Part"]


class Part:
    """See above.

    Args:
        vectors: their embeddings.
        attributes: theirs; None if they have none.
        alive: those not withdrawn.
    """

    def __init__(self, vectors: NDArray, attributes: Attributes | None, alive: Eligible) -> None:
        self.vectors, self.attributes, self.alive = vectors, attributes, alive
        self.scanner = Scanner(vectors)
        # As long as a compiled filter is held, so is what is alive of it.
        self._living: WeakKeyDictionary[Eligible, Eligible] = WeakKeyDictionary()

    def check(self, filter_: Filter) -> None:
        """Raises FilterError where there are no attributes, or the filter does not fit them."""
        if self.attributes is None:
            raise FilterError(f"filter {str(filter_)!r}: the catalogue has no attributes")
        self.attributes.check(filter_)

    def eligible(self, filter_: Filter | None) -> Eligible:
        """Items that are not withdrawn and meet a filter (None: anything); raises FilterError as `check`."""
        if filter_ is None or len(self.vectors) == 0:
            return self.alive
        self.check(filter_)
        assert self.attributes is not None
        compiled = self.attributes.compile(filter_)
        if self.alive.count == len(self.vectors):
            return compiled
        living = self._living.get(compiled)
        if living is None:
            living = self._living[compiled] = Eligible(compiled.bitmap & self.alive.bitmap)
        return living

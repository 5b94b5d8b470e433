"""What the columns of a staged log mean, as SQL."""

from dataclasses import dataclass
from typing import Literal

from retrieval.data.catalogue import Catalogue
from retrieval.data.events import Source
from retrieval.data.staging import IdColumn, TimeColumn
from retrieval.errors import DataError

__all__ = ["Meaning", "common_type"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What the staged table's columns are: SQL for each, and what it was decided from."""

    source: Source
    users: IdColumn
    items: IdColumn
    times: TimeColumn
    action: str | None
    order: str | None
    series: dict[str, str]  # staged columns by series
    item_type: Literal["integer", "string"]
    bounded: bool = False  # whether table `kept` holds the items that stay

    @property
    def fields(self) -> str:
        """SQL of user, item, time in microseconds, action and series over the staged table, null where unusable."""
        return (
            f"{self.users.read_as(self.users.type)} AS user, {self.items.read_as(self.item_type)} AS item, "
            f"{self.times.microseconds} AS micros, {'action' if self.action else 'NULL::VARCHAR AS action'}"
            + "".join(f", {name}" for name in self.series.values())
        )

    @property
    def valid(self) -> str:
        """SQL of the rows that become events, each with its place in the log, or by the column that orders it."""
        place = "row_number() OVER (ORDER BY place, rowid) - 1" if self.order else "rowid"
        return (
            f"SELECT * FROM (SELECT {place} AS ordinal, {self.fields} FROM staged) "
            "WHERE user IS NOT NULL AND item IS NOT NULL AND micros IS NOT NULL"
            + (" AND item IN (SELECT id FROM kept)" if self.bounded else "")
        )


def common_type(column: str, events: IdColumn, catalogue: Catalogue) -> Literal["integer", "string"]:
    """Type that item ids of the log and of the metadata can both be read as."""
    ids = catalogue.ids
    if events.type == ids.type:
        return events.type
    integers, strings = (column, catalogue.column) if events.type == "integer" else (catalogue.column, column)
    if not (events if events.type == "integer" else ids).free:
        raise DataError(f"{integers} holds integers but {strings} holds strings; items could not be matched")
    return "string"

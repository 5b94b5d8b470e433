"""Which columns of users' files mean what, and how delimited text is written."""

from typing import Literal

from pydantic import field_validator

from retrieval.config import Config

__all__ = ["Dialect", "EventSchema", "IdType", "ItemSchema", "SeriesSchema", "TimeUnit", "UserSchema"]

IdType = Literal["auto", "integer", "string"]
TimeUnit = Literal["auto", "s", "ms", "us", "iso"]


class Dialect(Config):
    """How delimited text is written; Parquet and JSON need none of it.

    Attributes:
        delimiter: what separates fields, up to 4 bytes (`"::"` works); None takes the likeliest of `::`, tab,
            comma, semicolon and bar from a file's first line.
        quote: what encloses fields, `""` for nothing; None is `"` for one-character delimiters, else nothing.
        columns: names for the columns of files that have no header line; None reads the header.
        encoding: `utf-8` or `latin-1`.
    """

    delimiter: str | None = None
    quote: str | None = None
    columns: tuple[str, ...] | None = None
    encoding: Literal["utf-8", "latin-1"] = "utf-8"

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_short(cls, value: str | None) -> str | None:
        if value is not None and not (1 <= len(value.encode()) <= 4 and not set(value) & set('\r\n"')):
            raise ValueError("a delimiter has 1 to 4 bytes and no quotes or line ends")
        return value

    @field_validator("quote")
    @classmethod
    def _quote_is_one_character(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) > 1:
            raise ValueError("a quote is one character, or empty for none")
        return value

    @field_validator("columns")
    @classmethod
    def _columns_are_distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("column names must be given once each")
        return value


class EventSchema(Dialect):
    """Which columns of an event log mean what.

    Attributes:
        user, item, time: column names.
        action: column of actions or ratings; None takes the column `action` where there is one; `""` takes none.
        positive: action values that are positive engagements, by name (`"like"`) or, for numbers, by comparison
            (`">=4"`); empty means all of them.
        order: column of numbers that orders a user's events of equal time; None takes their order in the log.
        time_unit: unit of numeric times, or `iso` for text; `auto` goes by column type and magnitude.
        user_type, item_type: whether ids are integers or strings. `auto` keeps the type of Parquet and JSON; in
            delimited text ids are integers only if every one is written as its integer would be (no leading
            zeros, signs or spaces).
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    action: str | None = None
    positive: tuple[str, ...] = ()
    order: str | None = None
    time_unit: TimeUnit = "auto"
    user_type: IdType = "auto"
    item_type: IdType = "auto"


class ItemSchema(Dialect):
    """Which columns of an item file mean what; all others are kept as attributes under their own names.

    Attributes:
        item: column of item ids.
        title: column kept as attribute `title`; None takes the column `title` where there is one.
    """

    item: str = "item_id"
    title: str | None = None


class UserSchema(Dialect):
    """Which columns of a users' file mean what; of the others those are read that features name as context.

    Attributes:
        user: column of user ids.
    """

    user: str = "user_id"


class SeriesSchema(Dialect):
    """Which columns of a log of auxiliary series mean what: a row says that a series has a value from a time on.

    Attributes:
        user, series, value, time: column names.
    """

    user: str = "user_id"
    series: str = "series"
    value: str = "value"
    time: str = "timestamp"

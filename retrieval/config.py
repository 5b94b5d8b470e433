"""Strict configuration: frozen objects that live beside their owner and refuse what they do not know."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from retrieval.errors import ConfigError, RetrievalError

__all__ = ["Config"]


class Config(BaseModel):
    """Base of all configuration classes and JSON documents: frozen, typed, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Build from plain values that came from `source`, a file or the command line, as messages call it.

        Raises:
            ConfigError: a key is unknown or missing, or a value impossible; the sentence names the key.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            key = ".".join(str(part) for part in first["loc"]) or cls.__name__
            raise ConfigError(f"{source}: {key}: {first['msg']}") from None

    @classmethod
    def load_json(cls, file: Path, *, format_number: int, folder_is: str, error: type[RetrievalError]) -> Self:
        """Read the JSON document that describes a folder.

        Args:
            file: the document; its key `format` must be `format_number`.
            format_number: the format that this version reads.
            folder_is: what the folder is, in messages, for instance "a dataset folder".
            error: raised where the file is missing, unreadable or of another format.

        Raises:
            error: see above.
            ConfigError: a key is unknown or missing, or a value impossible.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise error(f"{file.parent}: is not {folder_is} ({file.name} is missing)") from None
        except (OSError, ValueError) as cause:
            raise error(f"{file}: cannot be read ({cause})") from None
        found = values.get("format") if isinstance(values, dict) else None
        if found != format_number:
            raise error(f"{file}: format {found!r} is not the format {format_number} that this version reads")
        return cls.parse(values, str(file))

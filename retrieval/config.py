"""Strict configuration: frozen objects that live beside their owner and refuse what they do not know."""

import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from retrieval.errors import ConfigError

__all__ = ["Config"]


class Config(BaseModel):
    """Base of all configuration classes: frozen, typed, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Build from plain values, e.g. of a JSON or TOML file called `source` in messages.

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
    def load(cls, path: Path) -> Self:
        """Read a TOML file.

        Raises:
            ConfigError: the file is missing, is not TOML, or does not fit this class.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not TOML ({error})") from None
        return cls.parse(values, str(path))

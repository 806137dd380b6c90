"""One point of a search space: immutable, with one canonical JSON form and one key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Scalar = int | str | bool


@dataclass(frozen=True)
class Config:
    """Names and values of a configuration, sorted by name; ``config["BT"]`` reads one.

    Examples:
        >>> config = Config.of({"warps": 4, "BT": 64})
        >>> config["BT"], config.to_json()
        (64, '{"BT":64,"warps":4}')
        >>> print(config.replace(warps=8))
        BT=64 warps=8
    """

    items: tuple[tuple[str, Scalar], ...]

    @classmethod
    def of(cls, values: Mapping[str, Scalar]) -> Config:
        """The configuration with these values."""
        return cls(tuple(sorted(values.items())))

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of :meth:`to_json`."""
        return cls.of(json.loads(text))

    def __getitem__(self, name: str) -> Scalar:
        for key, value in self.items:
            if key == name:
                return value
        raise KeyError(f"no parameter {name!r} in this configuration; it has {', '.join(k for k, _ in self.items)}")

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items)

    def __contains__(self, name: object) -> bool:
        return any(key == name for key, _ in self.items)

    def integer(self, name: str) -> int:
        """The value of an integer parameter.

        Raises:
            KeyError: for an unknown name.
            TypeError: if the value is not an integer.
        """
        value = self[name]
        if not isinstance(value, int):
            raise TypeError(f"parameter {name!r} is {value!r}, not an integer")
        return value

    def replace(self, **changes: Scalar) -> Config:
        """A copy with some values changed or added."""
        return Config.of({**dict(self.items), **changes})

    def to_dict(self) -> dict[str, Scalar]:
        """A plain dict, for printing and for JSON documents."""
        return dict(self.items)

    def to_json(self) -> str:
        """The canonical JSON form: sorted names, no spaces."""
        return json.dumps(dict(self.items), sort_keys=True, separators=(",", ":"))

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items)

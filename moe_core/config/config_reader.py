"""Typed reading of one JSON object that remembers which keys it was asked for.

Knows nothing of models: whoever reads says which keys there are, and `finish` refuses what
nobody asked for, so that no key is silently ignored.
"""

from collections.abc import Collection, Mapping

from moe_core.errors import ConfigError


class ConfigReader:
    """Reads `values`; `prefix` goes in front of a key wherever an error names it.

    A key whose value is null reads as absent, as transformers writes unset options.
    """

    def __init__(self, values: Mapping[str, object], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._read: set[str] = set()

    def raw(self, key: str) -> object:
        self._read.add(key)
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null. Does not count as reading it."""
        return self._values.get(key) is not None

    def mentions(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return key in self._values

    def refuse(self, key: str, rule: str) -> ConfigError:
        return ConfigError(self._prefix + key, self._values.get(key), rule)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.raw(key)
        if value is None:
            if default is None:
                raise self.refuse(key, "is required")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.refuse(key, f"must be a whole number of at least {minimum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        self._read.add(key)
        return self.integer(key) if self.has(key) else None

    def either(self, key: str, other: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number that has two names; where both are there they must agree."""
        if self.has(other):
            default = self.integer(other, minimum=minimum)
        value = self.integer(key, default, minimum=minimum)
        if self.has(other) and value != default:
            raise self.refuse(other, f"contradicts {key}={value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw(key)
        if value is None:
            if default is None:
                raise self.refuse(key, "is required")
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(key, "must be a number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; one number is a list of one, null an empty one."""
        value = self.raw(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.refuse(key, "must be a whole number or a list of them")
        return tuple(items)

    def choice(self, key: str, allowed: Collection[object], default: object) -> object:
        """One of `allowed`; refuses anything else by name."""
        value = self.raw(key)
        value = default if value is None else value
        # JSON's true equals 1 in Python; a number where a boolean belongs is refused.
        if not any(value == option and type(value) is type(option) for option in allowed):
            names = ", ".join(map(repr, allowed))
            raise self.refuse(key, f"is not supported; supported: {names}")
        return value

    def finish(self, harmless: Collection[str]) -> None:
        """Refuse the first key that was neither read nor is known not to change outputs."""
        for key in sorted(self._values):
            if key not in self._read and key not in harmless and self.has(key):
                raise self.refuse(key, "is not known here, and could change outputs")

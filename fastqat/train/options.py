"""One option of a run: what it takes, in Python, in a YAML recipe and as a flag. All three are checked here."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

GROUPS = (
    "what to train",
    "quantization",
    "bit-widths",
    "gradients",
    "oscillations",
    "transition rates",
    "training",
    "machine",
)


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    group: str = "training",
    movable: bool = False,
) -> Any:
    """Declare a field of :class:`fastqat.train.config.Config`.

    Args:
        default: its value where nobody gives one.
        text: what it does, for ``--help``.
        low, high: bounds of a number, both allowed.
        choices: the words that it may be.
        group: heading in ``--help``; one of :data:`GROUPS`.
        movable: may change when a run is resumed, as it decides how the run is done and not what comes out.
    """
    if isinstance(default, dict):  # the mapping itself must not be shared
        kept: dict[str, Any] = {"default_factory": lambda: dict(default)}
    else:
        kept = {"default": default}
    about = {"text": text, "low": low, "high": high, "choices": choices, "group": group, "movable": movable}
    return dataclasses.field(**kept, metadata=about)


@dataclass(frozen=True)
class Option:
    """What a declared field takes.

    Args:
        name: of the field; the flag has dashes for underscores.
        kind: int, float, bool, str, Path, tuple (of numbers) or dict (of words to values).
        optional: None is a value.
        default, text, low, high, choices, group, movable: as declared.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    text: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    group: str
    movable: bool

    @property
    def wanted(self) -> str:
        """The values that are taken, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {bool: "true or false", str: "a word", Path: "a path", dict: "names with values, such as width=0.5"}
        if self.kind in words:
            return words[self.kind]
        kinds = {int: "an integer", float: "a number", tuple: "numbers"}
        bounds = {
            (False, False): "",
            (True, False): f" of at least {self.low}",
            (True, True): f" from {self.low} to {self.high}",
        }
        return kinds[self.kind] + bounds[self.low is not None, self.high is not None]

    def accept(self, value: Any) -> Any:
        """Return a value of Python or YAML in the type of the field.

        Raises:
            ValueError: it is none; the message says what was wanted, and what came.
        """
        if value is None and self.optional:
            return None
        try:
            return self._convert(value)
        except (TypeError, ValueError):
            raise ValueError(f"wanted {self.wanted}; got {value!r}") from None

    def parse(self, text: str) -> Any:
        """Return the value of a word of the command line, or that of one item of a tuple or a dict.

        Raises:
            ValueError: as :meth:`accept`.
        """
        try:
            if self.kind is dict:
                name, equals, value = text.partition("=")
                if not (name and equals and value):
                    raise ValueError
                return name, _literal(value)
            value = self._convert((text,)) if self.kind is tuple else self._convert(_literal(text, self.kind))
        except (TypeError, ValueError):
            raise ValueError(f"wanted {self.wanted}; got {text!r}") from None
        return value[0] if self.kind is tuple else value

    def _convert(self, value: Any) -> Any:
        if self.kind is float:
            return self._bounded(_number(value))
        if self.kind is tuple:
            if isinstance(value, (str, dict)):
                raise TypeError
            return tuple(self._bounded(_number(item)) for item in value)
        if self.kind is Path and isinstance(value, str):
            return Path(value)
        if not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            raise TypeError
        if self.kind is dict and not all(isinstance(key, str) for key in value):
            raise TypeError
        if self.choices and value not in self.choices:
            raise ValueError
        return self._bounded(value) if self.kind is int else value

    def _bounded(self, number: Any) -> Any:
        if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            raise ValueError
        return number


def options_of(config: type) -> dict[str, Option]:
    """Read the declared fields of a dataclass, by name."""
    hints = typing.get_type_hints(config)
    found = {}
    for field in dataclasses.fields(config):
        kinds = [hints[field.name]]
        if typing.get_origin(kinds[0]) in (Union, types.UnionType):
            kinds = list(typing.get_args(kinds[0]))
        kind = next(each for each in kinds if each is not type(None))
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        found[field.name] = Option(
            field.name, typing.get_origin(kind) or kind, type(None) in kinds, default, **field.metadata
        )
    return found


def _number(value: Any) -> float:
    """A finite float. YAML 1.1 reads "1e-3" as a word, so words are tried."""
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _literal(text: str, kind: type | None = None) -> Any:
    """Read a word as a number or a truth value where it is one, or as the kind that is wanted."""
    if kind in (str, Path, float):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text

"""Reading hardware files: typed access to TOML tables, where every fault names file, dotted key and line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NoReturn, TypeVar

from cost_model.errors import ClusterFileError, ConfigError, UnknownNameError
from cost_model.units import parse_bandwidth, parse_bytes, parse_rate, parse_time

SCHEMA = 1
_T = TypeVar("_T")
_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
_ASSIGNMENT = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([\w.-]+))\s*=""")
_AT_LINE = re.compile(r"at line (\d+)")


@dataclass(frozen=True)
class Table:
    """One TOML table with its place: path of the file, dotted key ("" at the top), line of each key by dotted name."""

    raw: Mapping[str, object]
    path: str
    key: str
    lines: Mapping[str, int]

    def fail(self, name: str, message: str, nearest: str | None = None) -> NoReturn:
        """Raise ClusterFileError for a key of this table, at its line or, where it has none, at the table's."""
        key = self.dotted(name)
        line = self.lines.get(key, self.lines.get(self.key))
        raise ClusterFileError(message, path=self.path, key=key or "(file)", line=line, nearest=nearest)

    def dotted(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key and name else self.key or name

    def only(self, known: Iterable[str]) -> None:
        """Refuse keys that nothing reads. Errors: ClusterFileError with the nearest right name."""
        names = sorted(known)
        for name in self.raw:
            if name not in names:
                self.fail(name, f"unknown key; known: {', '.join(names)}", nearest_name(name, names))

    def has(self, name: str) -> bool:
        return name in self.raw

    def value(self, name: str) -> object:
        if name not in self.raw:
            self.fail(name, f"missing; add a line `{name} = ...`")
        return self.raw[name]

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str) or not value.strip():
            self.fail(name, f"must be a text in quotes, not {value!r}")
        return value

    def number(self, name: str) -> float:
        """A finite number that is not negative."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            self.fail(name, f"must be a number that is not negative, not {value!r}")
        return float(value)

    def count(self, name: str) -> int:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(name, f"must be a whole number above zero, not {value!r}")
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, not {value!r}")
        return value

    def nbytes(self, name: str) -> int:
        return self._measure(name, parse_bytes)

    def bandwidth(self, name: str) -> float:
        return self._measure(name, parse_bandwidth)

    def seconds(self, name: str) -> float:
        return self._measure(name, parse_time)

    def rate(self, name: str) -> float:
        return self._measure(name, parse_rate)

    def points(self, name: str) -> tuple[tuple[float, float], ...]:
        """Pairs of positive numbers whose first items grow."""
        value = self.value(name)
        pairs = [_pair(item) for item in value] if isinstance(value, list) else []
        good = tuple(pair for pair in pairs if pair is not None)
        if not good or len(good) < len(pairs) or any(a[0] >= b[0] for a, b in zip(good, good[1:], strict=False)):
            self.fail(name, "must be pairs of positive numbers, as [[1024, 2e9], [4096, 5e9]], the first ones growing")
        return good

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.value(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(name, f"must be a list of texts, not {value!r}")
        return tuple(value)

    def table(self, name: str) -> Table:
        if name not in self.raw:
            self.fail(name, f"missing; add a table [{self.dotted(name)}]")
        value = self.value(name)
        if not isinstance(value, dict):
            self.fail(name, f"must be a table [{self.dotted(name)}], not {value!r}")
        return Table(value, self.path, self.dotted(name), self.lines)

    def tables(self, name: str) -> tuple[Table, ...]:
        if name not in self.raw:
            self.fail(name, f"missing; add tables [[{self.dotted(name)}]]")
        value = self.value(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.fail(name, f"must be tables [[{self.dotted(name)}]], not {value!r}")
        keys = (f"{self.dotted(name)}[{i}]" for i in range(len(value)))
        return tuple(Table(item, self.path, key, self.lines) for item, key in zip(value, keys, strict=True))

    def _measure(self, name: str, parse: Callable[[str | int | float], _T]) -> _T:
        value = self.value(name)
        try:
            return parse(value)  # type: ignore[arg-type]  # parse refuses other types by itself
        except ConfigError as error:
            self.fail(name, str(error))


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    found = difflib.get_close_matches(name, tuple(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _pair(item: object) -> tuple[float, float] | None:
    if not isinstance(item, list) or len(item) != 2:
        return None
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < float("inf") for x in item):
        return None
    return float(item[0]), float(item[1])


def parse_table(text: str, path: str) -> Table:
    """The top table of a hardware file. Errors: ClusterFileError, also for TOML that does not parse."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _AT_LINE.search(str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        raise ClusterFileError(f"not TOML: {error}", path=path, key="(file)", line=line) from error
    table = Table(raw, path, "", key_lines(text))
    if table.value("schema") != SCHEMA:
        table.fail("schema", f"this version reads schema {SCHEMA}, not {raw['schema']!r}")
    return table


def key_lines(text: str) -> dict[str, int]:
    """1-based line of every table header and key, by dotted name: "levels[1].latency"."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            prefix = _header_key(header[2], header[1] == "[[", counts)
            lines.setdefault(prefix, number)
        elif assignment := _ASSIGNMENT.match(line):
            name = next(group for group in assignment.groups() if group)
            lines.setdefault(f"{prefix}.{name}" if prefix else name, number)
    return lines


def _header_key(dotted: str, is_array: bool, counts: dict[str, int]) -> str:
    """The indexed name of a header; an array's count grows with each of its headers."""
    parts = [part.strip().strip("\"'") for part in dotted.split(".")]
    key = ""
    for depth, part in enumerate(parts):
        key = f"{key}.{part}" if key else part
        if is_array and depth == len(parts) - 1:
            counts[key] = counts.get(key, -1) + 1
        if key in counts:
            key = f"{key}[{counts[key]}]"
    return key


def shipped_names(folder: str) -> tuple[str, ...]:
    """Names of the data files in a folder of this package ("devices" or "clusters"), sorted."""
    entries = (resources.files("cost_model") / folder).iterdir()
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in entries if entry.name.endswith(".toml")))


def read_shipped(folder: str, kind: str, name: str) -> Table:
    """The data file of this name. Errors: UnknownNameError with the nearest name."""
    known = shipped_names(folder)
    if name not in known:
        raise UnknownNameError(kind, name, known)
    text = (resources.files("cost_model") / folder / f"{name}.toml").read_text(encoding="utf-8")
    return parse_table(text, f"{folder}/{name}.toml")


def read_path(path: str | Path) -> Table:
    """A hardware file of the user's. Errors: ConfigError where it cannot be read, else ClusterFileError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the hardware file {path}: {error}; give a path to a TOML file") from error
    return parse_table(text, str(path))

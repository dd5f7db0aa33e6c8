"""Sizes, bandwidths, times and rates as people write them, turned into SI numbers; nothing is guessed.

A plain number is SI already: bytes, bytes per second, seconds, operations per second. Letters matter: "GB" is
10^9 bytes, "GiB" 2^30, "Gbit" 10^9 bits; "Gb" and "30g" are refused, since they are read both ways.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping

from cost_model.errors import ConfigError

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {f"{letter}i": 2.0 ** (10 * power) for power, letter in enumerate("KMGTP", start=1)}
_PREFIXES = {**_DECIMAL, **_BINARY}

_BYTES = {f"{prefix}B": scale for prefix, scale in _PREFIXES.items()} | {"KB": 1e3}
_BITS = {f"{prefix}bit": scale / 8 for prefix, scale in _DECIMAL.items()} | {"Kbit": 1e3 / 8}
_BANDWIDTHS = {f"{unit}/s": scale for unit, scale in (_BYTES | _BITS).items()}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_RATES = {f"{prefix}FLOP/s": scale for prefix, scale in _DECIMAL.items()} | {
    f"{prefix}FLOPS": scale for prefix, scale in _DECIMAL.items()
}
_NUMBER_AND_UNIT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S*)\s*")


def parse_bytes(value: str | int | float) -> int:
    """Bytes, rounded to a whole one: "30GiB", "32 GB", 512. Errors: ConfigError."""
    return round(_parse(value, "size", _BYTES, "30 GiB"))


def parse_bandwidth(value: str | int | float) -> float:
    """Bytes per second, above zero: "25 GB/s", "200 Gbit/s", 25e9. Errors: ConfigError."""
    return _positive(_parse(value, "bandwidth", _BANDWIDTHS, "25 GB/s"), value, "bandwidth")


def parse_time(value: str | int | float) -> float:
    """Seconds: "5us", "1.5 ms", 5e-6. Errors: ConfigError."""
    return _parse(value, "time", _TIMES, "5 us")


def parse_rate(value: str | int | float) -> float:
    """Floating-point operations per second, above zero: "312 TFLOP/s", 312e12. Errors: ConfigError."""
    return _positive(_parse(value, "rate", _RATES, "312 TFLOP/s"), value, "rate")


def _parse(value: object, what: str, units: Mapping[str, float], example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{value!r} is not a {what}; write it like {example!r} or as a plain number")
    number = float(value) if isinstance(value, int | float) else _parse_text(value, what, units, example)
    if not math.isfinite(number) or number < 0:
        raise ConfigError(f"{value!r} is not a {what}: it must be finite and not negative")
    return number


def _parse_text(text: str, what: str, units: Mapping[str, float], example: str) -> float:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a {what}; write it like {example!r}")
    number, unit = match.groups()
    if unit and unit not in units:
        near = difflib.get_close_matches(unit, units, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"write it like {example!r}"
        raise ConfigError(f"{text!r} is not a {what}: unknown unit {unit!r}; {hint}")
    return float(number) * (units[unit] if unit else 1.0)


def _positive(number: float, value: object, what: str) -> float:
    if number <= 0:
        raise ConfigError(f"{value!r} is not a {what}: it must be above zero")
    return number

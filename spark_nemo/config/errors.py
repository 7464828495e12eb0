"""The one exception for bad configuration, and small checks that name the field and the fix."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from math import isfinite


class ConfigError(ValueError):
    """An invalid configuration. The message is one line that names the field and the fix."""


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: choose one of {', '.join(sorted(allowed))}")


def at_least(name: str, value: float, bound: float) -> None:
    """Raise ``ConfigError`` unless ``value >= bound``; also for NaN, which YAML can contain."""
    if not value >= bound:
        raise ConfigError(f"{name}={value}: must be at least {bound}")


def number_or_auto(name: str, value: float | str, least: float) -> None:
    """Raise ``ConfigError`` unless ``value`` is ``auto`` or a number of at least ``least``."""
    if value == "auto":
        return
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: must be a number or auto")
    at_least(name, value, least)


def in_unit_interval(name: str, value: float) -> None:
    """Raise ``ConfigError`` unless ``0 <= value <= 1``."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value}: must lie between 0 and 1")


def check_finite(settings: object, prefix: str = "") -> None:
    """Raise ``ConfigError`` naming the first NaN or infinity in a tree of dataclasses.

    Every comparison with NaN is false: it would pass most checks of bounds, and as a limit it would
    let everything through.
    """
    for each in fields(settings):  # type: ignore[arg-type]
        value, name = getattr(settings, each.name), f"{prefix}{each.name}"
        if is_dataclass(value):
            check_finite(value, f"{name}.")
        elif isinstance(value, float) and not isfinite(value):
            raise ConfigError(f"{name}={value}: must be a finite number")


def without_effect(name: str, value: object, because: str) -> ConfigError:
    """Return the error for a setting that no code would read under the other settings."""
    written = str(value).lower() if isinstance(value, bool) else value
    return ConfigError(
        f"{name}={written} has no effect {because}: remove it or change the other setting"
    )

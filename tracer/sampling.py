"""Which requests are traced: OpenTelemetry's samplers, and rules by path, model and tenant.

A caller's decision (`traceparent`) counts first, unless `OTEL_TRACES_SAMPLER` names a sampler that is not
parent-based. Where nobody has decided, the first rule of `TENSORSPAN_SAMPLING` that fits gives the ratio, else
`OTEL_TRACES_SAMPLER_ARG` does. A ratio is decided by the trace ID as OpenTelemetry's `TraceIdRatioBased` does it, so
that all services of one trace decide alike.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from tracer import config
from tracer.config import Settings
from tracer.errors import SettingsError

__all__ = ["Rule", "Sampler", "parse_rules"]

LOG: Final = logging.getLogger("vllm.tensorspan")
KEYS: Final = ("path", "model", "tenant")
EXAMPLE: Final = "path=/v1/completions 0.1; tenant=acme,model=llama-* 1; 0.01"
LOW_64: Final = 2**64
SAMPLERS: Final = ("always_on", "always_off", "traceidratio")
PARENT_BASED: Final = "parentbased_"
DEFAULT: Final = "parentbased_always_on"


@dataclass(frozen=True, slots=True)
class Rule:
    """`ratio` of the requests whose facts match all patterns."""

    patterns: tuple[tuple[str, str], ...]
    """(fact, shell pattern)."""
    ratio: float

    def fits(self, facts: Mapping[str, str]) -> bool:
        """True if every pattern matches its fact; one that is unknown matches nothing."""
        return all(name in facts and fnmatchcase(facts[name], pattern) for name, pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Sampler:
    """The decision of one server."""

    ratio: float = 1.0
    parent_based: bool = True
    rules: tuple[Rule, ...] = ()
    enabled: bool = True
    """False: `TENSORSPAN_TRACE=0`, no spans at all."""

    @classmethod
    def of(cls, settings: Settings) -> Sampler:
        """Raises SettingsError for rules that cannot be understood."""
        name, argument = config.trace_sampler()
        name = name or DEFAULT
        parent_based, kind = name.startswith(PARENT_BASED), name.removeprefix(PARENT_BASED)
        if kind not in SAMPLERS:
            LOG.warning("tensorspan: OTEL_TRACES_SAMPLER=%s is not known here; %s is used", name, DEFAULT)
            parent_based, kind = True, "always_on"
        ratio = {"always_on": 1.0, "always_off": 0.0}.get(kind)
        return cls(
            _standard_ratio(argument) if ratio is None else ratio,
            parent_based,
            parse_rules(settings.sampling),
            settings.trace,
        )

    @property
    def asks_for_model(self) -> bool:
        """True if a rule wants to know which model a request names."""
        return any(name == "model" for rule in self.rules for name, _ in rule.patterns)

    def decide(self, trace_id: str, parent: bool | None, facts: Mapping[str, str]) -> bool:
        """True if the request is traced; parent: the caller's decision, None without a caller."""
        if not self.enabled:
            return False
        if parent is not None and self.parent_based:
            return parent
        ratio = next((rule.ratio for rule in self.rules if rule.fits(facts)), self.ratio)
        return int(trace_id, 16) % LOW_64 < round(ratio * LOW_64)


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Rules of `TENSORSPAN_SAMPLING`, separated by semicolons; SettingsError if one cannot be understood."""
    return tuple(_rule(part.strip()) for part in text.split(";") if part.strip())


def _rule(text: str) -> Rule:
    *conditions, number = text.rsplit(None, 1)
    patterns = []
    for condition in re.split(r"\s*,\s*", conditions[0]) if conditions else ():
        name, found, pattern = condition.partition("=")
        if name.strip() not in KEYS or not found or not pattern.strip():
            raise _misunderstood(text, f"{condition!r} is not one of path=, model= or tenant= with a pattern")
        patterns.append((name.strip(), pattern.strip()))
    ratio = _ratio(number)
    if ratio is None:
        raise _misunderstood(text, f"{number!r} is not a ratio from 0 to 1")
    return Rule(tuple(patterns), ratio)


def _misunderstood(rule: str, cause: str) -> SettingsError:
    return SettingsError(f"TENSORSPAN_SAMPLING, rule {rule!r}: {cause}; example: {EXAMPLE}")


def _standard_ratio(argument: str) -> float:
    """`OTEL_TRACES_SAMPLER_ARG`; 1 if it is not there, or no ratio, as the specification wants it."""
    ratio = _ratio(argument) if argument else 1.0
    if ratio is None:
        LOG.warning("tensorspan: OTEL_TRACES_SAMPLER_ARG=%s is not a ratio from 0 to 1; 1 is used", argument)
    return 1.0 if ratio is None else ratio


def _ratio(text: str) -> float | None:
    try:
        ratio = float(text)
    except ValueError:
        return None
    return ratio if 0 <= ratio <= 1 else None

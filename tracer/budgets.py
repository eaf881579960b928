"""How much may be captured in a while: of one key, and of all together.

Limits are token buckets: what was not used is kept, up to one minute's captures and one hour's bytes. The bytes of a
capture are known only when it has ended, so they are paid afterwards: a budget may be overdrawn by the captures that
are open at the time, and lets nobody in until that is made good. Every API process keeps books of its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tracer.config import Settings
from tracer.keys import Key
from tracer.records import AttentionSpec, CaptureSpec, EngineInfo, QKSpec

__all__ = ["Budgets", "Spent", "captured_bytes"]

MB: Final = 1_000_000
WIDTH: Final = {"f16": 2, "f32": 4, None: 4}
"""Bytes of a value; where the engine's own precision counts, the wider one."""


@dataclass(frozen=True, slots=True)
class Spent:
    """A budget that has nothing left."""

    whose: str
    """`TENSORSPAN_...` or the key's own limit."""
    seconds: int
    """Until there is something again, rounded up."""


@dataclass(slots=True)
class _Bucket:
    capacity: float
    per_second: float
    level: float
    at: float

    def fill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self.at) * self.per_second)
        self.at = now

    def wait(self, wanted: float) -> float:
        """Seconds until `wanted` is there."""
        return max(0.0, (wanted - self.level) / self.per_second)


class Budgets:
    """The books of one process; safe in threads."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._all = Key("", b"", frozenset(), False, settings.captures_per_minute, settings.capture_mb_per_hour)
        self._buckets: dict[tuple[str, str, float], _Bucket] = {}
        """By key, kind and limit: one whose limit was changed begins anew."""

    def admit(self, key: Key | None) -> Spent | None:
        """Take one capture from every budget that it counts for, or from none and say which has nothing left."""
        with self._lock:
            counts = [self._bucket(owner, "captures") for owner in self._owners(key)]
            sizes = [self._bucket(owner, "bytes") for owner in self._owners(key)]
            waits = [(bucket.wait(1.0), whose) for whose, bucket in counts if bucket is not None]
            waits += [(bucket.wait(1.0), whose) for whose, bucket in sizes if bucket is not None]
            seconds, whose = max(waits, default=(0.0, ""))
            if seconds > 0:
                return Spent(whose, math.ceil(seconds))
            for _, bucket in counts:
                if bucket is not None:
                    bucket.level -= 1.0
        return None

    def pay(self, key: Key | None, size: int) -> None:
        """Charge the bytes of a capture that has ended."""
        with self._lock:
            for owner in self._owners(key):
                _, bucket = self._bucket(owner, "bytes")
                if bucket is not None:
                    bucket.level -= size

    def _owners(self, key: Key | None) -> tuple[Key, ...]:
        return (self._all,) if key is None else (self._all, key)

    def _bucket(self, owner: Key, kind: str) -> tuple[str, _Bucket | None]:
        """The limit's name, and its books, brought up to now; None if there is no such limit."""
        if kind == "captures":
            name, limit, period = "captures_per_minute", owner.captures_per_minute, 60.0
        else:
            name, limit, period = "capture_mb_per_hour", owner.capture_mb_per_hour * MB, 3600.0
        whose = f"{name} of the key {owner.name}" if owner.name else f"TENSORSPAN_{name.upper()}"
        if not limit:
            return whose, None
        now = self._clock()
        bucket = self._buckets.setdefault(
            (owner.name, kind, limit), _Bucket(max(limit, 1.0), limit / period, max(limit, 1.0), now)
        )
        bucket.fill(now)
        return whose, bucket


def captured_bytes(spec: CaptureSpec, engine: EngineInfo, prompt: int, output: int) -> int:
    """Bytes of the arrays that `spec` asks for, before compression, of `prompt` and `output` tokens.

    Members of unknown width (`hidden_states`, `router`) and the numbers of a step are left out.
    """
    size = 0
    if spec.logits is not None:
        size += output * _row(spec.logits.top, spec.logits.dtype, engine.vocab_size)
    if spec.prompt_logits is not None:
        size += prompt * _row(spec.prompt_logits.top, spec.prompt_logits.dtype, engine.vocab_size)
    if spec.attention is not None:
        size += _attention(spec.attention, engine, prompt, output)
    if spec.qk is not None:
        size += _qk(spec.qk, engine, prompt, output)
    return size


def _row(top: int | None, dtype: str, vocabulary: int) -> int:
    """One row of logits: all, or the best with their token IDs."""
    return vocabulary * WIDTH[dtype] if top is None else min(top, vocabulary) * (WIDTH[dtype] + 4)


def _attention(spec: AttentionSpec, engine: EngineInfo, prompt: int, output: int) -> int:
    keys = output * prompt + output * (output - 1) // 2
    if spec.rows == "all":
        keys += prompt * (prompt + 1) // 2
    heads = 0
    for layer in engine.layers:
        if spec.layers is None or layer.index in spec.layers:
            heads += layer.num_heads if spec.heads is None else sum(head < layer.num_heads for head in spec.heads)
    return keys * heads * WIDTH[spec.dtype]


def _qk(spec: QKSpec, engine: EngineInfo, prompt: int, output: int) -> int:
    size = 0
    for layer in engine.layers:
        if spec.layers is None or layer.index in spec.layers:
            queries = output + (prompt if spec.rows == "all" else 0)
            size += (queries * layer.num_heads + (prompt + output) * layer.num_kv_heads) * layer.head_size
    return size * WIDTH[spec.dtype]

"""The load: streamed completions of token IDs, timed as their bytes arrive.

A client of its own, because it shares the machine's cores with what it measures: it looks for two words in the bytes
of each read and parses nothing. Prompts are random token IDs that no other batch has, so no prefix cache ever hits.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

__all__ = ["Batch", "Load", "Stream", "percentile", "prompts", "run_batch"]

TOKEN_RANGE: Final = (100, 40_000)
"""Token IDs of prompts: ordinary words of the demo model's vocabulary."""
TOKEN_MARK: Final = b'"text":'
"""Once in each streamed token, never in the closing usage report."""
USAGE: Final = re.compile(rb'"completion_tokens": ?(\d+)')
REF: Final = re.compile(rb"\r\ntrace-capture-ref: ([0-9a-f/, ]+)\r\n", re.IGNORECASE)
TAIL: Final = 1024
"""Bytes of the answer's end that are kept to find the usage report."""


@dataclass(frozen=True, slots=True)
class Load:
    """The shape of one batch."""

    streams: int
    prompt: int
    """Prompt tokens of each request."""
    output: int
    """New tokens of each request."""
    vocabulary: tuple[int, int] = TOKEN_RANGE


@dataclass(frozen=True, slots=True)
class Stream:
    """What one request saw; seconds of `time.perf_counter`."""

    begin: float
    arrivals: tuple[float, ...]
    """When each token arrived."""
    tokens: int
    """New tokens by the server's own count."""
    ref: str
    """`Trace-Capture-Ref`, empty without a capture."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that were sent at the same moment."""

    streams: tuple[Stream, ...]

    def only(self, which: Iterable[int]) -> Batch:
        """The batch as if it had only these streams."""
        return Batch(tuple(self.streams[index] for index in which))

    @property
    def seconds(self) -> float:
        """From the first request to the last token, prefill included."""
        return max(s.arrivals[-1] for s in self.streams) - min(s.begin for s in self.streams)

    @property
    def tokens(self) -> int:
        """New tokens of all streams."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def throughput(self) -> float:
        """New tokens per second."""
        return self.tokens / self.seconds

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens of each stream, all streams together."""
        return [b - a for s in self.streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]

    @property
    def refs(self) -> list[str]:
        """The captures that this batch made."""
        return [ref for stream in self.streams for ref in stream.ref.split(", ") if ref]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def prompts(load: Load, seed: int) -> list[list[int]]:
    """Token IDs of each stream's prompt; another seed gives others from the first token on."""
    low, high = load.vocabulary
    source = random.Random(seed)
    return [source.choices(range(low, high), k=load.prompt) for _ in range(load.streams)]


def run_batch(
    url: str,
    load: Load,
    seed: int,
    headers: Callable[[int], Mapping[str, str]] = lambda _: {},
    extra: Mapping[str, object] | None = None,
) -> Batch:
    """Send one batch and wait for its end.

    headers: by stream. extra: fields added to each body. Raises RuntimeError if a request is refused or cut short.
    """
    body = {
        "model": "demo", "max_tokens": load.output, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **(extra or {}),
    }  # fmt: skip
    bodies = [json.dumps({**body, "prompt": prompt}).encode() for prompt in prompts(load, seed)]

    async def together() -> list[Stream]:
        return await asyncio.gather(*(_stream(url, data, headers(index)) for index, data in enumerate(bodies)))

    batch = Batch(tuple(asyncio.run(together())))
    short = [stream.tokens for stream in batch.streams if stream.tokens != load.output]
    if short:
        raise RuntimeError(f"requests ended after {short} instead of {load.output} tokens; see the server's log")
    return batch


async def _stream(url: str, body: bytes, headers: Mapping[str, str]) -> Stream:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    lines = {"Host": address.netloc, "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    begin = time.perf_counter()
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + body)
    data = await reader.readuntil(b"\r\n\r\n")
    ref = REF.search(data)
    refused = b" 200 " not in data.split(b"\r\n", 1)[0]
    arrivals: list[float] = []
    tail = b""
    while data := await reader.read(1 << 16):
        arrivals.extend([time.perf_counter()] * data.count(TOKEN_MARK))
        tail = (tail + data)[-TAIL:]
    writer.close()
    usage = USAGE.search(tail)
    if refused or usage is None or not arrivals:
        raise RuntimeError(f"{url} refused a request or cut it short: {tail.decode(errors='replace')}")
    return Stream(begin, tuple(arrivals), int(usage[1]), ref[1].decode() if ref else "")

"""How many output tokens were the model's thinking, by the reasoning parser that the server was started with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tracer._guard import Guard
from tracer.worker import compat

__all__ = ["Thinking"]


class Thinking:
    """One counter for each engine of this process."""

    def __init__(self) -> None:
        self._counters: dict[int, Callable[[Sequence[int]], int] | None] = {}
        self._guard = Guard()

    def tokens(self, processor: Any, parser: str, output: Sequence[int]) -> int | None:
        """Output tokens that are thinking, as vLLM's parser counts them; None where that cannot be known.

        parser: the name of a reasoning parser of vLLM; empty if the server has none.
        """
        if not parser or processor.tokenizer is None:
            return None
        key = id(processor)
        if key not in self._counters:
            self._counters[key] = None
            with self._guard("making a reasoning parser"):
                self._counters[key] = compat.reasoning_counter(parser, processor.tokenizer)
        count = self._counters[key]
        return None if count is None else count(output)

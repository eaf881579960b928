"""Whose heads are whose, where tensor parallel ranks divide the heads of every layer.

vLLM deals query heads out evenly and in order. So it does with KV heads; where there are fewer of them than ranks, each
is held by as many neighbours as it takes, and the first of these stores it. A worker checks that its layers are divided
like this and refuses the others (`tracer.worker.shares`), so that everybody else may compute it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import gcd
from typing import Final, NamedTuple

from tracer.records import EngineInfo, LayerInfo

__all__ = ["UNAVAILABLE", "Part", "divide", "key_heads", "owner", "query_heads", "rank_name", "whole_engines"]

UNAVAILABLE: Final = "unavailable:"
"""Starts a reason that is ours (a failed self-test, an unsupported set-up) and not the model's."""


class Part(NamedTuple):
    """Neighbours on a stored head axis that one rank writes together: an inner chunk's heads."""

    rank: int
    heads: tuple[int, ...]
    """The model's indices."""


def query_heads(heads: int, ranks: int, rank: int) -> range:
    """Query heads that a rank computes; `ranks` divides `heads`."""
    each = heads // ranks
    return range(rank * each, (rank + 1) * each)


def key_heads(heads: int, ranks: int, rank: int) -> range:
    """KV heads that a rank holds; one of `heads` and `ranks` divides the other."""
    if heads >= ranks:
        return query_heads(heads, ranks, rank)
    first = rank * heads // ranks
    return range(first, first + 1)


def owner(heads: int, ranks: int) -> Callable[[int], int]:
    """Head → the rank that stores it, of query heads and KV heads alike: the first that holds it."""
    return lambda head: head * ranks // heads


def divide(stored: Sequence[int], owner_of: Callable[[int], int]) -> tuple[Part, ...]:
    """The stored heads, ascending, in parts of one size that each belong to one rank: as few as there can be."""
    size = max(gcd(*Counter(map(owner_of, stored)).values()), 1)
    return tuple(Part(owner_of(stored[at]), tuple(stored[at : at + size])) for at in range(0, len(stored), size))


def rank_name(rank: int, ranks: int) -> str:
    """`rank 1 of 2`, for people."""
    return f"rank {rank} of {ranks}"


def whole_engines(workers: Iterable[EngineInfo]) -> tuple[EngineInfo, ...]:
    """What the engines can capture, one per data parallel replica, from what their workers have reported.

    Attention needs every rank; logits need rank 0, which stores them. A replica whose rank 0 is not known has the facts
    of another of its ranks and cannot be captured. Facts of ranks that the engine does not have are an earlier one's.
    """
    replicas: dict[int, dict[int, EngineInfo]] = {}
    for info in workers:
        replicas.setdefault(info.replica, {})[info.rank] = info
    return tuple(_whole(ranks) for _, ranks in sorted(replicas.items()))


def _whole(known: dict[int, EngineInfo]) -> EngineInfo:
    first = known[min(known)]
    count = first.world_size
    if count == 1 and first.rank == 0:
        return first
    there = [known[rank] for rank in range(count) if rank in known]
    absent = next((f"{UNAVAILABLE} {rank_name(rank, count)} has not reported what it can capture"
                   for rank in range(count) if rank not in known), None)  # fmt: skip
    return replace(
        first,
        rank=0,
        layers=tuple(_whole_layer(layers, count) for layers in _by_layer(there)),
        logits_unsupported=first.logits_unsupported if first.rank == 0 else absent,
        attention_unsupported=absent or _reason([info.attention_unsupported for info in there], count),
    )


def _reason(said: Sequence[str | None], count: int) -> str | None:
    """What the ranks say, in order: the first reason, with its rank's name unless all give the same."""
    rank = next((rank for rank, reason in enumerate(said) if reason is not None), None)
    if rank is None or len(set(said)) == 1:
        return said[0]
    reason, name = str(said[rank]), rank_name(rank, count)
    ours = reason.startswith(UNAVAILABLE)
    return f"{UNAVAILABLE} {name}: {reason.removeprefix(UNAVAILABLE).strip()}" if ours else f"{reason} ({name})"


def _by_layer(ranks: Sequence[EngineInfo]) -> list[list[LayerInfo]]:
    """The same layer of each rank, in the model's order."""
    layers: dict[int, list[LayerInfo]] = {}
    for layer in (layer for info in ranks for layer in info.layers):
        layers.setdefault(layer.index, []).append(layer)
    return [layers[index] for index in sorted(layers)]


def _whole_layer(ranks: Sequence[LayerInfo], count: int) -> LayerInfo:
    return replace(
        ranks[0],
        alibi_slopes=tuple(slope for layer in ranks for slope in layer.alibi_slopes),
        sink_logits=tuple(sink for layer in ranks for sink in layer.sink_logits),
        unsupported=_reason([layer.unsupported for layer in ranks], count),
    )

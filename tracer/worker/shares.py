"""Which heads a tensor parallel rank has: checked against the model's own layers, never assumed.

Everything a worker computes counts this rank's heads from 0, as vLLM's kernels do; `emit` puts the results at their
places among all heads. Ranks do not talk to each other: each works out what it stores from its own facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tracer.ranks import key_heads, owner, query_heads
from tracer.records import CaptureSpec, EngineInfo, LayerInfo
from tracer.worker import compat
from tracer.worker.layers import Layer
from tracer.worker.work import Own

__all__ = ["own_heads", "shared", "takes_part"]


def takes_part(info: EngineInfo, capture: CaptureSpec | None) -> bool:
    """True if that rank sends records for such a request: rank 0 for all, the others where layers are looked at."""
    return info.rank == 0 or (capture is not None and capture.wants_layers)


def own_heads(info: EngineInfo, wanted: Sequence[int] | None, qk_layer: int | None) -> tuple[list[int], Own]:
    """The heads that this rank stores of a request, as it counts them, and where they go.

    wanted: the model's indices, ascending, None for all; qk_layer: any of the layers whose keys are stored.
    """
    stored = wanted or range(info.num_heads)
    if info.world_size == 1:
        return list(stored), Own()
    mine = query_heads(info.num_heads, info.world_size, info.rank)
    first_key = None
    if qk_layer is not None:
        count = next(layer.num_kv_heads for layer in info.layers if layer.index == qk_layer)
        first = key_heads(count, info.world_size, info.rank).start
        first_key = first if owner(count, info.world_size)(first) == info.rank else None
    slot = sum(head < mine.start for head in stored)
    own = Own(info.rank, info.world_size, mine.start, slot, first_key)
    return [head - mine.start for head in stored if head in mine], own


def shared(layers: Sequence[Layer], worker: Any) -> tuple[list[Layer], tuple[LayerInfo, ...]]:
    """The layers as this rank computes them, and their facts for the whole model.

    A layer whose heads are not dealt out as `tracer.ranks` says is refused.
    """
    parallel = worker.vllm_config.parallel_config
    ranks, rank = parallel.tensor_parallel_size, parallel.rank
    if ranks == 1:
        return list(layers), tuple(layer.info for layer in layers)
    linears = _linears(worker.get_model())
    usual = next((layer.info.num_heads for layer in layers if layer.info.unsupported is None), 0)
    out, whole = [], []
    for layer in layers:
        linear = next(iter(linears.get(id(layer.module), ())), None)
        reason = layer.info.unsupported or _refusal(layer, linears.get(id(layer.module), []), ranks, rank, usual)
        info = replace(layer.info, unsupported=reason)
        out.append(layer if reason is None else Layer(info, layer.module))
        whole.append(_whole(info, linear, ranks))
    return out, tuple(whole)


def _linears(model: Any) -> dict[int, list[Any]]:
    """`id` of each module → the projections to queries, keys and values beside it, without LoRA around them."""
    kind = compat.qkv_linear_class()
    out: dict[int, list[Any]] = {}
    for module in model.modules():
        children = list(module.children())
        plain = [getattr(child, "base_layer", child) for child in children]
        out |= {id(child): [linear for linear in plain if isinstance(linear, kind)] for child in children}
    return out


def _refusal(layer: Layer, linears: Sequence[Any], ranks: int, rank: int, usual: int) -> str | None:
    """Why it is not known which heads this rank has of a layer, or None."""
    if len(linears) != 1:
        return "no QKVParallelLinear beside it says which heads this rank has"
    [linear], module = linears, layer.module
    keys = key_heads(linear.total_num_kv_heads, ranks, rank)
    checks = (
        ((linear.tp_size, linear.tp_rank) != (ranks, rank), "its heads are not divided among the ranks"),
        (linear.total_num_heads != module.num_heads * ranks, "its query heads are not divided evenly"),
        (len(keys) != module.num_kv_heads, "its KV heads are not divided evenly"),
        (layer.info.num_heads != usual, "other layers have another number of query heads, and there are several ranks"),
    )
    return next((reason for failed, reason in checks if failed), None)


def _whole(info: LayerInfo, linear: Any, ranks: int) -> LayerInfo:
    if linear is None:
        return replace(info, num_heads=info.num_heads * ranks, num_kv_heads=info.num_kv_heads * ranks)
    return replace(info, num_heads=linear.total_num_heads, num_kv_heads=linear.total_num_kv_heads)

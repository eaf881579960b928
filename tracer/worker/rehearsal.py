"""The test of a vLLM version that this release was not tested with: made-up steps, checked against the engine itself.

It knows nothing of the version but how a step is ordered. Two made-up requests run a prompt, a mixed step and a decode
step, captured as any request's are, and what was captured must explain what the engine did:

    weights of a head · the values that its layer was given = what the layer's own kernel returned for that row
    the largest stored logit is that of the token that the engine sampled greedily

A wrong row, key, scale, window or logits row breaks one of them. vLLM's own warm-up makes requests up in the same way
(`vllm.v1.worker.gpu.warmup`). It takes a few forward passes of a dozen tokens, after the engine's warm-up and before
its first request; the hooks are set then, and taken away again if the test fails. The cache blocks that it writes are
free, and written again before anybody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from tracer.context import EXTRA_ARGS_KEY, to_extra_args
from tracer.export import Channel
from tracer.records import AttentionSpec, CaptureSpec, LogitsSpec, Record, StepRecord, TraceRequest
from tracer.worker import compat
from tracer.worker.batch import Row, Runner
from tracer.worker.layers import Layer

__all__ = ["Outlet", "RehearsalError", "rehearse", "unhooking", "when_warm"]

CAPTURE: Final = CaptureSpec(logits=LogitsSpec(dtype="f32"), attention=AttentionSpec(dtype="f32"))
PROMPTS: Final = {"tensorspan-a": 11, "tensorspan-b": 6}
"""Made-up requests and the tokens of their prompts."""
STEPS: Final = (
    {"tensorspan-a": 11},
    {"tensorspan-a": 1, "tensorspan-b": 6},
    {"tensorspan-a": 1, "tensorspan-b": 1},
)
"""Tokens of each request in each step."""
HOOKED: Final = ("execute_model", "sample_tokens", "prepare_inputs", "sample", "dispatch", "compute_logits", "forward")
"""Attributes of a runner and its parts that hooks replace."""
LONGEST: Final = 16
"""Positions that the blocks of a request must hold."""
TOLERANCE: Final = {torch.float32: 1e-3}
COARSE: Final = 2e-2
"""Largest difference of weights · values from the kernel's output, as a share of the largest value.

A kernel rounds its weights to the model's type, and on GPUs a float32 product may be one of TF32. One key too many or
too few makes a difference of a tenth.
"""


class RehearsalError(RuntimeError):
    """What was captured does not explain what the engine did."""


class Outlet:
    """Stands for the channel of a `StepTracer`: keeps its records while `kept` is a list, else passes them on."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.kept: list[tuple[Record, bytes]] | None = None

    def send(self, record: Record, payload: Sequence[memoryview] = ()) -> bool:
        """See `Channel.send`."""
        if self.kept is None:
            return self._channel.send(record, payload)
        self.kept.append((record, b"".join(part.tobytes() for part in payload)))
        return True


@dataclass(slots=True)
class _Pass:
    """What the layers of one forward pass were given and gave back, by layer, float32 on the host."""

    values: dict[int, torch.Tensor] = field(default_factory=dict)
    """[tokens, kv_heads, size]."""
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """[tokens, heads, size]."""


def when_warm(worker: Any, action: Callable[[], None]) -> None:
    """Call `action` once vLLM's own warm-up has run: hooks that do not fit cannot stop the start then."""
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
        result = warm_up(*args, **kwargs)
        action()
        return result

    worker.compile_or_warm_up_model = compile_or_warm_up_model


def unhooking(worker: Any) -> Callable[[], None]:
    """Call before hooking a worker: what is returned takes all hooks away again."""
    runner = worker.model_runner
    modules = worker.vllm_config.compilation_config.static_forward_context.values()
    parts = [getattr(runner, name, None) for name in ("model", "cudagraph_dispatcher", "cudagraph_manager")]
    owners = [runner, *parts, *(getattr(module, "impl", None) for module in modules)]
    saved = [(owner, name, vars(owner).get(name)) for owner in owners if owner is not None for name in HOOKED]

    def unhook() -> None:
        for owner, name, value in saved:
            if value is not None:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)

    return unhook


def rehearse(worker: Any, runner: Runner, layers: Sequence[Layer], outlet: Outlet) -> None:
    """Run the made-up steps and check them; raises RehearsalError, or whatever this vLLM raises.

    runner: the adapter that the worker is hooked with; outlet: the channel of its tracer.
    """
    layers = [layer for layer in layers if layer.math is not None]
    steps = [{name: count for name, count in step.items() if name in _cast(worker)} for step in STEPS]
    values: dict[tuple[str, int], torch.Tensor] = {}
    kept: list[tuple[Record, bytes]] = []
    seen = _Pass()
    outlet.kept = kept
    started: dict[str, int] = {}
    try:
        with _watched(layers, seen):
            for counts in steps:
                output = _scheduled(worker, counts, started)
                started |= {name: started.get(name, 0) + count for name, count in counts.items()}
                rows, tokens = _step(worker, runner, output)
                for name in counts:
                    _remember(values, name, rows[name], seen)
                    _check(layers, rows[name], started[name], tokens[name], _record(kept, name), values, seen)
                for found in (kept, seen.values, seen.outputs):
                    found.clear()
    finally:
        if started:  # also after a failure: a request that nobody ends would stay in the engine's batch
            worker.execute_model(_finished(set(started)))
        outlet.kept = None


def _cast(worker: Any) -> list[str]:
    """The requests that this engine has room for; raises RehearsalError where none fits."""
    config = worker.vllm_config
    scheduler = config.scheduler_config
    names = list(PROMPTS)[: scheduler.max_num_seqs]
    if min(config.model_config.max_model_len, scheduler.max_num_batched_tokens) < LONGEST:
        raise RehearsalError(f"the engine takes fewer than {LONGEST} tokens")
    if config.kv_transfer_config is not None or config.speculative_config is not None:
        raise RehearsalError("requests cannot be made up beside a KV connector or speculative decoding")
    return names


def _blocks(worker: Any, name: str) -> tuple[list[int], ...]:
    """Cache blocks of a made-up request, for each group; groups may share memory, so no number is used twice."""
    cache = worker.model_runner.kv_cache_config
    counts = [-(-LONGEST // group.kv_cache_spec.block_size) + 1 for group in cache.kv_cache_groups]
    first = 1 + list(PROMPTS).index(name) * sum(counts)
    if first + sum(counts) > cache.num_blocks:
        raise RehearsalError(f"the KV cache has {cache.num_blocks} blocks only")
    starts = np.cumsum([first, *counts])
    return tuple(list(range(start, start + count)) for start, count in zip(starts.tolist(), counts, strict=False))


def _scheduled(worker: Any, counts: dict[str, int], started: dict[str, int]) -> Any:
    """vLLM's `SchedulerOutput` for a step of these requests."""
    output_class, new_class, cached_class = compat.scheduler_classes()
    output, cached = output_class.make_empty(), cached_class.make_empty()
    for name in counts:
        if name not in started:
            output.scheduled_new_reqs.append(_arrival(new_class, worker, name))
            continue
        cached.req_ids.append(name)
        cached.num_computed_tokens.append(started[name])
        cached.num_output_tokens.append(started[name] - PROMPTS[name] + 1)
        cached.new_block_ids.append(None)
    output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens = dict(counts)
    output.total_num_scheduled_tokens = sum(counts.values())
    return output


def _arrival(new_class: Any, worker: Any, name: str) -> Any:
    """vLLM's `NewRequestData`: a greedy request for random tokens, captured in full."""
    vocabulary = worker.vllm_config.model_config.get_vocab_size()
    seed = list(PROMPTS).index(name) + 1
    prompt = [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, PROMPTS[name])]
    extra = {EXTRA_ARGS_KEY: to_extra_args(TraceRequest("0" * 31 + "1", _span(name), sampled=False, capture=CAPTURE))}
    params = compat.sampling_params_class()(temperature=0.0, max_tokens=LONGEST, ignore_eos=True, extra_args=extra)
    return new_class(
        req_id=name, prompt_token_ids=prompt, mm_features=[], sampling_params=params, pooling_params=None,
        block_ids=_blocks(worker, name), num_computed_tokens=0, lora_request=None, prefill_token_ids=prompt,
    )  # fmt: skip


def _finished(names: set[str]) -> Any:
    """A `SchedulerOutput` that runs nothing and ends these requests."""
    output = compat.scheduler_classes()[0].make_empty()
    output.finished_req_ids = names
    return output


def _step(worker: Any, runner: Runner, output: Any) -> tuple[dict[str, Row], dict[str, int]]:
    """Run a step; its rows as the adapter sees them, and its tokens as the engine reports them, by request."""
    done = worker.execute_model(output)
    try:
        rows = {row.request_id: row for row in runner.view(exact=True).rows}
    finally:  # or the runner would wait for it forever
        tokens = _sampled(worker, done)
    return rows, tokens


def _sampled(worker: Any, done: Any) -> dict[str, int]:
    output = worker.sample_tokens(None) if done is None else done
    if hasattr(output, "get_output"):
        output = output.get_output()
    return {name: tokens[0] for name, tokens in zip(output.req_ids, output.sampled_token_ids, strict=False)}


def _span(name: str) -> str:
    return f"{list(PROMPTS).index(name) + 1:016x}"


@contextmanager
def _watched(layers: Sequence[Layer], seen: _Pass) -> Iterator[None]:
    """Note what each layer's kernel is given and returns."""
    originals = [layer.module.impl.forward for layer in layers]
    for layer in layers:
        layer.module.impl.forward = _noting(layer, seen)
    try:
        yield
    finally:
        for layer, forward in zip(layers, originals, strict=True):
            layer.module.impl.forward = forward


def _noting(layer: Layer, seen: _Pass) -> Callable[..., Any]:
    forward, info = layer.module.impl.forward, layer.info

    def noting(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(module, query, key, value, *args, **kwargs)
        output = result if isinstance(result, torch.Tensor) else kwargs.get("output")
        if isinstance(output, torch.Tensor) and isinstance(value, torch.Tensor):
            seen.values[info.index] = value.float().cpu().view(len(value), info.num_kv_heads, -1).clone()
            seen.outputs[info.index] = output.float().cpu().view(len(output), info.num_heads, -1).clone()
        return result

    return noting


def _remember(values: dict[tuple[str, int], torch.Tensor], name: str, row: Row, seen: _Pass) -> None:
    """Add the step's rows to the values of each layer for this request."""
    for index, rows in seen.values.items():
        mine = rows[row.first : row.first + row.tokens]
        before = values.get((name, index))
        values[name, index] = mine if before is None else torch.cat([before, mine])


def _record(kept: Sequence[tuple[Record, bytes]], name: str) -> tuple[StepRecord, dict[str, NDArray[Any]]]:
    """The step's record of a request and its arrays."""
    found = [entry for entry in kept if isinstance(entry[0], StepRecord) and entry[0].span_id == _span(name)]
    if len(found) != 1:
        raise RehearsalError(f"a step gave {len(found)} records")
    record, payload = found[0]
    assert isinstance(record, StepRecord)
    arrays = {
        item.name: np.frombuffer(payload, item.dtype, int(np.prod(item.shape)), item.offset).reshape(item.shape)
        for item in record.arrays
    }
    return record, arrays


def _check(
    layers: Sequence[Layer],
    row: Row,
    length: int,
    token: int,
    kept: tuple[StepRecord, dict[str, NDArray[Any]]],
    values: dict[tuple[str, int], torch.Tensor],
    seen: _Pass,
) -> None:
    """Compare what was captured of one row with what the engine did; length: tokens the engine has computed."""
    record, arrays = kept
    name = row.request_id
    where = (record.position, record.kv_len, record.step, record.token_id)
    wanted = (length - 1, length, length - PROMPTS[name], token)
    if record.dropped or where != wanted:
        raise RehearsalError(f"position, keys, step and token are {where}, not {wanted}; dropped: {record.dropped}")
    missing = {"logits", *(["attention"] if layers else [])} - arrays.keys()
    if missing:
        raise RehearsalError(f"nothing was stored of {', '.join(sorted(missing))}")
    logits = arrays["logits"].ravel()
    if logits[token] != logits.max():
        raise RehearsalError(f"the engine sampled token {token}, the stored logits prefer {int(logits.argmax())}")
    for slot, layer in enumerate(layers):
        index = layer.info.index
        if index not in seen.outputs:
            raise RehearsalError(f"layer {layer.info.name}: its kernel does not show what it was given and returned")
        weights = torch.from_numpy(arrays["attention"][slot, : layer.info.num_heads].copy())
        _explain(layer, weights, values[name, index], seen.outputs[index][row.first + row.tokens - 1])


def _explain(layer: Layer, weights: torch.Tensor, values: torch.Tensor, output: torch.Tensor) -> None:
    """Raise RehearsalError unless weights [heads, keys] times values [keys, kv_heads, size] are the output."""
    info = layer.info
    if weights.shape[-1] != len(values):
        raise RehearsalError(f"layer {info.name}: {weights.shape[-1]} weights for {len(values)} keys")
    spread = values.repeat_interleave(info.num_heads // info.num_kv_heads, dim=1)
    mixed = torch.einsum("hk,khd->hd", weights, spread)
    off = float((mixed - output).abs().max())
    exact = layer.module.kv_cache.device.type == "cpu"
    allowed = (TOLERANCE.get(layer.module.kv_cache.dtype, COARSE) if exact else COARSE) * float(values.abs().max())
    if not off <= allowed:
        raise RehearsalError(f"layer {info.name}: weights times values are off the kernel's output by {off:.2g}")

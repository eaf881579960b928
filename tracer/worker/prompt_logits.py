"""Logits of the prompt's rows: work of the model's head that nobody else asked for, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from tracer import member_records as names
from tracer.export import Channel
from tracer.records import ArrayRecord, LogitsSpec
from tracer.worker.pack import DTYPES, pack
from tracer.worker.work import Stored, Work

__all__ = ["Head", "send_prompt_logits"]

PIECE_BYTES: Final = 1 << 23
"""Logits in float32 that are computed at once: bounds memory, and a record's size."""
Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [rows, width] to raw logits [rows, vocab]."""


def send_prompt_logits(channel: Channel, work: Work, hidden: torch.Tensor, head: Head, vocab: int) -> None:
    """Compute and send the rows of this step that predict tokens of the prompt.

    hidden: [tokens, width] after the final norm, as the sampled rows' logits are computed from. How many times the head
    is called is decided by the request and the schedule alone: every rank of a model in parts calls it as often.
    """
    row, traced = work.row, work.traced
    spec = traced.prompt_logits
    assert spec is not None
    if len(hidden) < row.first + row.tokens:
        raise ValueError(f"{len(hidden)} hidden states for rows up to {row.first + row.tokens}")
    at_once = max(1, PIECE_BYTES // (4 * vocab))
    for start in range(0, work.prompt_rows, at_once):
        stop = min(start + at_once, work.prompt_rows)
        logits = head(hidden[row.first + start : row.first + stop])
        arrays, payload = pack(_stored(spec, logits, row.computed + start))
        record = ArrayRecord(traced.request.trace_id, traced.request.span_id, traced.attempt, arrays)
        if not channel.send(record, payload):
            first, last = row.computed + start, row.computed + stop - 1
            traced.problems += [f"{item.name}: queue full at positions {first} to {last}" for item in arrays]


def _stored(spec: LogitsSpec, logits: torch.Tensor, position: int) -> list[Stored]:
    dtype: Any = DTYPES[spec.dtype]
    where = (position, 0)
    if spec.top is None:
        return [(names.PROMPT_LOGITS, logits.to(dtype), where)]
    values, ids = torch.topk(logits.float(), spec.top)
    return [
        (names.PROMPT_LOGITS_TOPK, values.to(dtype), where),
        (names.PROMPT_LOGITS_TOPK_ID, ids.to(torch.int32), where),
    ]

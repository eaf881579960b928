"""What taps bring in one step: gathered for all requests at once, handed to each when its token is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from tracer import member_records as names
from tracer.member_layouts import hidden_dtype
from tracer.records import CaptureSpec, EngineInfo, HiddenSpec, RouterSpec
from tracer.worker.device import indices
from tracer.worker.pack import DTYPES
from tracer.worker.points import ROUTER_PLACE
from tracer.worker.work import Step, Work

__all__ = ["Gathered", "collect", "keep_members", "wanted_places"]

HIDDEN: Final = "hidden_states"
ROUTER: Final = "router"


def wanted_places(capture: CaptureSpec | None, info: EngineInfo) -> dict[str, tuple[int, ...]]:
    """The taps that a request listens to by member, in the order that they are stored in; without those refused."""
    out: dict[str, tuple[int, ...]] = {}
    known = info.members
    if capture is None:
        return out
    if capture.hidden_states is not None and known.hidden_states_unsupported is None:
        every = range(known.hidden_states)
        out[HIDDEN] = tuple(index for index in capture.hidden_states.layers or every if index in every)
    if capture.router is not None and known.router_unsupported is None:
        able = [layer.index for layer in known.routers if layer.unsupported is None]
        asked = capture.router.layers
        out[ROUTER] = tuple(ROUTER_PLACE + index for index in able if asked is None or index in asked)
    return out


@dataclass(slots=True)
class Gathered:
    """One member's rows of a step: of all works that asked, at all the taps that any of them listens to."""

    slots: dict[int, int]
    """Tap → place along the second axis."""
    picked: torch.Tensor
    """int64 [rows]: which rows of the batch."""
    parts: dict[Work, slice]
    """Each work's rows here: those of the prompt, then the one that predicts a token, if there is one."""
    last: int
    """Rows that the batch must have at least."""
    first: torch.Tensor | None = None
    """[rows, taps, width]: hidden states, or experts."""
    second: torch.Tensor | None = None
    """Weights of the experts."""
    seen: set[int] = field(default_factory=set)


def collect(step: Step, place: int, first: torch.Tensor, second: torch.Tensor | None) -> None:
    """Keep the rows of a tensor [tokens, width] that passed a tap; raises ValueError if it is not the whole batch."""
    member = ROUTER if place >= ROUTER_PLACE else HIDDEN
    if member not in step.members:
        step.members[member] = _plan(step, member, first.device)
    gathered = step.members[member]
    if gathered is None or place not in gathered.slots:
        return
    if first.dim() != 2 or len(first) <= gathered.last:
        raise ValueError(f"tap {place} saw a tensor of shape {tuple(first.shape)}")
    rows = first.index_select(0, gathered.picked)
    slot = gathered.slots[place]
    if member == HIDDEN:
        if second is not None:  # As the next layer's norm does: the sum in float32, kept in the engine's precision.
            rows = (rows.float() + second.index_select(0, gathered.picked).float()).to(first.dtype)
        gathered.first = _put(gathered.first, rows, slot, len(gathered.slots))
    else:
        assert second is not None
        gathered.first = _put(gathered.first, rows.to(torch.int32), slot, len(gathered.slots))
        weights = second.index_select(0, gathered.picked).to(torch.float32)
        gathered.second = _put(gathered.second, weights, slot, len(gathered.slots))
    gathered.seen.add(place)


def _put(buffer: torch.Tensor | None, rows: torch.Tensor, slot: int, slots: int) -> torch.Tensor:
    if buffer is None:
        buffer = rows.new_empty((len(rows), slots, rows.shape[1]))
    buffer[:, slot] = rows
    return buffer


def _plan(step: Step, member: str, device: torch.device) -> Gathered | None:
    """Which rows of the batch are wanted at which taps; None if no request of this step wants any."""
    picked: list[int] = []
    parts: dict[Work, slice] = {}
    places: set[int] = set()
    for work in step.works:
        row, prompt = work.row, _prompt_rows(work, member)
        if prompt or _samples(work, member):
            start = len(picked)
            picked += range(row.first, row.first + prompt)
            picked += [row.first + row.tokens - 1] if row.samples else []
            parts[work] = slice(start, len(picked))
            places.update(work.traced.places[member])
    if not parts:
        return None
    slots = {place: slot for slot, place in enumerate(sorted(places))}
    return Gathered(slots, indices(picked, device), parts, max(picked, default=-1))


def _spec(work: Work, member: str) -> HiddenSpec | RouterSpec:
    capture = work.traced.request.capture
    spec = None if capture is None else capture.hidden_states if member == HIDDEN else capture.router
    assert spec is not None
    return spec


def _samples(work: Work, member: str) -> bool:
    """True if the step's last row of that work is wanted."""
    return work.row.samples and bool(work.traced.places.get(member))


def _prompt_rows(work: Work, member: str) -> int:
    """How many of the step's first rows are wanted because they are the prompt's."""
    wanted = bool(work.traced.places.get(member)) and _spec(work, member).rows == "all"
    return work.prompt_rows if wanted else 0


def keep_members(step: Step, work: Work, info: EngineInfo) -> None:
    """Give a work what it stores, or say how many of its taps were not passed."""
    for member, mine in work.traced.places.items():
        if not (_samples(work, member) or _prompt_rows(work, member)):
            continue
        gathered = step.members.get(member)
        unseen = sum(gathered is None or place not in gathered.seen for place in mine)
        if gathered is None or unseen:
            name = names.HIDDEN_STATES if member == HIDDEN else names.ROUTER_EXPERT
            work.traced.problems.append(f"{name}: {unseen} of {len(mine)} layers were not seen")
        else:
            _store(work, member, gathered, info)


def _store(work: Work, member: str, gathered: Gathered, info: EngineInfo) -> None:
    rows, prompt, spec = gathered.parts[work], _prompt_rows(work, member), _spec(work, member)
    mine = [gathered.slots[place] for place in work.traced.places[member]]
    assert gathered.first is not None
    first = _chosen(gathered.first[rows], mine)
    if isinstance(spec, HiddenSpec):
        _split(work, names.HIDDEN_STATES, first.to(DTYPES[hidden_dtype(spec, info)]), prompt)
        return
    assert gathered.second is not None
    weights, order = _chosen(gathered.second[rows], mine).sort(dim=-1, descending=True, stable=True)
    _split(work, names.ROUTER_EXPERT, first.gather(-1, order), prompt)
    _split(work, names.ROUTER_WEIGHT, weights, prompt)


def _chosen(values: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    every = len(slots) == values.shape[1]
    return values if every else values[:, indices(slots, values.device)]


def _split(work: Work, name: str, values: torch.Tensor, prompt: int) -> None:
    """[rows, layers, width] into the prompt's rows, by position, and the step's own."""
    if prompt:
        work.blocks.append((f"{name}_prompt", values[:prompt], (work.row.computed, 0, 0)))
    if work.row.samples:
        work.arrays.append((name, values[-1], (0, 0)))

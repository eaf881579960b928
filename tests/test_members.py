"""Prompt logits, hidden states and choices of experts: asked for, carried, refused, stored, lost and read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.exporters.synthetic import NOTHING, Array, Synthetic, attributes, engine, exporter, opened, pack
from tracer import config, find_captures, open_capture
from tracer.context import check_capture, format_capture, from_extra_args, parse_capture, to_extra_args
from tracer.errors import CaptureRequestError, CaptureUnavailableError, SettingsError
from tracer.member_layouts import MEMBER_ARRAYS
from tracer.member_records import PROMPT_ARRAYS
from tracer.records import (
    ArrayRecord,
    CaptureSpec,
    EngineInfo,
    HiddenSpec,
    LogitsSpec,
    MembersInfo,
    RouterInfo,
    RouterSpec,
    TraceRequest,
)

EVERYTHING = CaptureSpec(
    prompt_logits=LogitsSpec(), hidden_states=HiddenSpec((0, 3), "all"), router=RouterSpec(rows="all")
)
ROUTERS = (
    RouterInfo(1, "layers.1", 8, 2),
    RouterInfo(2, "layers.2", 8, 2, "its kernel chooses"),
    RouterInfo(3, "layers.3", 8, 2),
)
KNOWN = MembersInfo(None, 16, 4, None, ROUTERS, None)

indices = st.lists(st.integers(0, 1023), min_size=1, max_size=9, unique=True).map(lambda found: tuple(sorted(found)))
rows = st.sampled_from(["decode", "all"])
specs = st.builds(
    CaptureSpec,
    prompt_logits=st.none()
    | st.builds(LogitsSpec, st.none() | st.integers(1, 10**15 - 1), st.sampled_from(["f16", "f32"])),
    hidden_states=st.none() | st.builds(HiddenSpec, st.none() | indices, rows, st.sampled_from([None, "f16", "f32"])),
    router=st.none() | st.builds(RouterSpec, st.none() | indices, rows),
)


# The grammar


@given(specs)
def test_text_spec_and_extra_args_agree(spec: CaptureSpec) -> None:
    assert parse_capture(format_capture(spec)) == (None if spec == CaptureSpec() else spec)
    request = TraceRequest("ab" * 16, "cd" * 8, True, spec)
    assert from_extra_args({"tensorspan": to_extra_args(request)}) == request


def test_what_the_members_mean() -> None:
    assert parse_capture("prompt_logits;top=3, hidden_states=(29 0);rows=all;dtype=f32, router") == CaptureSpec(
        prompt_logits=LogitsSpec(3), hidden_states=HiddenSpec((0, 29), "all", "f32"), router=RouterSpec()
    )
    assert parse_capture("hidden_states=?0, router=(2 1)") == CaptureSpec(router=RouterSpec((1, 2)))


@pytest.mark.parametrize(
    ("text", "member", "allowed"),
    [
        ("prompt_logits=(1)", "prompt_logits", "?0 (off)"),
        ("prompt_logits;rows=all", "prompt_logits", "top, dtype"),
        ("prompt_logits;top=0", "prompt_logits", "at least 1"),
        ("hidden_states;heads=1", "hidden_states", "rows, dtype"),
        ("hidden_states=()", "hidden_states", "at least one layer"),
        ("hidden_states;rows=prompt", "hidden_states", "rows=decode|all"),
        ("router;dtype=f16", "router", "rows"),
        ("router=(-1)", "router", "from 0"),
    ],
)
def test_grammar_refuses_and_says_what_works(text: str, member: str, allowed: str) -> None:
    with pytest.raises(CaptureRequestError) as caught:
        parse_capture(text)
    assert caught.value.member == member
    assert allowed in caught.value.allowed
    assert parse_capture(caught.value.example) is not None


def asked(text: str, known: MembersInfo = KNOWN, **changes: Any) -> None:
    spec = parse_capture(text)
    assert spec is not None
    check_capture(spec, [replace(engine(), members=known, **changes)])


def test_what_the_engine_has_is_granted() -> None:
    asked("prompt_logits, hidden_states=(0 3), hidden_states, router=(1 3)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hidden_states=(4)", "index 4 is out of range; allowed: this model has 0-3"),
        ("router=(0)", "layer 0 has no router; allowed: this model has experts in layers 1-3"),
        ("router=(2)", "layer 2: its kernel chooses"),
        ("prompt_logits;top=51", "top=51 exceeds the vocabulary"),
    ],
)
def test_what_it_has_not_is_refused_with_an_example_that_works(text: str, says: str) -> None:
    with pytest.raises(CaptureRequestError, match=re.escape(says)) as caught:
        asked(text)
    asked(caught.value.example)


def test_what_a_server_was_not_started_for_is_unavailable() -> None:
    off = "unavailable: start the server with TENSORSPAN_TAPS=router"
    with pytest.raises(CaptureUnavailableError, match="TENSORSPAN_TAPS=router; see tensorspan doctor"):
        asked("router", replace(KNOWN, router_unsupported=off))
    with pytest.raises(CaptureUnavailableError, match="has not said"):
        asked("hidden_states", MembersInfo())
    with pytest.raises(CaptureUnavailableError, match="runner"):
        asked("prompt_logits", logits_unsupported="unavailable: no runner")
    with pytest.raises(CaptureRequestError, match="impossible on this model: the model has no experts"):
        asked("router", replace(KNOWN, routers=(), router_unsupported="the model has no experts"))


def test_the_setting_takes_known_members_only() -> None:
    loaded = config.load({"taps": "hidden_states, router"})
    assert loaded.tapped == ("hidden_states", "router")
    with pytest.raises(SettingsError, match=r"TENSORSPAN_TAPS=logits: 'logits' is not one of hidden_states, router"):
        config.load({"taps": "logits"})


# The store


@dataclass
class WithMembers(Synthetic):
    """A generation with hidden states 0 and 3, routers of layers 1 and 3, and the prompt's logits."""

    spec: CaptureSpec = EVERYTHING
    values: dict[str, Array] = field(init=False)
    """By name [position, ...], those of the prompt first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        random, count = np.random.default_rng(self.seed), self.prompt + self.steps - 1
        self.values = {
            "hidden_states": random.normal(0, 2, (count, 2, 16)).astype(np.float16),
            "router_expert": random.integers(0, 8, (count, 2, 2)).astype(np.int32),
            "router_weight": random.random((count, 2, 2), dtype=np.float32),
            "prompt_logits": random.normal(0, 2, (self.prompt - 1, self.vocab)).astype(np.float16),
        }

    def arrays(self, step: int) -> dict[str, Array]:
        at = self.prompt - 1 + step
        return {name: values[at] for name, values in self.values.items() if name != "prompt_logits"}

    def before(self, first: int, stop: int) -> list[Any]:
        """Records of prompt positions first … stop - 1."""
        out = []
        for name, values in self.values.items():
            array = np.ascontiguousarray(values[first:stop])
            slices, payload = pack({name if name in PROMPT_ARRAYS else f"{name}_prompt": array}, (first, 0, 0))
            out.append((ArrayRecord(self.trace_id, self.span_id, 1, slices), payload))
        return out


def facts(**changes: Any) -> EngineInfo:
    return replace(engine(), members=KNOWN, **changes)


def send(out: Any, work: WithMembers, blocks: list[tuple[int, int]], steps: int) -> None:
    out.export(facts(), NOTHING)
    out.export(work.start(), NOTHING)
    for first, stop in blocks:
        for record, payload in work.before(first, stop):
            out.export(record, payload)
    for step in range(steps):
        out.export(*work.step(step))


def check(work: WithMembers, path: Path, steps: int) -> None:
    """Everything that was sent is read back, by us and by zarr."""
    capture, group, before = open_capture(path), opened(path), work.prompt - 1
    for name, values in work.values.items():
        prompt = group[name if name in PROMPT_ARRAYS else f"{name}_prompt"]
        np.testing.assert_array_equal(prompt[...], values[:before])
        if name != "prompt_logits":
            np.testing.assert_array_equal(group[name][...], values[before : before + steps])
    assert list(capture.hidden_states) == list(capture.hidden_states_prompt) == [0, 3]
    assert list(capture.router_expert) == list(capture.router_weight_prompt) == [1, 3]
    np.testing.assert_array_equal(capture.hidden_states[3], work.values["hidden_states"][before:, 1][:steps])
    np.testing.assert_array_equal(capture.router_expert_prompt[3], work.values["router_expert"][:before, 1])
    np.testing.assert_array_equal(capture.router_weight[1], work.values["router_weight"][before:, 0][:steps])
    np.testing.assert_array_equal(capture.prompt_logits, work.values["prompt_logits"])
    data = capture.to_xarray()
    assert data["hidden_states"].dims == ("step", "hidden_layer", "hidden")
    assert data["router_expert_prompt"].dims == ("prompt_row", "router_layer", "expert_slot")


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_everything_is_stored_by_step_and_by_the_prompts_positions(codec: str, tmp_path: Path) -> None:
    work, out = WithMembers(steps=70, prompt=90), exporter(tmp_path, codec=codec)
    send(out, work, [(0, 3), (3, 89)], 70)
    out.export(work.end(), NOTHING)
    capture = open_capture(work.path(tmp_path))
    limit = {"array": "router_expert", "what": "layer 2", "reason": "its kernel chooses"}
    assert capture.missing == [limit], "a layer that was asked for with all others"
    check(work, work.path(tmp_path), 70)
    stored = capture.attrs["stored"]
    assert stored["hidden_states"] == {"source_dtype": "bfloat16", "stored_dtype": "float16", "overflow": 0}
    assert {"prompt_logits", "hidden_states_prompt"} <= set(stored)
    assert "router_weight" not in stored
    [entry] = find_captures(tmp_path)
    assert set(MEMBER_ARRAYS) - {"prompt_logits_topk", "prompt_logits_topk_id"} == set(entry.arrays)


def test_the_best_of_the_prompts_rows(tmp_path: Path) -> None:
    spec = CaptureSpec(LogitsSpec(5), prompt_logits=LogitsSpec(3, "f32"))
    work, out = WithMembers(steps=2, prompt=6, spec=spec), exporter(tmp_path)
    values, ids = np.random.default_rng(0).random((5, 3), np.float32), np.arange(15, dtype=np.int32).reshape(5, 3)
    slices, payload = pack({"prompt_logits_topk": values, "prompt_logits_topk_id": ids}, (0, 0))
    for record in (facts(), work.start()):
        out.export(record, NOTHING)
    out.export(ArrayRecord(work.trace_id, work.span_id, 1, slices), payload)
    for step in range(2):
        out.export(*Synthetic.step(Synthetic(spec=spec), step))
    out.export(work.end(), NOTHING)
    capture = open_capture(work.path(tmp_path))
    assert capture.complete, capture.missing
    np.testing.assert_array_equal(capture.to_xarray()["prompt_logits_topk"], values)
    np.testing.assert_array_equal(capture.to_xarray()["prompt_logits_topk_id"], ids)
    with pytest.raises(KeyError, match="holds no prompt_logits"):
        _ = capture.prompt_logits


def test_what_did_not_come_is_named(tmp_path: Path) -> None:
    work, out = WithMembers(steps=3, prompt=9), exporter(tmp_path)
    out.export(facts(), NOTHING)
    out.export(work.start(), NOTHING)
    for record, payload in [*work.before(0, 3), *work.before(5, 8)]:
        out.export(record, payload)
    for step in range(3):
        lost = ("hidden_states",) if step == 1 else ()
        said = ("hidden_states: 1 of 2 layers were not seen",) if step == 1 else ()
        record, payload = work.step(step, without=lost)
        out.export(replace(record, dropped=said), payload)
    out.export(work.end(), NOTHING)
    missing = attributes(work.path(tmp_path))["missing"]
    for name in ("hidden_states_prompt", "router_expert_prompt", "router_weight_prompt", "prompt_logits"):
        assert {"array": name, "what": "positions 3-4", "reason": "not received"} in missing
    assert {"array": "hidden_states", "what": "step 1", "reason": "1 of 2 layers were not seen"} in missing
    hidden = np.asarray(open_capture(work.path(tmp_path)).hidden_states[0])
    assert np.isnan(hidden).all(axis=1).tolist() == [False, True, False]


def test_what_was_never_possible_is_named(tmp_path: Path) -> None:
    work, out = WithMembers(steps=1), exporter(tmp_path)
    known = replace(KNOWN, hidden_states_unsupported="no stream", router_unsupported="no experts", prompt_logits_unsupported="no head")  # noqa: E501  # fmt: skip
    out.export(replace(engine(), members=known), NOTHING)
    out.export(work.start(), NOTHING)
    out.export(work.end(1), NOTHING)
    missing = attributes(work.path(tmp_path))["missing"]
    wanted = {"hidden_states": "no stream", "router_expert": "no experts", "prompt_logits": "no head"}
    assert wanted.items() <= {(entry["array"], entry["reason"]) for entry in missing}


def test_the_byte_budget_ends_them_like_everything_else(tmp_path: Path) -> None:
    work, out = WithMembers(steps=4, prompt=900, vocab=1000), exporter(tmp_path, request_mb=1)
    send(out, work, [(0, 899)], 4)
    out.export(work.end(), NOTHING)
    missing = attributes(work.path(tmp_path))["missing"]
    assert {"array": "hidden_states", "what": "steps 0-3", "reason": "byte budget of 1 MB reached"} in missing


def test_a_killed_writers_rows_are_recovered(tmp_path: Path) -> None:
    work, root = WithMembers(steps=80, prompt=100), tmp_path / "store"
    child = os.fork()
    if not child:
        send(exporter(root), work, [(0, 99)], 77)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert [path.name for path in exporter(root).recover()] == [work.span_id]
    check(work, work.path(root), 77)
    assert not list(root.rglob("*.part"))

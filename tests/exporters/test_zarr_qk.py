"""Queries and keys: stored by step and by the prompt's positions, rebuilt on reading, whole after a crash."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.exporters.synthetic import NOTHING, Array, Synthetic, attributes, engine, exporter, opened, pack
from tracer import open_capture
from tracer.rebuilt import rebuild_rows
from tracer.records import ArrayRecord, CaptureSpec, QKSpec

WHOLE = CaptureSpec(qk=QKSpec(rows="all"))
LAYERS, HEADS, GROUPS, DIM = 3, 2, 1, 8


@dataclass
class WithKeys(Synthetic):
    """A generation whose attention is only its queries and keys."""

    spec: CaptureSpec = WHOLE
    queries: Array = field(init=False)
    """float16 [position, layer, head, dim]."""
    keys: Array = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        random, positions = np.random.default_rng(self.seed), self.prompt + self.steps - 1
        self.queries = random.normal(0, 2, (positions, LAYERS, HEADS, DIM)).astype(np.float16)
        self.keys = random.normal(0, 2, (positions, LAYERS, GROUPS, DIM)).astype(np.float16)

    def arrays(self, step: int) -> dict[str, Array]:
        at = self.prompt - 1 + step
        return {"query": self.queries[at], "key": self.keys[at]}

    def before(self, first: int, stop: int, names: tuple[str, ...] = ("key", "query")) -> list[Any]:
        """Records of prompt positions first … stop - 1, which end before the last prompt row."""
        out = []
        for name in names:
            values = (self.keys if name == "key" else self.queries)[first:stop]
            slices, payload = pack({f"{name}_prompt": np.ascontiguousarray(values)}, (first, 0, 0, 0))
            out.append((ArrayRecord(self.trace_id, self.span_id, 1, slices), payload))
        return out

    def rebuilt(self, layer: int) -> Array:
        """float32 [head, query, key]."""
        facts = {"scale": 0.35}
        return rebuild_rows(self.queries[:, layer], self.keys[:, layer], np.arange(len(self.keys)), facts)


def send(out: Any, work: WithKeys, steps: int | None = None) -> None:
    out.export(engine(LAYERS, HEADS), NOTHING)
    out.export(work.start(), NOTHING)
    for record, payload in [*work.before(0, 3), *work.before(3, work.prompt - 1)]:
        out.export(record, payload)
    for step in range(work.steps if steps is None else steps):
        out.export(*work.step(step))


@pytest.mark.parametrize("prompt", [7, 200])
@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_attention_is_rebuilt_from_what_is_stored(prompt: int, codec: str, tmp_path: Path) -> None:
    work, out = WithKeys(steps=70, prompt=prompt), exporter(tmp_path, codec=codec)
    send(out, work)
    out.export(work.end(), NOTHING)
    capture = open_capture(work.path(tmp_path))
    assert capture.complete, capture.missing
    group = opened(work.path(tmp_path))
    np.testing.assert_array_equal(group["key_prompt"][...], work.keys[: prompt - 1])
    np.testing.assert_array_equal(group["query"][...], work.queries[prompt - 1 :])
    assert group.attrs["stored"]["key"] == {"source_dtype": "bfloat16", "stored_dtype": "float16", "overflow": 0}
    for layer in range(LAYERS):
        wanted = work.rebuilt(layer)
        got = np.asarray(capture.attention[layer])
        np.testing.assert_allclose(got, wanted[:, prompt - 1 :].transpose(1, 0, 2), rtol=0, atol=1e-6)
        prefill = np.asarray(capture.attention_prefill[layer])
        np.testing.assert_allclose(prefill, wanted[:, :prompt, :prompt], rtol=0, atol=1e-6)
    row = capture.row(step=5, layer=1, head=1)
    np.testing.assert_allclose(row, work.rebuilt(1)[1, prompt + 4, : prompt + 5], rtol=0, atol=1e-6)
    assert "rebuilt from queries and keys" in repr(capture.attention)


def test_what_is_missing_is_named_and_its_rows_are_not_made_up(tmp_path: Path) -> None:
    work, out = WithKeys(steps=4, prompt=9), exporter(tmp_path)
    out.export(engine(LAYERS, HEADS), NOTHING)
    out.export(work.start(), NOTHING)
    for record, payload in [*work.before(0, 3), *work.before(5, 8), *work.before(3, 5, ("query",))]:
        out.export(record, payload)
    for step in range(4):
        out.export(*work.step(step, without=("query",) if step == 2 else ()))
    out.export(work.end(), NOTHING)
    capture = open_capture(work.path(tmp_path))
    assert not capture.complete
    assert {"array": "key_prompt", "what": "positions 3-4", "reason": "not received"} in capture.missing
    assert {"array": "query", "what": "step 2", "reason": "not received"} in capture.missing
    assert not np.asarray(capture.attention[0]).any(), "every row sees a key that is not there"
    prefill = np.asarray(capture.attention_prefill[0])
    assert prefill[:, :3].any()
    assert not prefill[:, 3:].any()
    with pytest.raises(KeyError, match="was not stored"):
        capture.row(step=0, layer=0, head=0)


def test_a_block_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    work, out = WithKeys(steps=1, prompt=9), exporter(tmp_path)
    out.export(engine(LAYERS, HEADS), NOTHING)
    out.export(work.start(), NOTHING)
    slices, payload = pack({"key_prompt": work.keys[:9]}, (0, 0, 0, 0))
    out.export(ArrayRecord(work.trace_id, work.span_id, 1, slices), payload)
    out.export(*work.step(0))
    out.export(work.end(), NOTHING)
    assert "does not fit" in str(attributes(work.path(tmp_path))["dropped"])


def test_queries_and_keys_of_a_killed_writer_are_recovered(tmp_path: Path) -> None:
    work, root = WithKeys(steps=80, prompt=100), tmp_path / "store"
    child = os.fork()
    if not child:
        send(exporter(root), work, 77)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert [path.name for path in exporter(root).recover()] == [work.span_id]
    capture = open_capture(work.path(root))
    assert (capture.num_steps, capture.attrs["status"]) == (77, "interrupted")
    np.testing.assert_array_equal(opened(work.path(root))["key_prompt"][...], work.keys[:99])
    got = np.asarray(capture.attention[2])
    np.testing.assert_allclose(got, work.rebuilt(2)[:, 99:176, :176].transpose(1, 0, 2), rtol=0, atol=1e-6)
    assert not list(root.rglob("*.part"))
    shutil.rmtree(root)


def test_without_the_prompts_queries_only_the_answers_rows_are_there(tmp_path: Path) -> None:
    work, out = WithKeys(steps=3, prompt=9, spec=CaptureSpec(qk=QKSpec((0, 1, 2)))), exporter(tmp_path)
    out.export(engine(LAYERS, HEADS), NOTHING)
    out.export(work.start(), NOTHING)
    for record, payload in work.before(0, 8, ("key",)):
        out.export(record, payload)
    for step in range(3):
        out.export(*work.step(step))
    out.export(work.end(), NOTHING)
    capture = open_capture(work.path(tmp_path))
    assert capture.complete, capture.missing
    np.testing.assert_allclose(np.asarray(capture.qk[0])[0, :, :9], work.rebuilt(0)[:, 8, :9], rtol=0, atol=1e-6)
    assert not list(capture.attention_prefill)
    with pytest.raises(KeyError, match="query_prompt"):
        _ = capture.qk_prefill

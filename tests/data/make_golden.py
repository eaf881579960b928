"""Write the golden captures of the current format version beside this file: `python tests/data/make_golden.py`.

Run it once per format version, and once more when arrays are added within one. A golden capture that exists is never
written again: it stands for the captures that users already have.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.exporters.synthetic import FULL, NOTHING, Synthetic, engine, exporter, pack
from tracer.records import ArrayRecord, CaptureSpec, QKSpec
from tracer.schema import VERSION

ROOT = Path(__file__).parent / f"golden-v{VERSION}"
QK_ROOT = ROOT.with_name(f"{ROOT.name}-qk")
LAYERS, HEADS, DIM = 2, 4, 8


def golden() -> Synthetic:
    """Values by formula, so that the test needs no second copy of them."""
    work = Synthetic(steps=3, prompt=5, vocab=16, layers=2, heads=2, spec=FULL, max_tokens=8)
    work.logits = (np.arange(48).reshape(3, 16) / 8 - 3).astype(np.float16)
    work.rows = [np.full((2, 2, 5 + i), 1 / 8, np.float16) * (i + 1) for i in range(3)]
    work.summaries = np.arange(48, dtype=np.float32).reshape(3, 2, 2, 4)
    work.prefill = np.tril(np.arange(100).reshape(2, 2, 5, 5) / 64).astype(np.float16)
    return work


def golden_qk() -> tuple[np.ndarray, np.ndarray]:
    """Queries [7, layers, heads, dim] and keys [7, layers, 2, dim] of five prompt and two further positions."""
    wave = np.arange(7 * LAYERS * HEADS * DIM).reshape(7, LAYERS, HEADS, DIM) % 23 / 8 - 1.25
    return wave.astype(np.float16), wave[:, :, ::2][..., ::-1].astype(np.float16)


def main() -> None:
    """Write each, unless it is there."""
    for root, make in ((ROOT, make_rows), (QK_ROOT, make_qk)):
        if not root.exists():
            make()


def make_qk() -> None:
    """Queries and keys instead of rows."""
    work, out = Synthetic(steps=3, prompt=5, spec=CaptureSpec(qk=QKSpec(rows="all")), max_tokens=8), exporter(QK_ROOT)
    queries, keys = golden_qk()
    info = engine(LAYERS, HEADS)
    out.export(replace(info, layers=tuple(replace(layer, num_kv_heads=2) for layer in info.layers)), NOTHING)
    out.export(work.start(), NOTHING)
    slices, payload = pack({"query_prompt": queries[:4], "key_prompt": keys[:4]}, (0, 0, 0, 0))
    out.export(ArrayRecord(work.trace_id, work.span_id, 1, slices), payload)
    for step in range(3):
        slices, payload = pack({"query": queries[4 + step], "key": np.ascontiguousarray(keys[4 + step])})
        out.export(replace(work.step(step)[0], arrays=slices), payload)
    out.export(work.end(), NOTHING)
    assert out.shutdown(1.0)
    clean(QK_ROOT)


def clean(root: Path) -> None:
    """The index is no part of the format."""
    for path in root.glob("index.sqlite*"):
        path.unlink()


def make_rows() -> None:
    """Every array of a capture that holds rows."""
    work, out = golden(), exporter(ROOT)
    out.export(engine(2, 2), NOTHING)
    out.export(work.start(), NOTHING)
    for layer in range(2):
        out.export(*work.block(layer, 0, 3))
        out.export(*work.block(layer, 3, 5))
    for step in range(3):
        record, payload = work.step(step)
        out.export(
            replace(record, start_ns=1_700_000_000_000_000_000, end_ns=1_700_000_000_000_000_000 + step), payload
        )
    out.export(work.end(output_token_bytes=(b"caf", b"\xc3", b"\xa9")), NOTHING)
    assert out.shutdown(1.0)
    clean(ROOT)


if __name__ == "__main__":
    main()

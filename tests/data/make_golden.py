"""Write the golden capture of the current format version beside this file: `python tests/data/make_golden.py`.

Run it once per format version. A golden capture that exists is never written again: it stands for the captures that
users already have.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.exporters.synthetic import FULL, NOTHING, Synthetic, engine, exporter
from tracer.schema import VERSION

ROOT = Path(__file__).parent / f"golden-v{VERSION}"


def golden() -> Synthetic:
    """Values by formula, so that the test needs no second copy of them."""
    work = Synthetic(steps=3, prompt=5, vocab=16, layers=2, heads=2, spec=FULL, max_tokens=8)
    work.logits = (np.arange(48).reshape(3, 16) / 8 - 3).astype(np.float16)
    work.rows = [np.full((2, 2, 5 + i), 1 / 8, np.float16) * (i + 1) for i in range(3)]
    work.summaries = np.arange(48, dtype=np.float32).reshape(3, 2, 2, 4)
    work.prefill = np.tril(np.arange(100).reshape(2, 2, 5, 5) / 64).astype(np.float16)
    return work


def main() -> None:
    """Write it, unless it is there."""
    if ROOT.exists():
        raise SystemExit(f"{ROOT} exists; a golden capture is never rewritten")
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


if __name__ == "__main__":
    main()

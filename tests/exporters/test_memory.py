from __future__ import annotations

import numpy as np

from exporters.memory import MemoryExporter
from tests.exporters.synthetic import Synthetic, wipe
from tracer.records import GenerationEnd, StepRecord


def test_records_and_copies_of_their_arrays_are_kept() -> None:
    generation, out = Synthetic(steps=3), MemoryExporter()
    for record, payload in generation.records():
        out.export(record, payload)
        wipe(payload)
    steps = out.of(StepRecord)
    assert [step.step for step in steps] == [0, 1, 2]
    assert len(out.of(GenerationEnd)) == 1
    arrays = next(arrays for record, arrays in out.items if record is steps[2])
    np.testing.assert_array_equal(arrays["logits"], generation.logits[2])
    np.testing.assert_array_equal(arrays["attention"], generation.rows[2])
    assert out.force_flush(0.1)
    assert out.shutdown(0.1)

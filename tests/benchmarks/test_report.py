from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.benchmarks.bench import EIGHT, Plan
from tests.benchmarks.context import Point, fit, step_ms
from tests.benchmarks.figure import draw
from tests.benchmarks.load import Batch, Load, Stream, percentile, prompts
from tests.benchmarks.measure import Captured, Sample, Variant, compare
from tests.benchmarks.report import NAMES, P99, Report, Row, add_samples, bench_json, markdown, publish
from tests.benchmarks.servers import Memory
from tests.benchmarks.soak import Moment, slope


def batch(*gaps: float, streams: int = 2, begin: float = 100.0) -> Batch:
    """Streams whose tokens arrive after these gaps."""
    times = [begin + sum(gaps[: at + 1]) for at in range(len(gaps))]
    return Batch(tuple(Stream(begin, tuple(times), len(gaps), "") for _ in range(streams)))


def sample(ratio: float, faults: Sequence[str] = ()) -> Sample:
    captured = Captured(2, 20, 4.0, 2.0, 30, 0.5, 0.1, tuple(faults))
    return Sample(ratio, 1.01, ratio - 0.1, 100.0, captured)


def test_a_batch_counts_all_tokens_until_the_last() -> None:
    found = batch(0.5, 0.5, 1.0)
    assert (found.tokens, found.seconds, found.throughput) == (6, 2.0, 3.0)
    assert found.gaps == [0.5, 1.0, 0.5, 1.0]
    assert found.only((0,)).tokens == 3


def test_percentile_is_a_measured_value() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(map(float, range(1000))), 0.99) == 990.0
    assert percentile([1.0], 0.99) == 1.0


def test_prompts_differ_by_seed_and_stream() -> None:
    load = Load(2, 16, 1)
    first, second = prompts(load, 1)
    assert first != second != prompts(load, 2)[1]
    assert prompts(load, 1) == [first, second]


def test_a_ratio_is_over_the_mean_of_both_neighbours() -> None:
    found = compare(Variant("x", "traced"), batch(2.0, 2.0), None, (batch(1.0, 1.0), batch(1.0, 0.0)))
    assert found.throughput == pytest.approx(1.0 / 3.0)
    assert found.p99 == 2.0
    assert found.stored is None


def test_only_measured_streams_count() -> None:
    slow = batch(4.0, 4.0, streams=1).streams[0]
    fast = batch(1.0, 1.0, streams=1).streams[0]
    mixed = Batch((slow, fast))
    plain = batch(1.0, 1.0)
    variant = Variant("x", "traced", "logits", capturing=(0,), measured=(1,))
    assert compare(variant, mixed, None, (plain, plain)).throughput == 1.0
    assert variant.headers_of(0) == {"Trace-Capture": "logits"}
    assert variant.headers_of(1) == {}


def test_time_until_stored_counts_too() -> None:
    captured = Captured(2, 4, 1.0, 1.0, 10, 2.0, 0.1, ())
    found = compare(Variant("x", "traced", "logits"), batch(1.0, 1.0), captured, (batch(1.0, 1.0),))
    assert (found.throughput, found.stored) == (1.0, 0.5)


def test_json_has_medians_and_ranges() -> None:
    report = Report([])
    add_samples(
        report, EIGHT, [(NAMES.full, sample(ratio)) for ratio in (0.9, 0.8, 0.95)], [[100.0, 90.0], [110.0, 110.0]]
    )
    noise, first, *_ = json.loads(bench_json(report))
    assert (noise["ratio_median"], noise["n"]) == (0.95, 2)
    assert report.lines == ["Plain vLLM made 105 tokens/s at 8 streams, 256 prompt tokens"]
    assert first == {
        "name": NAMES.full, "streams": 8, "prompt": 256, "output": 128,
        "ratio_median": 0.9, "ratio_min": 0.8, "ratio_max": 0.95, "n": 3,
    }  # fmt: skip
    assert not report.problems


def test_goals_bind_only_at_their_load() -> None:
    assert str(Row(NAMES.full, EIGHT, (0.9,)).target) == "≥ 0.90"
    assert Row(NAMES.full, Load(1, 256, 128), (0.9,)).target is None
    p99 = Row(NAMES.off + P99, EIGHT, (1.05,))
    assert p99.target is not None
    assert not p99.target.met(p99.median)


def test_a_dropped_array_is_said_first() -> None:
    report = Report(["today"])
    add_samples(report, EIGHT, [(NAMES.logits, sample(0.97, ["a/b: queue full"]))])
    text = markdown(report)
    assert "**no result: + full logits" in text
    assert "| + full logits | 8 | 256 | 0.970 | 0.970 to 0.970 | 1 | ≥ 0.96, met |" in text
    assert "1 of 2" in text


def test_memory_is_compared_with_the_plain_worker() -> None:
    report = Report([])
    plain, traced = Memory(2000.0, 0.0, 2200.0), Memory(2100.0, 250.0, 2600.0)
    report.memory = {"plain": ({"worker": plain}, {"worker": plain}), "traced": ({"worker": plain}, {"worker": traced})}
    assert "holds +100 MB of its own over the plain one (goal ≤ 64, missed)" in markdown(report)


def points() -> list[Point]:
    return [Point(keys, rows, 1 + rows * (0.5 + 0.001 * keys), 25.0) for keys in (128, 1024) for rows in (1, 2, 8)]


def test_the_plane_is_found_again() -> None:
    found = fit(points())
    assert (found.base, found.per_row, found.per_key) == pytest.approx((1.0, 0.5, 0.001))
    assert found.r2 == pytest.approx(1.0)


def test_a_decode_step_is_timed_after_the_last_prefill() -> None:
    early = Stream(0.0, (1.0, 9.0, 9.5, 10.0), 4, "")
    late = Stream(0.0, (9.0, 9.5, 10.0, 10.5), 4, "")
    assert step_ms(Batch((early, late))) == 500.0


def test_the_figure_is_an_svg_with_one_line_per_number() -> None:
    root = ET.fromstring(draw(points()))
    lines = [node for node in root.iter("{http://www.w3.org/2000/svg}path") if node.get("class") == "line"]
    assert len(lines) == 3 + 2
    ET.fromstring(draw([Point(128, 1, -0.2, 25.0)]))


def test_results_replace_only_what_is_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- results: begin -->\nold\n<!-- results: end -->\ntail\n")
    for _ in range(2):
        publish(page, "results", "| new |\n")
        assert page.read_text() == "head\n<!-- results: begin -->\n\n| new |\n\n<!-- results: end -->\ntail\n"
    with pytest.raises(ValueError, match="soak: begin"):
        publish(page, "soak", "")


def test_parts_choose_loads() -> None:
    assert {load.prompt for load, _, _ in Plan(2, ("long",)).loads()} == {1500}
    assert [load for load, _, _ in Plan(2, ("eight", "lens"), quick=True).loads()] == [EIGHT]


def test_rounds_are_shared_among_starts() -> None:
    plan = Plan(5, starts=2)
    assert [list(plan.share(5, start)) for start in range(2)] == [[0, 1], [2, 3, 4]]


def test_slope_is_of_the_second_half() -> None:
    moments = [Moment(n * 100, {"worker": 50.0 if n < 10 else 100.0 + n}, {}, 0) for n in range(20)]
    assert slope(moments, "worker") == pytest.approx(10.0)

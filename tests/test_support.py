"""The table of features says nothing by assumption: its tests are there, its words are in the code, the page is it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tracer.support import FEATURES, Feature, markdown, summary

ROOT = Path(__file__).parents[1]
SOURCES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tracer").rglob("*.py")}
ASKED = (
    "model families", "tensor parallel", "data parallel", "pipeline parallel", "chunked prefill", "prefix caching",
    "preemption", "speculative decoding, n-gram", "speculative decoding, draft model", "structured output",
    "penalties, logit bias", "LoRA", "n > 1", "beam search", "logprobs, prompt logprobs", "fp8 KV cache",
    "quantised weights", "sliding windows, hybrid KV groups", "KV sharing", "MLA", "Mamba, linear layers",
    "mixture of experts", "multimodal inputs", "encoder-decoder", "pooling models", "async scheduling", "sleep mode",
    "several API servers", "disaggregated prefill, KV connectors",
)  # fmt: skip


def name(feature: Feature) -> str:
    return feature.name


def test_every_feature_has_one_row() -> None:
    names = [feature.name for feature in FEATURES]
    assert set(ASKED) <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("feature", FEATURES, ids=name)
def test_a_row_is_backed_by_tests_or_words(feature: Feature) -> None:
    for test in feature.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
        if feature.state in ("yes", "part"):
            assert file.startswith("tests/integration/") or len(feature.tests) > 1, f"{test} is not on the real engine"
    for words in feature.refusals:
        found = [path for path, text in SOURCES.items() if words in text and path.name != "support.py"]
        assert found, f"nobody says {words!r}"
    assert {"yes": feature.tests, "part": feature.tests, "refused": feature.refusals}.get(feature.state, True)


def test_the_page_is_the_table() -> None:
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert markdown() in page, f"docs/support.md is old; its table is now:\n{markdown()}"


def test_the_summary_counts_every_row() -> None:
    assert sum(int(part.split()[0]) for part in summary().split(", ")) == len(FEATURES)

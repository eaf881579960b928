from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tracer import schema
from tracer.member_layouts import MEMBER_ARRAYS

PAGE = Path(__file__).parents[1] / "docs" / "store-format.md"
GOLDEN = Path(__file__).parent / "data" / f"golden-v{schema.VERSION}"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_examples_run_on_the_golden_capture(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(GOLDEN, tmp_path / "captures")
    monkeypatch.chdir(tmp_path)
    *body, last = code.strip().rsplit("\n", 1)
    names: dict[str, object] = {}
    exec("\n".join(body), names)
    if not last.startswith(("text =", "    ")):
        value = np.asarray(eval(last, names))
        assert np.isfinite(value.astype(float)).all()
        assert value.size in {8, 6, 7, 16}


def test_every_array_and_step_number_is_described() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in (*schema.STEP_NUMBERS, *schema.FEATURES, schema.LOGITS, schema.LOGITS_TOPK, schema.LOGITS_TOPK_ID,
                 schema.ATTENTION, schema.ATTENTION_PREFILL, schema.ATTENTION_SUMMARY, schema.QUERY, schema.KEY,
                 schema.QUERY_PROMPT, schema.KEY_PROMPT, *MEMBER_ARRAYS):  # fmt: skip
        assert f"`{name}`" in text, name
    assert f"version {schema.VERSION}" in text

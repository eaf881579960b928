"""Whose heads are whose, and what several workers' facts say together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.exporters.synthetic import engine
from tracer.capture_request import check_capture, parse_capture
from tracer.errors import CaptureRequestError, CaptureUnavailableError
from tracer.ranks import Part, divide, key_heads, owner, query_heads, whole_engines
from tracer.records import CaptureSpec, EngineInfo


def ranks(count: int = 2, **changes: object) -> list[EngineInfo]:
    """What the workers of an engine with 4 heads say of themselves."""
    return [replace(engine(heads=4, rank=rank, world_size=count), **changes) for rank in range(count)]  # type: ignore[arg-type]


def spec(text: str) -> CaptureSpec:
    found = parse_capture(text)
    assert found is not None
    return found


@pytest.mark.parametrize(("heads", "keys", "count"), [(8, 8, 2), (8, 2, 2), (8, 4, 4), (8, 2, 4), (8, 1, 8)])
def test_every_head_has_one_owner_and_finds_its_keys_there(heads: int, keys: int, count: int) -> None:
    owned = [list(query_heads(heads, count, rank)) for rank in range(count)]
    assert [head for mine in owned for head in mine] == list(range(heads))
    for rank in range(count):
        held = key_heads(keys, count, rank)
        assert {head * keys // heads for head in owned[rank]} == set(held), "the store's rule: h // (H / G)"
        assert all(owner(heads, count)(head) == rank for head in owned[rank])
    storing = [owner(keys, count)(key) for key in range(keys)]
    assert all(key in key_heads(keys, count, rank) for key, rank in enumerate(storing))


def test_parts_are_as_large_as_the_ranks_shares_allow() -> None:
    four = owner(8, 2)
    assert divide(range(8), four) == (Part(0, (0, 1, 2, 3)), Part(1, (4, 5, 6, 7)))
    assert divide((0, 1, 3, 7), four) == (Part(0, (0,)), Part(0, (1,)), Part(0, (3,)), Part(1, (7,)))
    assert divide((0, 1, 2, 3, 6, 7), four) == (Part(0, (0, 1)), Part(0, (2, 3)), Part(1, (6, 7)))
    assert divide((5, 6), four) == (Part(1, (5, 6)),)


def test_an_engine_is_what_all_its_ranks_can() -> None:
    first, second = ranks()
    halves = [
        replace(info, layers=tuple(replace(layer, alibi=True, alibi_slopes=slopes) for layer in info.layers))
        for info, slopes in ((first, (0.5, 0.25)), (second, (0.125, 0.0625)))
    ]
    [whole] = whole_engines(reversed(halves))
    assert whole.layers[2].alibi_slopes == (0.5, 0.25, 0.125, 0.0625)
    assert (whole.rank, whole.num_heads, whole.attention_unsupported) == (0, 4, None)
    broken = replace(second, layers=engine(heads=4, refused=[1]).layers)
    [whole] = whole_engines([first, broken])
    assert [layer.unsupported for layer in whole.layers] == [None, "MLA (rank 1 of 2)", None]
    assert whole_engines([engine(refused=[1])]) == (engine(refused=[1]),)


def test_replicas_are_engines_of_their_own_and_old_ranks_do_not_count() -> None:
    mine, other = ranks(), ranks(replica=1)
    assert [(whole.replica, whole.world_size) for whole in whole_engines([*other, *mine])] == [(0, 2), (1, 2)]
    alone = engine(heads=4)
    assert whole_engines([alone, mine[1]]) == (alone,), "the earlier engine of this process had two ranks"


def test_attention_needs_every_rank_and_logits_the_first() -> None:
    first, second = ranks()
    failed = replace(second, layers=(), logits_unsupported="unavailable: no", attention_unsupported="unavailable: no")
    check_capture(spec("logits"), [first, failed])
    with pytest.raises(CaptureUnavailableError, match="on this server: rank 1 of 2: no"):
        check_capture(spec("attention"), [first, failed])
    with pytest.raises(CaptureUnavailableError, match="rank 1 of 2 has not reported"):
        check_capture(spec("qk"), [first])
    check_capture(spec("logits"), [first])
    with pytest.raises(CaptureUnavailableError, match="rank 0 of 2 has not reported"):
        check_capture(spec("logits"), [second])


def test_heads_are_checked_against_the_whole_model() -> None:
    check_capture(spec('attention;heads="0-3"'), ranks())
    with pytest.raises(CaptureRequestError, match="this model has heads 0-3"):
        check_capture(spec('attention;heads="4"'), ranks())

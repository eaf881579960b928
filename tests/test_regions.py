"""Messages found in the prompt by their text."""

from __future__ import annotations

from itertools import pairwise

from tracer.records import Region
from tracer.regions import find_regions


def split(text: str, *cuts: int) -> list[bytes]:
    data = text.encode()
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def test_messages_and_template_cover_the_prompt() -> None:
    tokens = [b"<s>", b"sys", b"\n", b"Be ", b"kind", b"</s>", b"<s>", b"user\n", b"Hi", b"</s>"]
    assert find_regions([("system", "Be kind"), ("user", "Hi")], tokens) == (
        Region("template", 0, 3),
        Region("system", 3, 5),
        Region("template", 5, 8),
        Region("user", 8, 9),
        Region("template", 9, 10),
    )


def test_a_token_across_a_border_belongs_to_the_message() -> None:
    assert find_regions([("user", "abc")], split("[abc]", 3)) == (Region("user", 0, 2),)


def test_equal_messages_are_taken_in_order() -> None:
    tokens = [b"a", b"|", b"a", b"|"]
    found = find_regions([("user", "a"), ("assistant", "a")], tokens)
    assert [(r.role, r.start, r.end) for r in found if r.role != "template"] == [("user", 0, 1), ("assistant", 2, 3)]


def test_a_message_that_the_template_changed_stays_template() -> None:
    assert find_regions([("tool", "{json}")], [b"a", b"b"]) == (Region("template", 0, 2),)


def test_empty_prompt_and_empty_messages() -> None:
    assert find_regions([("user", "x")], []) == ()
    assert find_regions([("user", "  ")], [b"x"]) == (Region("template", 0, 1),)

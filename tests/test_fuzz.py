"""Whatever a client writes into headers and bodies: it is understood, or refused in our words, or left to vLLM."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, TypeVar

from hypothesis import example, given
from hypothesis import strategies as st

from tracer.baggage import MAX_BAGGAGE, baggage_member
from tracer.capture_request import format_capture, parse_capture
from tracer.clients import find_client, parse_networks
from tracer.context import TEXT_KEY, parse_traceparent
from tracer.errors import CaptureRequestError
from tracer.request_body import RequestBody
from tracer.schema import is_span_id, is_trace_id
from tracer.step_spans import MOST, parse_step_spans

HEADER = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=300)
"""A header's value as ASGI has it: any bytes, read as Latin-1."""
WORDS = st.sampled_from(
    [
        "logits",
        "attention",
        "qk",
        "router",
        "hidden_states",
        "prompt_logits",
        "summary",
        ";top=",
        ";rows=",
        ";dtype=",
        ";layers=",
        ";heads=",
        "=(",
        ")",
        "=",
        "?0",
        "?1",
        ", ",
        " ",
        "all",
        "f16",
        "f32",
        "0-3",
        "1",
        "-1",
        "99999999999999999999",
        "1.5",
        "1e9",
        '"',
        "*",
        ":",
        ":YQ==:",
        "@1",
        "%00",
        "\t",
        "ÿ",
        "\x00",
    ]
)
CAPTURES = st.one_of(HEADER, st.lists(WORDS, max_size=12).map("".join))
JSON: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                "vllm_xargs extra_args messages input prompt n content text role sampling_params use_beam_search "
                f"prompt_embeds system conversation id output {TEXT_KEY}".split()
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=25,
)
Result = TypeVar("Result")
PROXY = parse_networks("10.0.0.0/8, ::1")


def taken(parse: Callable[[], Result]) -> Result | None:
    """What the text means; None if it was refused, in few words however long it was."""
    try:
        return parse()
    except CaptureRequestError as error:
        if len(str(error)) > 2000:
            raise RuntimeError("an answer is not as long as somebody wants") from error
        return None


@given(CAPTURES)
@example("logits;top=" + "9" * 400)
@example("(" * 4096)
def test_a_capture_header_is_parsed_or_refused(text: str) -> None:
    spec = taken(lambda: parse_capture(text))
    assert spec is None or parse_capture(format_capture(spec)) == spec


@given(st.one_of(HEADER, st.from_regex(r"\s*(every:)?[0-9]{0,9}\s*", fullmatch=True)))
def test_trace_steps_are_a_number_or_refused(text: str) -> None:
    number = taken(lambda: parse_step_spans(text))
    assert number is None or 0 <= number <= MOST


@given(
    st.one_of(HEADER, st.from_regex(r"[0-9a-fA-F]{2}-[0-9a-fA-F]{32}-[0-9a-fA-F]{16}-[0-9a-f]{2}.?", fullmatch=True))
)
@example(f"00-{'1' * 32}-{'1' * 16}-01\n")
@example(f"00-{chr(0x661) * 32}-{'1' * 16}-01")
def test_a_traceparent_gives_ids_in_hexadecimal_digits_or_nothing(text: str) -> None:
    found = parse_traceparent(text)
    if found is not None:
        assert is_trace_id(found.trace_id)
        assert is_span_id(found.span_id)
        assert int(found.trace_id, 16)
        assert int(found.span_id, 16)


@given(st.one_of(HEADER, HEADER.map(lambda text: f"session.id={text}")))
def test_baggage_gives_a_text_or_nothing(text: str) -> None:
    found = baggage_member(text, "session.id")
    assert found is None or len(found) <= MAX_BAGGAGE


HOPS = st.one_of(
    HEADER, st.ip_addresses().map(str), st.sampled_from(["10.1.1.1", "[::1]:80", "::ffff:10.0.0.1", "1.2.3.4:5"])
)


@given(st.lists(HOPS, max_size=40), st.sampled_from(["10.0.0.1", "::1", "203.0.113.9", "", "unix", "fe80::1%eth0"]))
def test_forwarded_addresses_are_an_address_or_the_peer(hops: list[str], peer: str) -> None:
    headers = [(b"X-Forwarded-For", ", ".join(hops).encode("latin-1", "replace"))]
    client = find_client({"client": (peer, 1), "server": ("127.0.0.1", 8000), "headers": headers}, PROXY)
    if client.address != peer:
        assert str(ip_address(client.address)) == client.address
        assert peer in ("10.0.0.1", "::1"), "only a trusted proxy speaks for others"
    assert client.remote or peer in ("10.0.0.1", "::1")


def looked_at(data: bytes | None) -> None:
    body = RequestBody(data)
    with contextlib.suppress(CaptureRequestError):
        text = body.text()
        assert text is None or isinstance(text, str)
    with contextlib.suppress(CaptureRequestError):
        body.check()
    assert isinstance(body.conversation(), str)
    assert isinstance(body.generations(), int)
    for role, text in body.messages():
        assert isinstance(role, str)
        assert isinstance(text, str)


@given(JSON)
@example({"n": 10**400})
@example({"n": float("inf")})
@example({"n": "2", "prompt": [[]], "messages": {"role": 1}})
def test_a_body_of_any_shape_is_looked_at_without_an_error(value: Any) -> None:
    looked_at(json.dumps(value).encode())


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"vllm_xargs": ' * 20_000)
@example(b'{"n": ' + b"9" * 10_000 + b"}")
@example(b'{"messages": [{"role": "\\ud800", "content": "\\udfff"}]}')
@example(b"\xff\xfe{\x00}\x00")
def test_a_body_that_is_no_json_is_left_to_vllm(data: bytes) -> None:
    looked_at(data)

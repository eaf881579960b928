"""Reading over HTTP: what is served, to whom, and what is not. The app runs in-process behind the real routes."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import zarr
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from exporters.zarr_writer import ZarrExporter
from tests.exporters.synthetic import Synthetic
from tracer.authorise import Gate
from tracer.config import Settings
from tracer.records import AttentionSpec, CaptureSpec, GenerationStart, LogitsSpec
from tracer.server.access import Readers
from tracer.server.app import make_app

FULL = CaptureSpec(LogitsSpec(), AttentionSpec())
LOCAL, FAR = ("127.0.0.1", 5000), ("203.0.113.9", 5000)
KEYS = (
    '[alice]\nkey = "a"\nreads = "own"\n[auditor]\nkey = "all"\nmay = ["read"]\n[writer]\nkey = "w"\nmay = ["capture"]'
)


def write(writer: ZarrExporter, work: Synthetic, **changes: Any) -> None:
    for record, payload in work.records():
        writer.export(replace(record, **changes) if isinstance(record, GenerationStart) else record, payload)


class Site:
    """A store with one capture, of the key `alice`, and one that nobody's key made."""

    def __init__(self, root: Path, **more: Any) -> None:
        self.store = root / "store"
        self.mine = Synthetic(steps=3, prompt=5, vocab=16, layers=2, heads=2, spec=FULL, span_id="a" * 16)
        other: dict[str, Any] = {"trace_id": "e" * 32, "span_id": "b" * 16}
        self.other = Synthetic(steps=3, prompt=5, vocab=16, layers=2, heads=2, spec=FULL, **other)
        writer = ZarrExporter(Settings(store=str(self.store)))
        for work, owner in ((self.mine, "alice"), (self.other, "")):
            write(writer, work, owner=owner)
        assert writer.shutdown(10)
        keys = root / "keys.toml"
        keys.touch(mode=0o600)
        keys.write_text(KEYS)
        self.app = make_app(Settings(store=str(self.store), keys_file=str(keys), **more))

    def path(self, kind: str, work: Synthetic, rest: str = "") -> str:
        return f"/tensorspan/{kind}/{work.trace_id}/{work.span_id}{rest}"

    def get(self, path: str, client: tuple[str, int] = LOCAL, method: str = "GET", **more: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
                return await http.request(method, path, **more)

        return asyncio.run(call())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def test_a_generation_and_a_step_open_as_page_and_as_json(site: Site) -> None:
    facts = site.get(site.path("open", site.mine)).json()
    assert (facts["complete"], facts["steps"], facts["step"]) == (True, 3, None)
    assert facts["arrays"]["logits"] == {"shape": [3, 16], "dims": ["step", "vocab"], "dtype": "float16"}
    step_span = site.mine.step_span(1)
    step = site.get(f"/tensorspan/open/{site.mine.trace_id}/{step_span}").json()["step"]
    assert step["index"] == 1
    assert len(step["alternatives"]) == 10
    page = site.get(site.path("open", site.mine), headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    assert "open_capture(" in page.text
    assert "script-src" not in page.headers["content-security-policy"]
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert (page.headers["cache-control"], page.headers["referrer-policy"]) == ("private, no-store", "no-referrer")


def test_the_files_are_a_zarr_group_for_any_reader(site: Site) -> None:
    """What plain zarr reads from the bytes that were served equals what it reads from the directory."""
    path = site.store / site.mine.trace_id / site.mine.span_id
    served: dict[str, bytes] = {}
    for file in path.rglob("*"):
        if file.is_file():
            answer = site.get(site.path("store", site.mine, f"/{file.relative_to(path)}"))
            assert answer.status_code == 200, file
            served[str(file.relative_to(path))] = answer.content
    buffers = {
        name: zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(data) for name, data in served.items()
    }
    group = zarr.open_group(zarr.storage.MemoryStore(buffers), mode="r")
    logits = group["logits"]
    assert isinstance(logits, zarr.Array)
    stored = zarr.open_group(path, mode="r")["logits"]
    assert isinstance(stored, zarr.Array)
    np.testing.assert_array_equal(np.asarray(logits[:]), np.asarray(stored[:]))


def test_ranges_heads_and_revalidation(site: Site) -> None:
    name = site.path("store", site.mine, "/zarr.json")
    whole = site.get(name)
    part = site.get(name, headers={"range": "bytes=2-9"})
    assert (part.status_code, part.content) == (206, whole.content[2:10])
    assert json.load(io.BytesIO(whole.content))["zarr_format"] == 3
    head = site.get(name, method="HEAD")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(whole.content)))
    assert whole.headers["cache-control"] == "private, no-cache"
    assert site.get(name, method="PUT").status_code == 405
    assert site.get(name, method="DELETE").status_code == 405


@pytest.mark.parametrize(
    "rest",
    [
        "", "/", "/logits", "/..", "/../../store.json", "/%2e%2e/%2e%2e/keys.toml", "/..%2f..%2fkeys.toml",
        "//zarr.json", "/zarr.json%00", "/.hidden", "/a" * 100, "/\\..\\zarr.json", "/~root", "/secret",
        "/inside/zarr.json",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_a_capture(rest: str, site: Site) -> None:
    group = site.store / site.mine.trace_id / site.mine.span_id
    if not (group / "secret").is_symlink():
        (group / "secret").symlink_to(site.store.parent / "keys.toml")
        (group / "inside").symlink_to(site.store / site.other.trace_id / site.other.span_id)
    answer = site.get(site.path("store", site.mine, rest))
    assert answer.status_code in (400, 404), answer.text
    assert "alice" not in answer.text


@pytest.mark.parametrize("ids", [("A" * 32, "a" * 16), ("a" * 31, "a" * 16), ("a" * 32, "../" * 5 + "a"), ("*", "*")])
@pytest.mark.parametrize("kind", ["open", "store"])
def test_ids_are_hexadecimal_and_nothing_else(kind: str, ids: tuple[str, str], site: Site) -> None:
    answer = site.get(f"/tensorspan/{kind}/{ids[0]}/{ids[1]}" + ("/zarr.json" if kind == "store" else ""))
    assert answer.status_code in (400, 404)
    assert str(site.store) not in answer.text


def test_a_capture_behind_a_symbolic_link_is_not_served(site: Site, tmp_path: Path) -> None:
    outside = Site(tmp_path)
    link = site.store / ("c" * 32)
    link.symlink_to(outside.store / outside.mine.trace_id)
    for kind, rest in (("open", ""), ("store", "/zarr.json")):
        assert site.get(f"/tensorspan/{kind}/{'c' * 32}/{'a' * 16}{rest}").status_code == 404
    link.unlink()


# Who may read


def test_clients_on_other_hosts_need_a_reading_key(site: Site) -> None:
    path = site.path("open", site.other)
    refused = site.get(path, FAR)
    assert (refused.status_code, refused.headers["content-type"]) == (401, "application/problem+json")
    assert "Trace-Read-Key" in refused.json()["detail"]
    for key, status in (("all", 200), ("w", 401), ("wrong", 401), ("", 401)):
        assert site.get(path, FAR, headers={"Trace-Read-Key": key}).status_code == status
    assert site.get(path, headers={"Trace-Read-Key": "wrong"}).status_code == 401, "a wrong key is none, also here"
    assert site.get(path, headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 401
    assert site.get(path, headers=[("Trace-Read-Key", "all"), ("Trace-Read-Key", "all")]).status_code == 401


def test_another_tenants_capture_does_not_exist(site: Site) -> None:
    mine = {"Trace-Read-Key": "a"}
    assert site.get(site.path("open", site.mine), FAR, headers=mine).status_code == 200
    hidden = site.get(site.path("open", site.other), FAR, headers=mine)
    missing = site.get(f"/tensorspan/open/{site.other.trace_id}/{'f' * 16}", FAR, headers=mine)
    assert (hidden.status_code, hidden.content) == (404, missing.content)
    assert site.get(site.path("store", site.other, "/zarr.json"), FAR, headers=mine).content == missing.content
    step = site.get(f"/tensorspan/open/{site.other.trace_id}/{site.other.step_span(1)}", FAR, headers=mine)
    assert step.content == missing.content
    listed = site.get("/tensorspan/captures", FAR, headers=mine).json()["captures"]
    assert [entry["span_id"] for entry in listed] == [site.mine.span_id]
    everything = site.get("/tensorspan/captures", FAR, headers={"Trace-Read-Key": "all"}).json()["captures"]
    assert {entry["span_id"] for entry in everything} >= {site.mine.span_id, site.other.span_id}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", ""])
def test_a_local_browser_with_a_rebound_name_is_not_local(host: str, site: Site) -> None:
    assert site.get(site.path("open", site.other), headers={"Host": host}).status_code == 401


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "app.localhost"])
def test_local_names(host: str, site: Site) -> None:
    assert site.get(site.path("open", site.other), headers={"Host": host}).status_code == 200


def test_a_browser_logs_in_and_the_key_is_in_no_address(site: Site) -> None:
    path = site.path("open", site.other)
    page = site.get(path, FAR, headers={"accept": "text/html"})
    assert (page.status_code, 'name="key"' in page.text) == (401, True)
    assert site.get("/tensorspan/login", FAR, "POST", data={"key": "wrong"}).status_code == 401
    assert site.get("/tensorspan/login", FAR, "POST", content=b"key=" + b"a" * 10_000).status_code == 401
    answer = site.get("/tensorspan/login", FAR, "POST", data={"key": "all"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/tensorspan/captures")
    cookie = answer.headers["set-cookie"]
    assert all(word in cookie.lower() for word in ("httponly", "samesite=lax", "path=/tensorspan"))
    assert "all" not in cookie.partition(";")[0].partition("=")[2].split("-")
    session = {"cookie": cookie.partition(";")[0]}
    assert site.get(path, FAR, headers=session).status_code == 200
    assert site.get(path, FAR, headers={"cookie": "tensorspan_session=guess"}).status_code == 401


def test_a_session_ends_with_its_time_and_with_its_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(KEYS)
    now = [0.0]
    readers = Readers(Gate.of(Settings(keys_file=str(keys))), lambda: now[0])

    def scope(token: str) -> dict[str, Any]:
        return {"client": FAR, "server": ("h", 80), "headers": [(b"cookie", f"tensorspan_session={token}".encode())]}

    first, second = readers.log_in("all"), readers.log_in("a")
    assert readers.admit(scope(second)).may_open("alice")
    assert not readers.admit(scope(second)).may_open("bob")
    keys.write_text(KEYS.replace('"all"', '"changed"'))
    with pytest.raises(Exception, match="without a key"):
        readers.admit(scope(first))
    now[0] = 13 * 3600
    with pytest.raises(Exception, match="without a key"):
        readers.admit(scope(second))


def test_other_origins_read_only_where_it_was_allowed(site: Site, tmp_path: Path) -> None:
    asked = {"origin": "https://jaeger.example"}
    assert "access-control-allow-origin" not in site.get(site.path("open", site.mine), headers=asked).headers
    open_site = Site(tmp_path, view_origins="https://jaeger.example")
    answer = open_site.get(open_site.path("open", open_site.mine), headers=asked)
    assert answer.headers["access-control-allow-origin"] == "https://jaeger.example"
    assert "access-control-allow-credentials" not in answer.headers


def test_markup_in_a_capture_is_text_on_the_page(site: Site) -> None:
    work = Synthetic(steps=2, prompt=3, vocab=16, layers=2, heads=2, spec=FULL, span_id="d" * 16)
    writer = ZarrExporter(Settings(store=str(site.store)))
    write(writer, work, model="<script>alert(1)</script>")
    assert writer.shutdown(10)
    page = site.get(site.path("open", work), headers={"accept": "text/html"}).text
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@given(data=strategies.data())
@hypothesis_settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_routes_answer_as_they_describe_themselves(site: Site, data: strategies.DataObject) -> None:
    """Whatever Schemathesis sends: no 5xx, and only statuses and media types that the OpenAPI document names."""
    schema = schemathesis.openapi.from_asgi("/tensorspan/openapi.json", site.app)
    found: list[Any] = list(schema.get_all_operations())
    operations = [each.ok() for each in found]
    case = data.draw(data.draw(strategies.sampled_from(operations)).as_strategy())
    case.call_and_validate(headers={"Trace-Read-Key": "all"})

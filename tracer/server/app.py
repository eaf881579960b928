"""The routes under `/tensorspan/`: open a reference, read a capture's files, log in. Nothing here writes to a store.

Every answer that shows anything of a capture is private to its reader: never stored by caches, never framed by other
sites, and its address is not passed on (`Referrer-Policy`). What a reader may not see does not exist for him.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tracer import config
from tracer.authorise import Gate
from tracer.config import Settings
from tracer.errors import CaptureNotFoundError, TensorspanError
from tracer.reader import Capture, find_captures, open_capture
from tracer.server.access import COOKIE, SESSION_SECONDS, ReadDeniedError, Readers
from tracer.server.files import capture_directory, capture_file
from tracer.server.page import CONTENT_SECURITY, capture_facts, capture_page, login_page, message_page

__all__ = ["PREFIX", "make_app"]

PREFIX: Final = "/tensorspan"
MAX_LIST: Final = 1000
MAX_FORM: Final = 4096
SECURITY: Final = {
    "cache-control": "private, no-store",
    "content-security-policy": CONTENT_SECURITY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
Trace = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="trace ID, 32 hexadecimal digits")]
Span = Annotated[str, InPath(pattern="^[0-9a-f]{16}$", description="span ID, 16 hexadecimal digits")]
File = Annotated[str, InPath(max_length=800, description="path of a file within the capture's Zarr group")]


def _content(*kinds: str) -> dict[str, Any]:
    return {"content": {kind: {} for kind in kinds}}


_FILES: Final = ("application/octet-stream", "application/json")
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": text, **_content("application/problem+json", "text/html")}
    for status, text in (
        (400, "malformed"), (401, "a reading key is needed"), (404, "not there, or not for you"),
        (409, "the capture cannot be read"),
    )
}  # fmt: skip


def _shown(*kinds: str, partial: Sequence[str] = ()) -> dict[int | str, dict[str, Any]]:
    """The answers of a route, for its description."""
    out = {200: {"description": "shown", **_content(*kinds)}, **_REFUSALS}
    return out | ({206: {"description": "a range", **_content(*partial)}} if partial else {})


class _Captures:
    """The store, as one reader sees it."""

    def __init__(self, store: str, readers: Readers) -> None:
        self.store = store
        self._readers = readers

    def open(self, request: Request, trace_id: str, span_id: str) -> Capture:
        """By generation or step; CaptureNotFoundError also for what this reader may not see."""
        reader = self._readers.admit(request.scope)
        capture = open_capture(self.store, f"{trace_id}/{span_id}")
        if not (
            capture.trace_id == trace_id
            and reader.may_open(str(capture.attrs.get("owner", "")))
            and (config.is_remote(self.store) or self._is_inside(capture))
        ):
            raise CaptureNotFoundError(f"no capture {trace_id}/{span_id} in this store")
        return capture

    def _is_inside(self, capture: Capture) -> bool:
        """True for a directory of the store itself, under the IDs that the capture says it has."""
        root = config.local_path(self.store)
        return Path(capture.location).resolve() == capture_directory(root, capture.trace_id, capture.span_id)

    def listed(self, request: Request, limit: int) -> list[dict[str, Any]]:
        """The newest captures that this reader may see."""
        reader = self._readers.admit(request.scope)
        out: list[dict[str, Any]] = []
        for entry in find_captures(self.store):
            if len(out) < limit and reader.may_open(entry.owner):
                names = ("trace_id", "span_id", "model", "status", "complete", "prompt_tokens", "output_tokens")
                out.append({name: getattr(entry, name) for name in names} | {"start_ns": str(entry.start_ns)})
        return out

    def file(self, request: Request, trace_id: str, span_id: str, name: str) -> Path:
        """A file of a local store's capture."""
        if config.is_remote(self.store):
            self._readers.admit(request.scope)
            raise CaptureNotFoundError(f"this store is a bucket, {self.store}: its files are read there")
        self.open(request, trace_id, span_id)
        return capture_file(config.local_path(self.store), trace_id, span_id, name)


def make_app(settings: Settings) -> FastAPI:
    """The application for the store of `settings`; raises SettingsError for keys that cannot be used."""
    readers = Readers(Gate.of(settings))
    app = FastAPI(
        title="tensorspan captures", docs_url=None, redoc_url=None, openapi_url=f"{PREFIX}/openapi.json",
        redirect_slashes=False,
        description="Reading what was captured; docs/access.md says who may.",
    )  # fmt: skip
    _add_problems(app)
    _add_reading(app, _Captures(settings.store, readers))
    _add_login(app, readers)
    origins = [origin.strip() for origin in settings.view_origins.split(",") if origin.strip()]
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "HEAD"],
            allow_headers=["Trace-Read-Key", "Range"], expose_headers=["Content-Range", "ETag"],
        )  # fmt: skip
    return app


def _add_reading(app: FastAPI, captures: _Captures) -> None:
    @app.get(PREFIX + "/captures", responses=_REFUSALS)
    def captures_of_the_store(request: Request, limit: int = 100) -> JSONResponse:
        """The newest captures, newest first."""
        found = captures.listed(request, max(0, min(limit, MAX_LIST)))
        return JSONResponse({"captures": found}, headers=SECURITY)

    @app.get(PREFIX + "/open/{trace_id}/{span_id}", responses=_shown("text/html", "application/json"))
    def open_one(request: Request, trace_id: Trace, span_id: Span) -> Response:
        """What is known about a generation or a step: a page, or JSON for who accepts that and no HTML."""
        capture = captures.open(request, trace_id, span_id)
        path = f"{PREFIX}/store/{capture.trace_id}/{capture.span_id}"
        files = "" if config.is_remote(captures.store) else f"{str(request.base_url).rstrip('/')}{path}"
        facts = capture_facts(capture, files, captures.store)
        if _wants_html(request):
            return HTMLResponse(capture_page(facts), headers=SECURITY)
        return JSONResponse(facts, headers=SECURITY)

    @app.head(PREFIX + "/store/{trace_id}/{span_id}/{name:path}", include_in_schema=False)
    @app.get(PREFIX + "/store/{trace_id}/{span_id}/{name:path}", responses=_shown(*_FILES, partial=_FILES))
    def file_of_a_capture(request: Request, trace_id: Trace, span_id: Span, name: File) -> FileResponse:
        """A file of the capture's Zarr group; ranges and `If-None-Match` as RFC 9110 has them."""
        path = captures.file(request, trace_id, span_id, name)
        kind = "application/json" if path.suffix == ".json" else "application/octet-stream"
        return FileResponse(path, media_type=kind, headers={**SECURITY, "cache-control": "private, no-cache"})


def _add_login(app: FastAPI, readers: Readers) -> None:
    @app.get(PREFIX + "/login", response_class=HTMLResponse)
    def login_form() -> HTMLResponse:
        """A form for a reading key."""
        return HTMLResponse(login_page(), headers=SECURITY)

    @app.post(
        PREFIX + "/login",
        status_code=303,
        responses={303: {"description": "logged in"}, 401: {"description": "no such key", **_content("text/html")}},
    )
    async def login(request: Request) -> Response:
        """Begin a session: the key goes into a cookie for no script to read, and into no address."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_FORM:
                return HTMLResponse(login_page("the form is too long"), 401, SECURITY)
        secret = parse_qs(body.decode("latin-1"), max_num_fields=4, encoding="utf-8").get("key", [""])[0]
        try:
            token = readers.log_in(secret)
        except ReadDeniedError as error:
            return HTMLResponse(login_page(str(error)), 401, SECURITY)
        answer = RedirectResponse(f"{PREFIX}/captures", 303, SECURITY)
        secure = request.url.scheme == "https"
        answer.set_cookie(
            COOKIE, token, int(SESSION_SECONDS), path=PREFIX, httponly=True, samesite="lax", secure=secure
        )
        return answer


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(TensorspanError)
    async def ours(request: Request, error: TensorspanError) -> Response:
        if isinstance(error, ReadDeniedError):
            return _problem(request, 401, "A reading key is needed", str(error))
        if isinstance(error, CaptureNotFoundError):
            # Not its own words: they list what else the store holds.
            return _problem(request, 404, "Not found", "there is no such capture or file, or this key does not see it")
        return _problem(request, 409, "The capture cannot be read", str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        where = ", ".join(str(item["loc"][-1]) for item in error.errors())
        return _problem(request, 400, "Malformed", f"malformed: {where}; IDs are hexadecimal, 32 and 16 digits")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        answer = _problem(request, error.status_code, str(error.detail), str(error.detail))
        answer.headers.update(error.headers or {})
        return answer


def _problem(request: Request, status: int, title: str, detail: str) -> Response:
    """An RFC 9457 problem, or a page for a browser."""
    if _wants_html(request):
        return HTMLResponse(login_page(detail) if status == 401 else message_page(title, detail), status, SECURITY)
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(content, status, SECURITY, "application/problem+json")


def _wants_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")

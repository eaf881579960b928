"""Stores in buckets: one connection per bucket, few requests, errors that say what to do.

Keys are the same paths as in a directory (docs/store-format.md), and beside the captures the exporter leaves one empty
object `index/<generation span ID>/<trace ID>` for each, so that a generation is found by one LIST. The library reads
credentials, endpoint and region from the standard variables itself (docs/remote.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from tracer import config
from tracer.errors import MissingExtraError, SettingsError, StoreError

if TYPE_CHECKING:
    import zarr

__all__ = ["Place", "children", "explain", "index_key", "indexed_traces", "locate", "open_group", "probe", "read"]

SCHEMES: Final = ("s3", "gs", "az")
"""Google's and Azure's buckets come with the library; the tests run against S3."""
PARALLEL: Final = 32
"""Requests in flight of one listing or search."""
REFUSALS: Final = ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
NO_BUCKET: Final = "NoSuchBucket"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Place(NamedTuple):
    """A key, or a prefix of keys, in a bucket."""

    bucket: Any
    """`obstore.store.ObjectStore` of the whole bucket."""
    key: str
    """Without slashes at its ends."""

    def join(self, path: str) -> str:
        """The key of `path` below this place."""
        return f"{self.key}/{path}" if self.key else path


def locate(url: str, *, writing: bool = False) -> Place:
    """The bucket and key of a URL; nothing is asked of the network.

    Raises SettingsError for a URL that names no bucket, MissingExtraError without the extra `s3`.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.netloc:
        known = ", ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES)
        raise SettingsError(f"{url} is not a store: it may be a directory, {known}")
    bucket = _connect(f"{parts.scheme}://{parts.netloc}", config.bucket_variables(), writing)
    return Place(bucket, parts.path.strip("/"))


@lru_cache(maxsize=8)
def _connect(root: str, variables: tuple[tuple[str, str], ...], writing: bool) -> Any:
    """One per bucket, so that its connections are used again; other variables make another."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise MissingExtraError("s3", "obstore") from error
    known = dict(variables)
    options: dict[str, Any] = {"timeout": timedelta(seconds=120 if writing else 30)}
    endpoint = known.get("AWS_ENDPOINT_URL_S3") or known.get("AWS_ENDPOINT_URL") or known.get("AWS_ENDPOINT", "")
    if endpoint.startswith("http://") and "AWS_ALLOW_HTTP" not in known:
        options["allow_http"] = True  # Whoever wrote http:// there has said so already.
    backoff: Any = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2}
    retry: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=20), "backoff": backoff}
    return from_url(root, client_options=options, retry_config=retry)  # type: ignore[call-overload]


def open_group(url: str) -> zarr.Group:
    """The Zarr group at `url`, read only: one request.

    Raises FileNotFoundError if there is none, StoreError if the bucket cannot be read.
    """
    import zarr
    from zarr.storage import ObjectStore

    place = locate(url)
    store = ObjectStore(place.bucket, read_only=True)
    return _asking(url, lambda: zarr.open_group(store, path=place.key, mode="r", zarr_format=3))


def read(urls: Sequence[str]) -> list[bytes | None]:
    """The objects' bytes, None for one that is not there; StoreError if the bucket cannot be read."""
    return _together(_read, urls)


def children(urls: Sequence[str]) -> list[list[str]]:
    """The names one level below each prefix, sorted; StoreError if the bucket cannot be read."""
    return _together(_children, urls)


def index_key(span_id: str, trace_id: str) -> str:
    """Key, below the store's root, of the object that says in which trace a generation is."""
    return f"index/{span_id}/{trace_id}"


def indexed_traces(root: str, span_id: str) -> list[str]:
    """Traces that hold the generation `span_id`, as the index says: one LIST."""
    place = locate(root)
    prefix = place.join(index_key(span_id, ""))
    found = _asking(root, lambda: [item["path"] for page in place.bucket.list(prefix=prefix) for item in page])
    return sorted(key.rpartition("/")[2] for key in found)


def probe(url: str) -> str | None:
    """Why the bucket cannot be listed, with the repair; None if it can. Raises what `locate` raises."""
    place = locate(url)
    try:
        list(islice(place.bucket.list(prefix=place.key, chunk_size=1), 1))
    except Exception as error:  # noqa: BLE001 - the library's errors have no common base but this
        return explain(error)
    return None


def explain(error: BaseException) -> str:
    """What went wrong with a bucket, in one line, and the repair."""
    text = " ".join(str(error).split("\n\n", maxsplit=1)[0].split())
    answer = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text)
    code = answer[1] if answer else ""
    what = f"{code}: {answer[2]}" if answer else text.rpartition(" - ")[2] or type(error).__name__
    if code in REFUSALS or "403 Forbidden" in text or "401 Unauthorized" in text or "Missing " in text:
        if "169.254.169.254" in text or "Missing " in text:
            what = "no credentials"
        return f"{what}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    if code == NO_BUCKET:
        return f"{what}; create the bucket"
    return f"{what}; check AWS_ENDPOINT_URL, AWS_REGION and the network"


def _read(url: str) -> bytes | None:
    place = locate(url)
    try:
        return _asking(url, lambda: bytes(place.bucket.get(place.key).bytes()))
    except FileNotFoundError:
        return None


def _children(url: str) -> list[str]:
    place = locate(url)
    prefix = f"{place.key}/" if place.key else None
    found = _asking(url, lambda: place.bucket.list_with_delimiter(prefix))
    return sorted(key.rstrip("/").rpartition("/")[2] for key in found["common_prefixes"])


def _asking(url: str, ask: Callable[[], Result]) -> Result:
    """The answer; FileNotFoundError stays what it is unless the whole bucket is not there."""
    from obstore.exceptions import BaseError

    try:
        return ask()
    except BaseError as error:
        raise StoreError(f"{url} cannot be read: {explain(error)}") from error
    except FileNotFoundError as error:
        if NO_BUCKET in str(error):
            raise StoreError(f"{url} cannot be read: {explain(error)}") from error
        raise


def _together(ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`ask` of each, many at once: a request is mostly waiting."""
    wanted = list(items)
    if len(wanted) < 2:
        return [ask(item) for item in wanted]
    with ThreadPoolExecutor(min(PARALLEL, len(wanted))) as pool:
        return list(pool.map(ask, wanted))

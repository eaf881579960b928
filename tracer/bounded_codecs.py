"""Zarr arrays of captures whose chunks are looked at before they are decoded.

A chunk's compressed bytes say how large they become, and the codecs believe it: Blosc up to 2 GiB, Zstandard without
end. Here a chunk that would become anything but the array's chunk is refused before memory is taken for it.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, Final

import zarr
from zarr.abc.codec import Codec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.metadata.v3 import ArrayV3Metadata

from tracer.damage import damaged

__all__ = ["MAX_CHUNK_BYTES", "bounded_array"]

MAX_CHUNK_BYTES: Final = 1 << 30
"""A chunk once it is decoded: a hundred times the largest that a writer makes."""
MAX_SHARD_CHUNKS: Final = 1 << 22
"""Entries of a shard's index, 16 bytes each."""
MAX_AXES: Final = 8
KINDS: Final = "iuf"
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


class _Blosc(BloscCodec):
    """Blosc of chunks that say they are as long as they must be."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        _check_size(blosc_size(_head(chunk_bytes)), chunk_spec)
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        _check_size(blosc_size(_head(chunk_bytes)), chunk_spec)
        return await super()._decode_single(chunk_bytes, chunk_spec)


class _Zstd(ZstdCodec):
    """Zstandard, likewise; a frame that does not say its length is none of ours."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        _check_size(zstd_size(_head(chunk_bytes)), chunk_spec)
        return super()._decode_sync(chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        _check_size(zstd_size(_head(chunk_bytes)), chunk_spec)
        return await super()._decode_single(chunk_bytes, chunk_spec)


def bounded_array(location: str, array: zarr.Array[Any] | zarr.Group) -> zarr.Array[Any]:
    """The same array, checked; DamagedError if it is none, or its metadata declare what no capture has."""
    if not isinstance(array, zarr.Array):
        raise damaged(location, "it is a group where an array should be")
    metadata = array.metadata
    if not isinstance(metadata, ArrayV3Metadata):
        raise damaged(location, "it is an array of Zarr version 2")
    _check_shapes(location, array)
    codecs: Any = tuple(_bounded(location, codec) for codec in metadata.codecs)
    metadata = replace(metadata, codecs=codecs)
    inner = array.async_array
    return zarr.Array(zarr.AsyncArray(metadata, inner.store_path, inner.config))


def blosc_size(head: bytes) -> int:
    """Bytes that a Blosc chunk says it becomes; -1 if it is too short to say."""
    return int.from_bytes(head[4:8], "little") if len(head) >= 16 else -1


def zstd_size(head: bytes) -> int:
    """Bytes that a Zstandard frame (RFC 8878, 3.1.1.1) says it becomes; -1 if it does not say."""
    if head[:4] != ZSTD_MAGIC or len(head) < 6:
        return -1
    flags = head[4]
    single = flags >> 5 & 1
    size_bytes = (single, 2, 4, 8)[flags >> 6]
    at = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not size_bytes or len(head) < at + size_bytes:
        return -1
    return int.from_bytes(head[at : at + size_bytes], "little") + (256 if size_bytes == 2 else 0)


def _check_shapes(location: str, array: zarr.Array[Any]) -> None:
    dtype, chunk = array.dtype, array.chunks
    if dtype.kind not in KINDS or dtype.itemsize > 8:
        raise damaged(location, f"no array of a capture has the type {dtype}")
    if not 1 <= array.ndim <= MAX_AXES or len(chunk) != array.ndim:
        raise damaged(location, f"its shape has {array.ndim} axes")
    if prod(chunk) * dtype.itemsize > MAX_CHUNK_BYTES:
        raise damaged(location, f"it declares chunks of {chunk}, more than {MAX_CHUNK_BYTES} bytes")
    if array.ndim == 1 and (prod(array.shape) > max(chunk[0], 1) or array.shards is not None):
        raise damaged(location, "an array with one axis must be one chunk")
    shard = array.shards or chunk
    if prod(outer // max(inner, 1) for outer, inner in zip(shard, chunk, strict=True)) > MAX_SHARD_CHUNKS:
        raise damaged(location, f"it declares shards of {shard}, more than {MAX_SHARD_CHUNKS} chunks")


def _bounded(location: str, codec: Codec, *, inner: bool = False) -> Codec:
    match codec:
        case ShardingCodec() if not inner:
            for known in codec.index_codecs:
                if not isinstance(known, BytesCodec | Crc32cCodec):
                    raise damaged(location, f"no index of a capture has the codec {type(known).__name__}")
            return replace(codec, codecs=tuple(_bounded(location, each, inner=True) for each in codec.codecs))
        case BloscCodec():
            names = ("typesize", "cname", "clevel", "shuffle", "blocksize")
            return _Blosc(**{name: getattr(codec, name) for name in names})
        case ZstdCodec():
            return _Zstd(level=codec.level, checksum=codec.checksum)
        case BytesCodec() | Crc32cCodec():
            return codec
    raise damaged(location, f"no array of a capture has the codec {type(codec).__name__}")


def _head(chunk: Buffer) -> bytes:
    return bytes(chunk[:32].to_bytes())


def _check_size(size: int, spec: ArraySpec) -> None:
    wanted = prod(spec.shape) * spec.dtype.to_native_dtype().itemsize
    if size != wanted:
        raise ValueError(f"a compressed chunk says it becomes {size} bytes, and the array's chunks have {wanted}")

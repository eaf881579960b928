"""Token IDs as bytes, so that a reader of a capture needs no tokenizer and split UTF-8 characters can be rejoined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

__all__ = ["TokenBytes", "token_bytes"]


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins for bytes of byte-level BPE (GPT-2's `bytes_to_unicode`), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET: Final = _byte_alphabet()


class TokenBytes:
    """Bytes of each token of one tokenizer; IDs are looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        decoder = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in decoder
        self._pieces = bool({"ByteFallback", "Metaspace", "Replace"} & decoder)
        self._added = set(getattr(tokenizer, "get_added_vocab", dict)().values())

    def __call__(self, ids: Sequence[int]) -> tuple[bytes, ...]:
        """One byte string per ID; joined they are the UTF-8 text."""
        return tuple(self._one(index) for index in ids)

    def _one(self, index: int) -> bytes:
        if index not in self._known:
            self._known[index] = self._look_up(index)
        return self._known[index]

    def _look_up(self, index: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens([index])[0]
        if piece is None:
            return b""
        if index in self._added:
            return str(piece).encode()
        if self._byte_level and all(char in ALPHABET for char in piece):
            return bytes(ALPHABET[char] for char in piece)
        if self._pieces:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return str(piece).replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([index])).encode()


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """Names of the decoding steps of a fast tokenizer; empty if it does not tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return {step.get("type", "") for step in steps}


def token_bytes(tokenizer: Any, cache: dict[int, TokenBytes]) -> TokenBytes | None:
    """The (cached) byte table of this tokenizer; None without a tokenizer."""
    if tokenizer is None:
        return None
    if id(tokenizer) not in cache:
        # Reads the whole tokenizer: 50 ms for 49,000 tokens, once.
        cache[id(tokenizer)] = TokenBytes(tokenizer)
    return cache[id(tokenizer)]

"""What a generation request's JSON body says about captures: the field, how many sequences, which messages.

The shapes are those of vLLM's OpenAI, Anthropic, Responses and token routes. Nothing here refuses a body for its
shape: that is vLLM's to do, and its words are better.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from tracer.capture_request import beam_search_refusal, embeddings_refusal
from tracer.context import TEXT_KEY
from tracer.errors import CaptureRequestError

__all__ = ["RequestBody"]


class RequestBody:
    """A request body, parsed only if somebody needs to know what is in it."""

    def __init__(self, data: bytes | None) -> None:
        self._data = data or b""
        self._fields: dict[str, Any] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object; empty for anything else, which is vLLM's to refuse."""
        if self._fields is None:
            self._fields = {}
            with suppress(ValueError, RecursionError):
                parsed = json.loads(self._data)
                self._fields = parsed if isinstance(parsed, dict) else {}
        return self._fields

    @property
    def _sampling(self) -> dict[str, Any]:
        """Where `/inference/v1/generate` keeps what the other routes have at the top."""
        params = self.fields.get("sampling_params")
        return params if isinstance(params, dict) else {}

    def text(self) -> str | None:
        """The field `vllm_xargs.trace_capture`; None if it is not there."""
        # JSON may spell the name with escapes; a body with neither needs no parsing.
        if TEXT_KEY.encode() not in self._data and b"\\u" not in self._data:
            return None
        for extra in (self.fields.get("vllm_xargs"), self._sampling.get("extra_args")):
            if isinstance(extra, dict) and extra.get(TEXT_KEY) is not None:
                if not isinstance(extra[TEXT_KEY], str):
                    detail = f"the field {TEXT_KEY} holds {type(extra[TEXT_KEY]).__name__}; allowed: text; example: "
                    raise CaptureRequestError(f'{detail}"logits, attention"', member=TEXT_KEY, allowed="text")
                return str(extra[TEXT_KEY])
        return None

    def check(self) -> None:
        """Raise CaptureRequestError for a request whose generations are not sequences of the engine."""
        if self.fields.get("use_beam_search"):
            raise beam_search_refusal("use_beam_search false with n")
        if self.fields.get("prompt_embeds"):
            raise embeddings_refusal()

    def conversation(self) -> str:
        """ID of the conversation, as the Responses API names it; empty without one."""
        if b'"conversation"' not in self._data:
            return ""
        found = self.fields.get("conversation")
        name = found.get("id") if isinstance(found, dict) else found
        return name if isinstance(name, str) else ""

    def generations(self) -> int:
        """How many sequences the engine will make of this request."""
        n = self.fields.get("n", self._sampling.get("n"))
        return max(self._prompts(), 1) * (n if type(n) is int and n > 0 else 1)

    def _prompts(self) -> int:
        conversations = self.fields.get("messages")
        if isinstance(conversations, list) and conversations and isinstance(conversations[0], list):
            return len(conversations)
        return _prompt_count(self.fields.get("prompt"))

    def messages(self) -> tuple[tuple[str, str], ...]:
        """(role, text) in the prompt's order; empty for several prompts, which share no messages."""
        if self._prompts() > 1:
            return ()
        fields = self.fields
        out = [("system", _text(fields[name])) for name in ("system", "instructions") if fields.get(name)]
        for name in ("messages", "input"):
            items = fields.get(name)
            if isinstance(items, list) and len(items) == 1 and isinstance(items[0], list):
                items = items[0]
            out += [_message(item) for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        for name in ("input", "prompt"):
            if prompt := _only_prompt(fields.get(name)):
                out.append(("user", prompt))
        return tuple((role, text) for role, text in out if text)


def _prompt_count(prompt: Any) -> int:
    """Prompts in a completion's field: a text or a list of token IDs is one, a list of either is several."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        return len(prompt)
    return 1 if prompt else 0


def _only_prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return prompt if isinstance(prompt, str) else ""


def _message(item: dict[str, Any]) -> tuple[str, str]:
    """(role, text) of a chat message or of an item of a Responses input, where tool results have no role."""
    role = item.get("role") or ("tool" if "output" in item else "")
    return str(role), _text(item.get("content", item.get("output")))


def _text(content: Any) -> str:
    """The text of a message: parts are joined by line breaks, as vLLM's renderer joins them."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [_part(part) for part in parts]
    return "\n".join(text for text in texts if text)


def _part(part: Any) -> str:
    """A part's text; Anthropic's `tool_result` holds parts of its own, one level down."""
    if isinstance(part, str):
        return part
    text = part.get("text", part.get("content")) if isinstance(part, dict) else None
    if isinstance(text, list):
        return "\n".join(str(inner["text"]) for inner in text if isinstance(inner, dict) and "text" in inner)
    return text if isinstance(text, str) else ""

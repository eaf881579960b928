"""Every error this package raises on purpose.

    TensorspanError
    ├── CaptureRequestError (ValueError)     the caller asked for something we cannot give: HTTP 400
    ├── CaptureUnavailableError (RuntimeError)  this engine cannot capture: HTTP 501
    ├── SettingsError (ValueError)           a setting has a value we do not understand
    ├── MissingExtraError (ImportError)      an optional dependency is not installed
    ├── CaptureNotFoundError (FileNotFoundError)  no capture at that path or span ID
    ├── DamagedError (ValueError)            a file of a store does not hold what its format says
    ├── FormatError (ValueError)             the store was written in a format this version cannot read
    └── StoreError (OSError)                 the store cannot be written

Each inherits the built-in that a caller would already catch, and its text says what happened, where, and the repair.
"""

from __future__ import annotations

__all__ = [
    "CaptureNotFoundError",
    "CaptureRequestError",
    "CaptureUnavailableError",
    "DamagedError",
    "FormatError",
    "MissingExtraError",
    "SettingsError",
    "StoreError",
    "TensorspanError",
]


class TensorspanError(Exception):
    """Base of all errors raised on purpose by tensorspan."""


class CaptureRequestError(TensorspanError, ValueError):
    """A capture request is malformed or asks for something this model does not have.

    `member` names the dictionary member at fault; `allowed` says what it may be; `example` is a request that works.
    """

    def __init__(self, detail: str, *, member: str = "", allowed: str = "", example: str = "logits, attention") -> None:
        super().__init__(detail)
        self.detail = detail
        self.member = member
        self.allowed = allowed
        self.example = example


class CaptureUnavailableError(TensorspanError, RuntimeError):
    """This engine cannot capture; the text gives the reason that `tensorspan doctor` prints too."""


class SettingsError(TensorspanError, ValueError):
    """A setting is unknown or has a value that cannot be used."""


class MissingExtraError(TensorspanError, ImportError):
    """An optional dependency is missing; the text is the command that installs it."""

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'tensorspan[{extra}]'")


class CaptureNotFoundError(TensorspanError, FileNotFoundError):
    """No capture at that path, or no capture holds that span ID."""


class DamagedError(TensorspanError, ValueError):
    """A file of a store is damaged, or declares what no capture has; the text names it and the repair."""


class FormatError(TensorspanError, ValueError):
    """The group is not a tensorspan capture, or its format version is not readable by this release."""


class StoreError(TensorspanError, OSError):
    """The store root cannot be created or written."""

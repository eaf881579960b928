"""The keeper: holds the exporter's socket, forks the exporter process, and forks another one when that dies.

A new interpreter that loads the exporters' libraries takes most of a second of CPU, and takes it from the engine: it is
started by a worker, on the worker's own core, at the moment when its queue fills. A fork of a process that has loaded
them takes milliseconds. While nobody reads, clients connect to the socket all the same and are heard later.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn

__all__ = ["keep"]

LOG: Final = logging.getLogger("tensorspan.exporter")
STEADY_SECONDS: Final = 10.0
"""A child that lived so long did not die of how it begins."""
MAX_PAUSE_SECONDS: Final = 5.0


def keep(serve: Callable[[], None]) -> None:
    """Run `serve` in one child process after the other, until a child ends by itself.

    serve: the whole life of the child, called with the default handlers of signals. SIGTERM and SIGINT are passed on to
    the child, which is the last one then. Must be called by a process without threads.
    """
    asked, pause = threading.Event(), 0.0
    while True:
        began = time.monotonic()
        child = _fork(serve)
        _handle(partial(_pass_on, child, asked))
        _, status = os.waitpid(child, 0)
        if asked.is_set() or os.waitstatus_to_exitcode(status) == 0:
            return
        pause = 0.0 if time.monotonic() - began > STEADY_SECONDS else min(2 * pause + 0.05, MAX_PAUSE_SECONDS)
        LOG.warning("tensorspan: the exporter process %s; another one goes on", _end(status))
        threading.Event().wait(pause)


def _fork(serve: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        _live(serve)
    return child


def _live(serve: Callable[[], None]) -> NoReturn:
    """The child: its end is the process's end, whatever threads its exporters have left."""
    code = 1
    try:
        _handle(signal.SIG_DFL)
        serve()
        code = 0
    except BaseException:
        LOG.exception("tensorspan: the exporter process failed")
    finally:
        logging.shutdown()
        os._exit(code)


def _pass_on(child: int, asked: threading.Event, number: int, _: object) -> None:
    asked.set()
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _handle(action: Callable[[int, object], None] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

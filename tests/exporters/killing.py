"""Processes that kill themselves: `python -m tests.exporters.killing ROOT write|recover`.

Each child process counts the system calls by which the writer changes the file system and ends itself by SIGKILL at
one of them: before it, or, of a write, with half of it done. `write`: child *n* writes the generation `PLAN` to
`ROOT/n` and dies at call *n*, until one lives to the end; `ROOT/n.said` holds how many records it had acknowledged.
`recover`: child *n* recovers the copy of one killed store at `ROOT/n` and dies at call *n*, until one lives.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.exporters.synthetic import FULL, Synthetic, exporter
from tracer import schema

__all__ = ["AGAIN", "PLAN", "plan"]

CALLS: Final = ("open", "write", "writev", "mkdir", "replace", "unlink", "rmdir", "truncate")
AGAIN: Final = Synthetic(steps=5, prompt=70, spec=FULL, seed=1)
"""What step 1 is when it comes again."""
PLAN: Final = Synthetic(steps=5, prompt=70, spec=FULL)


def plan() -> list[tuple[Any, memoryview]]:
    """The records: a prompt in chunks that divide blocks, 5 steps in shards of 2, step 1 once more, the end."""
    records = list(PLAN.records(chunks=(30,)))
    return [*records[:-1], AGAIN.step(1, attempt=2), records[-1]]


def die_at(number: int) -> None:
    """Wrap the calls: the one of that number is the last thing this process does."""
    count = 0

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if name == "writev":
                    data = b"".join(map(bytes, args[1]))
                    write(args[0], data[: len(data) // 2])
                elif name == "write":
                    write(args[0], args[1][: len(args[1]) // 2])
                elif name == "copyfile":
                    Path(args[1]).write_bytes(Path(args[0]).read_bytes()[: number * 37])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    write = os.write
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    shutil.copyfile = wrap("copyfile", shutil.copyfile)


def write_and_die(root: Path, number: int) -> None:
    """Export the plan to `root`."""
    said, tell = os.open(root.with_suffix(".said"), os.O_WRONLY | os.O_CREAT), os.write
    schema.MAX_SHARD_STEPS = 2  # type: ignore[misc]
    out, records = exporter(root), plan()
    die_at(number)
    for record, payload in records:
        out.export(record, payload)
        assert out.problem is None, out.problem
        tell(said, b".")


def recover_and_die(root: Path, number: int) -> None:
    """Recover what is in `root`."""
    out = exporter(root)
    die_at(number)
    out.recover()
    assert out.problem is None, out.problem


def main() -> None:
    """Fork one child per call until one survives; print how many died."""
    root, what = Path(sys.argv[1]), sys.argv[2]
    number = 0
    while True:
        number += 1
        place = root / str(number)
        if what == "recover":
            shutil.copytree(root / "killed", place)
        child = os.fork()
        if not child:
            (write_and_die if what == "write" else recover_and_die)(place, number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    sys.stdout.write(f"{number - 1}\n")


if __name__ == "__main__":
    main()

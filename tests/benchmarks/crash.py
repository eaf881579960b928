"""`kill -9` at random moments: `python -m tests.benchmarks.crash [ROUNDS]`.

Each round starts an API process, a worker process and the real exporter process on a fresh store, hands 6 generations
of 90 steps through the real rings (`tests/exporters/crashing.py`), and kills the exporter, the worker, or all three at
once. Then the store is compared with what had been acknowledged. The table says how many rounds lost or left anything.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.exporters.crashing import VICTIMS, Outcome, crash

DELAY_S: Final = 0.35
"""The work takes about as long."""


def row(victim: str, outcomes: list[Outcome]) -> str:
    """One line of the table."""
    mine = [outcome for outcome in outcomes if outcome.victim == victim]
    acknowledged, stored = sum(o.acknowledged for o in mine), sum(o.stored for o in mine)
    statuses: dict[str, int] = {}
    for outcome in mine:
        for status, count in outcome.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    recovered = [1000 * outcome.recovery_s for outcome in mine if outcome.recovery_s]
    took = f"{statistics.median(recovered):.0f} ({max(recovered):.0f})" if recovered else "in the exporter"
    said = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    bad = sum(bool(outcome.problems) for outcome in mine)
    return f"| {victim} | {len(mine)} | {acknowledged} | {stored} | {bad} | {said} | {took} |\n"


def main() -> int:
    """Run the rounds and print the table; 1 if anything was lost, wrong or left over."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    moments, outcomes = random.Random(0), []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            outcome = crash(Path(folder), VICTIMS[number % len(VICTIMS)], moments.uniform(0, DELAY_S))
        outcomes.append(outcome)
        sys.stderr.writelines(f"round {number}: {problem}\n" for problem in outcome.problems)
    sys.stdout.write(
        "| killed | rounds | steps acknowledged | steps stored | rounds with a loss, a difference or leftovers "
        "| captures | recovery of 6 captures, ms (most) |\n|---|---|---|---|---|---|---|\n"
    )
    sys.stdout.writelines(row(victim, outcomes) for victim in VICTIMS)
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

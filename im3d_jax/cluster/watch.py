"""What one sees of a job on a cluster: a line a minute, by node and by kind of failure, and Ray's metrics."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping

from ray.util.metrics import Counter as MetricCounter
from ray.util.metrics import Gauge
from tqdm import tqdm

from im3d_jax.cluster.dispatch import Dispatch
from im3d_jax.jobs.outcomes import Outcome

PERIOD_S = 60.0
NUM_NAMED = 6
"""So many nodes, and kinds of failures, a line names."""

KIND_CHARACTERS = 60


class Watch:
    """Counts outcomes, and tells of them now and then.

    The metrics are im3d_assets_made and im3d_assets_failed, by node, and im3d_assets_open and im3d_actors.
    """

    def __init__(self, dispatch: Dispatch, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatch, self._clock = dispatch, clock
        self._made: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._begun = self._last = clock()
        self._metrics = {
            "made": MetricCounter("im3d_assets_made", "assets that were made", tag_keys=("node",)),
            "failed": MetricCounter("im3d_assets_failed", "assets that have failed", tag_keys=("node",)),
        }
        self._open = Gauge("im3d_assets_open", "assets without an outcome")
        self._actors = Gauge("im3d_actors", "actors that have loaded the model")

    def tell(self, outcome: Outcome) -> None:
        """Counts an outcome."""
        if outcome.error:
            # Numbers and names tell errors of one kind apart, mostly at their ends.
            self._kinds[outcome.error.partition(":")[0][:KIND_CHARACTERS]] += 1
        else:
            self._made[outcome.node] += 1
        self._metrics["failed" if outcome.error else "made"].inc(tags={"node": outcome.node})

    def look(self) -> None:
        """Sets the metrics and, if the last line is long enough ago, prints another one."""
        self._open.set(self._dispatch.num_open)
        self._actors.set(sum(self._dispatch.num_actors.values()))
        if self._clock() - self._last >= PERIOD_S:
            self._last = self._clock()
            tqdm.write(f"im3d: {self}", file=sys.stderr)

    def __str__(self) -> str:
        made, hours = self._made.total(), (self._clock() - self._begun) / 3600
        rate = made / hours if hours else 0.0
        actors = self._dispatch.num_actors
        nodes = {
            node: f"{node} {self._made[node]} by {actors[node]} actors"
            for node in self._made.keys() | actors.keys()
        }
        ordered = sorted(nodes, key=lambda node: (-self._made[node], node))
        told = f"{made} made ({rate:.1f} an hour), {self._dispatch.num_open} to do"
        told += f"; {_first([nodes[node] for node in ordered])}" if nodes else "; no actors"
        return told + (f"; failed: {_first(_counted(self._kinds))}" if self._kinds else "")


def _counted(kinds: Mapping[str, int]) -> list[str]:
    return [
        f"{count} x {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    ]


def _first(texts: list[str]) -> str:
    more = len(texts) - NUM_NAMED
    return ", ".join(texts[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")

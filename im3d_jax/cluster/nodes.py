"""Which nodes fail, and when one is taken out of use.

An asset that fails on a node speaks against the node only if it is then made on another one. Until that is
known the failure is unsettled, and a node with several of them gets no further new assets: a broken machine
fails faster than a good one works, and would soon have failed them all.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

MAX_UNSETTLED = 3
"""With so many unsettled failures a node gets no new assets."""

MAX_IN_A_ROW = 3
"""After so many assets in a row that failed on a node and were made elsewhere, it is taken out of use."""


@dataclass
class Record:
    """What speaks against a node.

    Attributes:
        unsettled: assets that failed there, of which nothing more is known yet.
        in_a_row: how many assets failed there and were then made elsewhere, since it last made one itself.
    """

    unsettled: set[str] = field(default_factory=set)
    in_a_row: int = 0


class Nodes:
    """The records of all nodes that have had an actor.

    Attributes:
        excluded: nodes out of use, and why.
    """

    def __init__(self) -> None:
        self.excluded: dict[str, str] = {}
        self._records: defaultdict[str, Record] = defaultdict(Record)

    def takes_new(self, node: str) -> bool:
        """Whether a node gets assets that have not failed anywhere yet."""
        return len(self._records[node].unsettled) < MAX_UNSETTLED

    def failed(self, node: str, name: str) -> None:
        """An asset has failed on a node."""
        self._records[node].unsettled.add(name)

    def made(self, node: str, name: str) -> list[str]:
        """An asset was made on a node. Returns the nodes that this takes out of use."""
        self._records[node].in_a_row = 0
        bad = []
        for other, record in self._records.items():
            if name not in record.unsettled:
                continue
            record.unsettled.discard(name)
            if other == node:
                continue
            record.in_a_row += 1
            if record.in_a_row >= MAX_IN_A_ROW and other not in self.excluded:
                bad.append(other)
        return bad

    def settled(self, name: str) -> None:
        """An asset is given up: it is at fault, and no node is."""
        for record in self._records.values():
            record.unsettled.discard(name)

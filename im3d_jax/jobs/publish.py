"""What all processes of a batch have made, written out: the table, the summary and the gallery.

    publisher = Publisher(Index(out).refresh())
    publisher.tell("000017")     # an asset was made or has failed; now and then this writes
    print(publisher.finish())    # in the end, in any case

One process at a time writes, and first takes in what the others have written: no asset is lost.
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from im3d_jax.jobs import gallery, summary
from im3d_jax.jobs.index import PATIENCE_S, Index
from im3d_jax.jobs.summary import SUMMARY, Asked
from recon_torch.errors import UserError
from recon_torch.locks import InUse

PERIOD_S = 60.0
"""Between two times that a process writes while assets are made."""

MAX_SHARE = 0.05
"""So much of its time, at most, a process writes: that of 100,000 assets takes seconds."""


class Publisher:
    """Keeps table, summary and gallery up to date while assets are made.

    Attributes:
        index: of the batch.
    """

    def __init__(self, index: Index, period_s: float = PERIOD_S) -> None:
        self.index = index
        self._period_s = period_s
        self._next = time.monotonic() + period_s

    def tell(self, name: str) -> None:
        """Takes in what has become of an asset, and writes if it is time to."""
        self.index.look(name)
        self.write_if_due()

    def write_if_due(self) -> None:
        """Writes if the last time was long enough ago. What is in the way of that does not end the batch."""
        started = time.monotonic()
        if started < self._next:
            return
        try:
            write(self.index, patience_s=0.0)
        except InUse:  # another process writes; the next asset is another occasion
            return
        except UserError as error:
            tqdm.write(f"im3d: warning: {error}", file=sys.stderr)
        took = time.monotonic() - started
        self._next = time.monotonic() + max(self._period_s, took / MAX_SHARE)

    def finish(self) -> str:
        """Writes what lies on the disk in the end, and says where."""
        try:
            return write(self.index.refresh(), patience_s=PATIENCE_S)
        except InUse as error:  # all assets are there
            return f"{error}, and give `im3d batch --summarize {self.index.storage}`"


def write(index: Index, asked: Asked | None = None, patience_s: float = PATIENCE_S) -> str:
    """Writes index.parquet, summary.json and the gallery of a batch, and says where they are.

    asked: by default what summary.json says.

    Raises UserError for files of these names that are not ours and where the system refuses, and InUse if
    other processes write them for longer than `patience_s`.
    """
    with index.held(patience_s):
        index.write()
        rows = index.in_order()
        totals = summary.write(index.out, rows, asked)
        page = gallery.write(index.out, rows)
    missing = f"{totals['num_missing']} of the batch's {totals['num_asked']} assets are missing"
    return f"{missing + '; ' if totals['num_missing'] else ''}see {index.storage}/{page.name} and {SUMMARY}"

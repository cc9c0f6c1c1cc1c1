"""Seeds of named uses of random numbers."""

from __future__ import annotations

import numpy as np


def fold_in(seed: int, *names: int) -> int:
    """The seed of a use that is named by numbers, such as a step: a whole number of 63 bits."""
    return int(np.random.SeedSequence([seed, *names]).generate_state(1, np.uint64)[0] >> np.uint64(1))

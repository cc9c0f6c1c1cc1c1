"""The configs that the assets of a batch were made from, kept so that an error can name what differs.

They lie in the batch's directory as config_DIGEST.json. An asset's report has the digest alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from im3d_jax import config_flags
from im3d_jax.jobs import CONFIGS
from recon_torch import outputs
from recon_torch.files import write_json

NUM_NAMED = 5
"""So many keys that differ an error names."""


class Configs(NamedTuple):
    """The configs of a batch.

    Attributes:
        out: the batch's directory.
        digest: of the present config, see `config_flags.config_digest`.
        config: the present config as JSON holds it.
    """

    out: Path
    digest: str
    config: Mapping[str, Any]

    def keep(self) -> None:
        """Writes the present config, unless it is there."""
        if not self._path(self.digest).exists():
            outputs.check(self.out, CONFIGS)
            outputs.claim(self.out, CONFIGS)
            write_json(self._path(self.digest), dict(self.config))

    def difference(self, digest: object) -> str:
        """How the config of a digest differs from the present one; "" if the batch does not hold it."""
        try:
            before = json.loads(self._path(str(digest)).read_text())
        except (OSError, ValueError):
            return ""
        return config_flags.difference(before, self.config, NUM_NAMED)

    def _path(self, digest: str) -> Path:
        return self.out / f"config_{digest[:16]}.json"

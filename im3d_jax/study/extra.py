"""The packages of the extra "study", which are imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from recon_torch.errors import UserError


def needed(module: str, what: str = "a study") -> Any:
    """Imports a module. Raises UserError that names the extra where it is not installed.

    what: needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f'{what} needs the package {package!r}; pip install "im3d[study]"') from None

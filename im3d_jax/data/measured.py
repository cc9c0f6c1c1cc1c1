"""A file of what was measured of objects, which grows line by line, so that an interruption loses nothing."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from im3d_jax.data.selection import Measures
from recon_torch.errors import UserError
from recon_torch.files import make_directory


class Measured(NamedTuple):
    """An object's line: its `Measures`, and what CLIP makes of it, if there is one.

    Attributes:
        source: the SHA-256 of what was measured, see `views.source_digest`.
        embedding: the mean of its views' embeddings, as float16.
        cut_off: whether CLIP did not read its whole caption.
    """

    name: str
    source: str
    measures: Measures
    score: float | None = None
    embedding: Float[np.ndarray, " d"] | None = None
    cut_off: bool = False

    def line(self) -> str:
        """The object as a line of JSON."""
        content = {"name": self.name, "source": self.source, **self.measures._asdict()}
        content |= {"score": self.score, "cut_off": self.cut_off, "embedding": None}
        content["small"] = _text(self.measures.small)
        if self.embedding is not None:
            content["embedding"] = _text(self.embedding.astype(np.float16))
        return json.dumps(content) + "\n"

    @classmethod
    def of(cls, line: str) -> Measured:
        """Reads a line. Raises ValueError, KeyError or TypeError if it is none."""
        content = json.loads(line)
        coverage, thinnest, contrast = (float(content[name]) for name in Measures._fields[:3])
        embedding = content["embedding"]
        return cls(
            content["name"],
            content["source"],
            Measures(coverage, thinnest, contrast, _array(content["small"], np.uint8)),
            content["score"],
            None if embedding is None else _array(embedding, np.float16).astype(np.float32),
            content["cut_off"],
        )


class MeasuredFile:
    """A context manager that holds the file open. `found` has the objects that are in it, by name."""

    def __init__(self, path: Path):
        """Raises UserError if the file cannot be read or written."""
        make_directory(path.parent)
        self.found: dict[str, Measured] = {}
        try:
            self._file = path.open("a+", encoding="utf-8", newline="\n")
            self._read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot use {path} ({error}); remove it, or choose another --out") from None

    def _read(self) -> None:
        """Reads the lines, up to one that was not finished, which is removed with all after it."""
        self._file.seek(0)
        whole = 0
        while line := self._file.readline():
            try:
                if not line.endswith("\n"):
                    break
                measured = Measured.of(line)
            except (ValueError, KeyError, TypeError):
                break
            self.found[measured.name] = measured
            whole = self._file.tell()
        self._file.seek(whole)
        self._file.truncate()

    def add(self, measured: Measured) -> None:
        """Adds a line. Raises UserError if it cannot be written; those before it stay."""
        try:
            self._file.write(measured.line())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self._file.name} ({error.strerror}); make room and go on"
            ) from error
        self.found[measured.name] = measured

    def __enter__(self) -> MeasuredFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # every line is written as it comes, or `add` has said why not
            self._file.close()


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)

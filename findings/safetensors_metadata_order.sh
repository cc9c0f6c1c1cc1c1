#!/usr/bin/env bash
# safetensors 0.8.0 writes the entries of `metadata` in an order that changes from one save to the next, so equal tensors with equal
# metadata give files of different bytes. One would expect what holds without metadata: equal content, equal bytes. It hurts whoever
# compares checkpoints by hash, deduplicates them, or promises that the same seed gives the same file.
#
# Seen with safetensors 0.8.0 and numpy 2.4.6 on Python 3.11: of 12 saves with five entries nearly all differ; with one entry, or with
# none, all 12 are the same. (Known upstream: safetensors issue 584.)
# In this project: `recon_torch.files.sort_safetensors_header` puts the entries in order; other files have a single entry.
#
# Prints what it saw; fails if saves with five entries have become equal, or those with one or none different.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
cat > saves.py <<'PY'
import hashlib
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def distinct_files(num_entries: int) -> int:
    entries = {f"camera_{index}": str(index) for index in range(num_entries)} or None
    digests = set()
    for number in range(12):
        path = Path(f"{number}.safetensors")
        save_file({"positions": np.arange(6, dtype=np.float32)}, path, metadata=entries)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    return len(digests)


found = {count: distinct_files(count) for count in (0, 1, 5)}
for count, files in found.items():
    print(f"{count} entries of metadata: 12 equal saves gave {files} different files")
sys.exit(not (found[0] == found[1] == 1 and found[5] > 1))
PY
"$folder/venv/bin/python" saves.py

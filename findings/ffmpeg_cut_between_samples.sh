#!/usr/bin/env bash
# ffmpeg 9.0.2 decodes an .mp4 that was cut off between two samples, as an interrupted copy may leave it, with exit code 0 and without a
# message at its level "warning": fewer frames come out than the file states. The same file cut within a sample is reported
# ("partial file" or an error of the decoder). So neither the exit code nor stderr tells a whole turn of an object from a part of one.
#
# Seen with imageio-ffmpeg 0.8.1, which brings ffmpeg n9.0.2, on Python 3.11. In this project: `recon_torch.views.video` compares the time
# that the container states with that of the frames.
#
# Prints what it saw; fails if the cut between samples is reported, or the cut within a sample is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check imageio-ffmpeg==0.8.1
cd "$folder"
cat > cut.py <<'PY'
import re
import struct
import subprocess
import sys

import imageio_ffmpeg

ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
pattern = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=24:duration=2"]
how = ["-pix_fmt", "yuv420p", "-g", "1", "-bf", "0", "-movflags", "+faststart"]
subprocess.run([ffmpeg, "-loglevel", "error", *pattern, *how, "whole.mp4"], check=True)
whole = open("whole.mp4", "rb").read()


def table(name):
    """The entries of the box `stsz` (sizes of samples) or `stco` (offsets of chunks)."""
    start = whole.index(name) + 8 + (4 if name == b"stsz" else 0)
    [count] = struct.unpack_from(">I", whole, start)
    return struct.unpack_from(f">{count}I", whole, start + 4)


sizes, [first, *more] = table(b"stsz"), table(b"stco")
assert not more, "one chunk is expected"
between = first + sum(sizes[:40])


def decode(content):
    open("cut.mp4", "wb").write(content)
    command = [ffmpeg, "-loglevel", "warning", "-i", "cut.mp4", "-f", "framemd5", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    frames = [line for line in done.stdout.splitlines() if re.match(r"\d", line)]
    return len(frames), done.returncode, done.stderr.strip()


print("version:", imageio_ffmpeg.get_ffmpeg_version(), "; samples stated:", len(sizes))
found = {}
for name, end in (("whole", len(whole)), ("cut between samples", between), ("cut within one", between - 5)):
    found[name] = frames, code, said = decode(whole[:end])
    print(f"{name}: {frames} frames, exit code {code}, said {said.splitlines()[-1]!r}" if said else
          f"{name}: {frames} frames, exit code {code}, said nothing")
silent = found["cut between samples"] == (40, 0, "")
sys.exit(not (found["whole"] == (48, 0, "") and silent and found["cut within one"][2]))
PY
"$folder/venv/bin/python" cut.py

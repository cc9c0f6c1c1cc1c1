"""Converts a file of splats by gaussforge, as a script in a process of its own; `conversion` starts it.

gaussforge 0.6.0 ends its process by a signal for some damaged files, takes whatever memory their headers ask
for, and prints what it reads. Here this costs this process alone. The script imports nothing of ours.
"""

import resource
import sys


def main(source: str, target: str, source_format: str, target_format: str, version: int, memory: int) -> int:
    """Converts `source` to `target`. The exit code is 0, or 3 with a line on stderr that says why not.

    version: of .spz. memory: the most bytes that this process may take.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import gaussforge

    with open(source, "rb") as file:
        content = file.read()
    try:
        answer = gaussforge.GaussForge().convert(content, source_format, target_format, spz_version=version)
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    if "error" in answer:
        print(answer["error"], file=sys.stderr)
        return 3
    with open(target, "wb") as file:
        file.write(answer["data"])
    return 0


if __name__ == "__main__":
    source, target, source_format, target_format, version, memory = sys.argv[1:]
    raise SystemExit(main(source, target, source_format, target_format, int(version), int(memory)))

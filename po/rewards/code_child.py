"""Runs one program in a process that `po.rewards.code` started: limits first, then the program, then its test.

Started by path with `python -I`, so it imports nothing of po. Reads a JSON object from stdin; what it says of itself
goes to the descriptor `report`, apart from the program's own output: "started", then, only where program and
test ran to their ends, the secret that the caller gave. `sys.exit(0)` in the middle is therefore no success.
"""

import io
import json
import os
import resource
import sys
from typing import Any


def limit(job: dict[str, Any]) -> None:
    """Hard limits, which the program cannot raise."""
    size, seconds = job["memory_mb"] << 20, int(job["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def main() -> None:
    """Run the job."""
    job = json.loads(sys.stdin.buffer.read())
    report = os.fdopen(job["report"], "w")
    os.set_inheritable(job["report"], False)
    limit(job)
    report.write("started\n")
    report.flush()
    sys.stdin = io.StringIO(job["stdin"])
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(job["program"], "program.py", "exec"), scope)
    if job["test"] is not None:
        exec(compile(job["test"], "test.py", "exec"), scope)
    sys.stdout.flush()
    report.write(job["secret"])
    report.close()


if __name__ == "__main__":
    main()

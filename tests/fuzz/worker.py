"""A process that calls verbs one after the other, as a shell would, without the type checks of the tests.

Reads {"directory", "command"} as lines of JSON, and answers {"code", "out", "err", "bug", "memory", "seconds"}: the
exit code, what was printed, the traceback of an exception that escaped, the peak memory so far in bytes, and seconds of
processor time, including those of ended children.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import traceback


def answer(directory: str, command: list[str]) -> dict[str, object]:
    from puzzle_jax.cli import main

    os.chdir(directory)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b""))
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    bug = ""
    before = processor_seconds()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except BaseException:
            bug = traceback.format_exc()
    seconds = processor_seconds() - before
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "bug": bug,
        "memory": memory,
        "seconds": seconds,
    }


def processor_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def serve() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    asking = sys.stdin.buffer  # every command gets a standard input of its own
    for line in asking:
        asked = json.loads(line)
        channel.write(json.dumps(answer(asked["directory"], asked["command"])) + "\n")
        channel.flush()


if __name__ == "__main__":
    serve()

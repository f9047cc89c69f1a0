"""A worker of a sweep: a cell a line comes in, its row goes out, until there is nobody who asks."""

from __future__ import annotations

import json
import os
import sys
import traceback

from simllm.sweeps.answer import answer

__all__ = ["serve"]


def serve() -> None:
    """Answer the cells on standard input."""
    # Rows alone go where the parent reads; whatever a library prints goes to standard error.
    rows = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin.buffer:
        number, cell = json.loads(line)
        try:
            row = answer(cell)
        except Exception:
            traceback.print_exc()
            row = None  # a defect of simllm; the parent stops
        try:
            rows.write(json.dumps([number, row], allow_nan=False).encode() + b"\n")
            rows.flush()
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    serve()

"""Serves a request for checks without a device: ops crash, are killed, wrong, or hang."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

CONFIGURATIONS = ("float16", "float32")


def main() -> None:
    """Print what a worker prints."""
    request = json.loads(sys.argv[1])
    for op in request["ops"]:
        for configuration in CONFIGURATIONS[: 1 if request["short"] else 2]:
            if f"{op} ({configuration})" in request["done"]:
                continue
            if op == "nothing":
                sys.exit("the device is busy")
            print(json.dumps({"starts": [op, configuration]}), flush=True)
            if op == "hangs":
                time.sleep(600)
            if op == "crashes":
                print("illegal memory access", file=sys.stderr, flush=True)
                os.abort()
            if op == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if op == "interrupted":
                # A shell's background jobs ignore SIGINT, and so does what they start.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            outcome = "wrong" if op == "wrong" and configuration == "float16" else "ok"
            interpreter = os.environ.get("TRITON_INTERPRET", "0")
            detail = f"{request['device']}, interpreter {interpreter}" if op == "asks" else "d"
            verdict = {"op": op, "configuration": configuration, "outcome": outcome}
            verdict["detail"] = detail
            print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()

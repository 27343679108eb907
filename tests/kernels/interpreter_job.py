"""Run interpreter scripts, each in a process forked from this one, which has imported Triton.

    TRITON_INTERPRET=1 python interpreter_job.py FOLDER SCRIPT... -- ARGUMENT...

writes what a script prints, and its exit status on the last line, to FOLDER/<position>.log.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path


def run(script: str, arguments: list[str], log: Path) -> None:
    """Become the process of one script; never returns."""
    status = 1
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(folder: Path, scripts: list[str], arguments: list[str]) -> None:
    for position, script in enumerate(scripts):
        log = folder / f"{position}.log"
        pid = os.fork()
        if pid == 0:
            run(script, arguments, log)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with log.open("a") as file:
            file.write(f"\n{status}")


if __name__ == "__main__":
    import lightning_peft_kernels.autograd  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)
    split = sys.argv.index("--")
    main(Path(sys.argv[1]), sys.argv[2:split], sys.argv[split + 1 :])

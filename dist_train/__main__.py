"""`python -m dist_train` is `dist-train`."""

import os
import traceback

from dist_train.cli.main import main
from dist_train.cluster.launch import is_elastic
from dist_train.outcome import ExitCode, say_on_stderr


def _main_of_elastic_rank() -> int:
    """Run the command, and end without the interpreter's own end.

    A group that was broken may still wait for a lost rank, in a thread of torch's: the interpreter would abort there.
    """
    try:
        code = main()
    except Exception:
        say_on_stderr(traceback.format_exc())
        code = ExitCode.FAULT
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(_main_of_elastic_rank() if is_elastic() else main())

"""`dist-train`, and `python -m dist_train`."""

import os
import signal
import sys


def run() -> int:
    """Run the command and return its exit code."""
    try:
        # It imports everything else, so that a Ctrl-C meanwhile comes here, too.
        return _run()
    except KeyboardInterrupt:
        # As Python ends, but without a traceback; shells must see that the signal ended this process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        raise


def _run() -> int:
    """Run the command; as a rank of torch.distributed that fails, end the process here.

    A process group that is broken, or that this rank has left because of an error, still has threads. They may abort
    the process while the interpreter shuts down, and the exit code would be lost.
    """
    import traceback

    from dist_train.cli.main import main
    from dist_train.cluster.launch import is_elastic
    from dist_train.outcome import ExitCode, say_on_stderr

    try:
        code = main()
    except Exception:
        say_on_stderr(traceback.format_exc())
        code = ExitCode.FAULT
    if is_elastic() or (code != ExitCode.FINISHED and _has_group_of_torch()):
        os._exit(code)
    return code


def _has_group_of_torch() -> bool:
    """Whether this process has joined ranks by torch.distributed. Ranks over MPI must shut down in order."""
    modules = sys.modules
    return "dist_train.cluster.torch_engine" in modules and "dist_train.cluster.horovod" not in modules


if __name__ == "__main__":
    raise SystemExit(run())

# shellcheck shell=bash
# Shared by the scripts in this folder; sourced, never run.

# shellcheck disable=SC2034
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034
cache="${DIST_TRAIN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dist_train}"

# say TEXT: progress, on stderr, so that a script's output stays what it promises to print.
say() {
    printf '%s\n' "$*" >&2
}

# fail TEXT: one message that says the cure, and the end.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# Whether programs can be built with the mpicxx on the PATH: Debian's openmpi-bin brings mpicxx without the header.
mpi_builds() {
    have mpicxx && printf '#include <mpi.h>\nint main() { return MPI_Finalize(); }\n' |
        mpicxx -x c++ -o /dev/null - >/dev/null 2>&1
}

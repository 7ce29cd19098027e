#!/usr/bin/env bash
# rank.sh COMMAND...: batch scripts start ranks through it; it runs the rank and reports if a signal kills it.
#
# A killed rank cannot report, and Slurm's PMIx and Open MPI end the other ranks before they notice. PMIx may end this
# script, too: it therefore prepares its message beforehand, and starts no program at the end.
# mpirun passes few variables, so the setup file is sourced again; srun passes all.
if [[ -n ${OMPI_COMM_WORLD_RANK:-} && -n ${DIST_TRAIN_SETUP:-} ]]; then
    rank_command=("$@")
    set -- # what it sources, such as Intel's setvars.sh, would take our arguments for its own
    # shellcheck disable=SC1090
    . "$DIST_TRAIN_SETUP"
    set -- "${rank_command[@]}"
fi
rank="${OMPI_COMM_WORLD_RANK:-${SLURM_PROCID:-?}} ($(uname -n)"
# mpirun signals only this script; srun signals the rank too, for which a second signal is harmless.
process=
forwarded=0
for name in TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064  # $name must be expanded now
    trap "forwarded=$(kill -l $name); [[ -z \$process ]] || kill -$name \$process" "$name"
done
exec {errors}>&2
code=0
{
    "$@" 2>&"$errors" {errors}>&- &
    process=$!
    while true; do
        code=0
        wait "$process" || code=$?
        kill -0 "$process" || break
    done
} 2>/dev/null # discards bash's own message about the killed process
if ((code > 128 && code - 128 != forwarded)); then
    echo "rank $rank, process $process) was killed by signal $((code - 128))" >&2
fi
exit "$code"

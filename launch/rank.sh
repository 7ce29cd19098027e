#!/usr/bin/env bash
# rank.sh COMMAND...: what batch scripts start in place of a rank: runs it, and says so when a signal kills it.
#
# A rank that is killed says nothing, and Slurm's PMIx and Open MPI end all others before they can notice. Slurm's may
# be quicker than this script, too.
# All is known beforehand: at the end there is no time to start a program.
# mpirun hands on few variables, srun all.
if [[ -n ${OMPI_COMM_WORLD_RANK:-} && -n ${DIST_TRAIN_SETUP:-} ]]; then
    # shellcheck disable=SC1090
    . "$DIST_TRAIN_SETUP"
fi
rank="${OMPI_COMM_WORLD_RANK:-${SLURM_PROCID:-?}} ($(uname -n)"
# mpirun sends its signals here alone, srun to the rank as well, whom a second one does not harm.
process=
passed_on=0
for name in TERM HUP USR1 USR2; do
    # shellcheck disable=SC2064  # the name is known now
    trap "passed_on=$(kill -l $name); [[ -z \$process ]] || kill -$name \$process" "$name"
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
} 2>/dev/null # where bash would tell of the death in its own words
if ((code > 128 && code - 128 != passed_on)); then
    echo "rank $rank, process $process) was killed by signal $((code - 128))" >&2
fi
exit "$code"

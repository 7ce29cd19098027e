#!/usr/bin/env bash
# Runs dist_train with mpirun, on this machine or on the hosts of a host file.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

print_help() {
    cat <<'EOF'
usage: launch/mpirun.sh [-np N] [--hostfile FILE] COMMAND [ARGUMENT ...]

  launch/mpirun.sh train configs/demo.yaml
  launch/mpirun.sh -np 8 --hostfile hosts train configs/lb_8192.yaml

Starts N ranks with mpirun, each of them running 'dist-train COMMAND ARGUMENT ...'.

  -np N            number of ranks (default: 2)
  --hostfile FILE  machines to run on, one per line: 'node1 slots=4'; the project and the run's
                   folder must be at the same path on all of them. Without it all ranks run here,
                   or on the nodes of the Slurm job
  -h, --help       this text

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR2 ask ranks that train to save and stop, and end others; a
second Ctrl-C or SIGTERM, two seconds or more after the first, ends them at once.

Environment variables (defaults in brackets):
  OMP_NUM_THREADS    threads per rank (if all ranks run here: the cores divided by N)
  DIST_TRAIN_PYTHON  Python to run, on all machines (the project's .venv/bin/python, else python3)

Exit status of a training run: 0 finished, 2 bad usage or configuration, 3 diverged, 4 ranks
disagree, 75 stopped on request after saving (start it again to resume), 1 anything else.
EOF
}

rank_count=2
hostfile=
while (($#)); do
    case $1 in
        --np=* | --hostfile=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        -np | --np | -n)
            (($# > 1)) || usage_error "-np takes a number of ranks"
            rank_count=$2
            shift 2
            ;;
        --hostfile)
            (($# > 1)) || usage_error "--hostfile takes a file"
            hostfile=$2
            shift 2
            ;;
        -h | --help) print_help && exit 0 ;;
        -*) usage_error "unknown option $1; see $(basename "$0") --help" ;;
        *) break ;;
    esac
done
(($#)) || usage_error "no command given, for example: launch/mpirun.sh train configs/demo.yaml"
check_rank_count "$rank_count"
if [[ -n $hostfile && ! -r $hostfile ]]; then
    usage_error "the host file $hostfile cannot be read; write one with a line for each machine: 'node1 slots=4'"
fi
find_programs
need_mpirun
check_run "$@"

# In a Slurm job mpirun starts the ranks on the job's nodes. A shell of salloc may run elsewhere, on a login node.
this_node=$(uname -n)
this_node=${SLURMD_NODENAME:-${this_node%%.*}}
command=("$mpirun" -np "$rank_count" --bind-to none --stdin none)
if [[ -n $hostfile || ${SLURM_JOB_NODELIST:-$this_node} != "$this_node" ]]; then
    stop=stop_through_mpirun
    # This machine's number of cores says nothing about the others.
    set_rank_environment "${OMP_NUM_THREADS:-}"
    command+=(--map-by slot)
    [[ -z $hostfile ]] || command+=(--hostfile "$hostfile")
    # In a Slurm job mpirun starts its daemons, one on each node, with srun: they would have what the job requests for one
    # task.
    unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
else
    stop=stop_local_ranks
    set_rank_environment "${OMP_NUM_THREADS:-$(threads_each "$rank_count")}"
    if [[ -z ${OMPI_MCA_btl:-} ]]; then
        # Shared memory is enough here; Open MPI would warn about networks that it cannot match.
        rank_environment+=("OMPI_MCA_btl=^tcp")
    fi
    command+=(--map-by slot:OVERSUBSCRIBE)
fi

# mpirun passes only its own variables and named ones to other machines.
while read -r name; do
    command+=(-x "$name")
done < <(passed_variables)

launch_mpirun "$stop" "${command[@]}" "${dist_train[@]}" "$@"
finish

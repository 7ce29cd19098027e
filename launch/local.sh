#!/usr/bin/env bash
# Runs dist_train with several ranks on this machine.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

print_help() {
    cat <<'EOF'
usage: launch/local.sh [-np N] [--torch | --gloo | --mpi] COMMAND [ARGUMENT ...]

  launch/local.sh train configs/demo.yaml
  launch/local.sh -np 4 train configs/lb_8192.yaml run.seed=1 --run-dir runs/seed-1

Starts N ranks on this machine, each of them running 'dist-train COMMAND ARGUMENT ...'.

  -np N       number of ranks (default: 2)
  --torch     communicate with torch.distributed; 'dist-train launch' starts the ranks (default)
  --gloo      communicate with Horovod over Gloo; horovodrun starts the ranks
  --mpi       communicate with Horovod over MPI; launch/mpirun.sh starts the ranks
  -h, --help  this text

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR2 ask ranks that train to save and stop, and end others; a
second Ctrl-C or SIGTERM, two seconds or more after the first, ends them at once.

Environment variables (defaults in brackets):
  OMP_NUM_THREADS     threads per rank (the cores divided by N)
  HOROVOD_CYCLE_TIME  milliseconds between Horovod's cycles (by engine and device; docs/scaling.md)
  DIST_TRAIN_PYTHON   Python to run (the project's .venv/bin/python, else python3)

Exit status of a training run: 0 finished, 2 bad usage or configuration, 3 diverged, 4 ranks
disagree, 75 stopped on request after saving (start it again to resume), 1 anything else.
EOF
}

rank_count=2
transport=torch
while (($#)); do
    case $1 in
        -np | -n)
            (($# > 1)) || usage_error "-np takes a number of ranks"
            rank_count=$2
            shift 2
            ;;
        --torch) transport=torch && shift ;;
        --gloo) transport=gloo && shift ;;
        --mpi) transport=mpi && shift ;;
        -h | --help) print_help && exit 0 ;;
        -*) usage_error "unknown option $1; see $(basename "$0") --help" ;;
        *) break ;;
    esac
done
(($#)) || usage_error "no command given, for example: launch/local.sh train configs/demo.yaml"
check_rank_count "$rank_count"
if [[ $transport == mpi ]]; then
    # Not horovodrun --mpi, which leaves its mpirun running when it is ended.
    exec "$root/launch/mpirun.sh" -np "$rank_count" "$@"
fi
find_programs
[[ $transport != torch ]] || trap - TERM INT USR1 USR2 HUP # a signal right before exec would be lost
((!stop_signals)) || stopped_before_launch
[[ $transport != torch ]] || exec "$python" -m dist_train launch -np "$rank_count" "$@"
need_horovodrun
check_run "$@"
set_rank_environment "${OMP_NUM_THREADS:-$(threads_each "$rank_count")}"
launch_horovodrun stop_local_ranks "$horovodrun" --gloo -np "$rank_count" "$python" -m dist_train "$@"
finish

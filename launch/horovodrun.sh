#!/usr/bin/env bash
# Runs dist_train with horovodrun over Gloo, on this machine or on several over ssh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

print_help() {
    cat <<'TEXT'
usage: launch/horovodrun.sh [-np N] [-H HOST:SLOTS[,HOST:SLOTS...]] COMMAND [ARGUMENT ...]

  launch/horovodrun.sh train configs/demo.yaml
  launch/horovodrun.sh -np 8 -H node1:4,node2:4 train configs/lb_8192.yaml

Starts N ranks with horovodrun, each of them running 'dist-train COMMAND ARGUMENT ...'. They
communicate over Gloo, without MPI.

  -np N        number of ranks (default: all slots of the hosts; 2 without -H)
  -H HOSTS     machines to run on, and the number of ranks on each. This machine must reach the
               others by ssh without a password; the project and the run's folder must be at the
               same path on all
  -h, --help   this text

Environment variables (defaults in brackets):
  OMP_NUM_THREADS       threads per rank (if all ranks run here: the cores divided by N)
  HOROVOD_CYCLE_TIME    milliseconds between Horovod's cycles (5; on GPUs 1)
  HOROVOD_GLOO_IFACE    network interface for the ranks (one that all machines have)
  DIST_TRAIN_PYTHON     Python to run, on all machines (the project's .venv/bin/python, else python3)

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR2 ask ranks that train to save and stop, and end others; a
second Ctrl-C or SIGTERM, two seconds or more after the first, ends them at once.

Exit status of a training run: 0 finished, 2 bad usage or configuration, 3 diverged, 4 ranks
disagree, 75 stopped on request after saving (start it again to resume), 1 anything else.
TEXT
}

rank_count=
hosts=
while (($#)); do
    case $1 in
        -np | -n)
            (($# > 1)) || usage_error "-np takes a number of ranks"
            rank_count=$2
            check_rank_count "$rank_count"
            shift 2
            ;;
        -H | --hosts)
            (($# > 1)) || usage_error "-H takes machines: -H node1:4,node2:4"
            hosts=$2
            shift 2
            ;;
        -h | --help) print_help && exit 0 ;;
        -*) usage_error "unknown option $1; see $(basename "$0") --help" ;;
        *) break ;;
    esac
done
(($#)) || usage_error "no command given, for example: launch/horovodrun.sh train configs/demo.yaml"
if [[ -z $hosts ]]; then
    exec "$root/launch/local.sh" --gloo -np "${rank_count:-2}" "$@"
fi

is_this_machine() {
    case $1 in
        localhost | 127.* | "$(uname -n)" | "$(uname -n | cut -d. -f1)") return 0 ;;
        *) return 1 ;;
    esac
}

# remote HOST COMMAND...: over ssh, without prompts, and with a timeout for machines that do not answer.
remote() {
    local host=$1
    shift
    ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" "$@"
}

names=()
slots=0
for entry in ${hosts//,/ }; do
    [[ $entry =~ ^([A-Za-z0-9._-]+):([1-9][0-9]*)$ ]] || usage_error "-H takes machines with a number of ranks each, -H node1:4,node2:4, not '$entry'"
    names+=("${BASH_REMATCH[1]}")
    slots=$((slots + BASH_REMATCH[2]))
done
((${#names[@]})) || usage_error "-H takes machines: -H node1:4,node2:4"
rank_count=${rank_count:-$slots}
((rank_count <= slots)) || usage_error "$rank_count ranks are more than the $slots of -H $hosts"

find_programs
need_horovodrun
remote_names=()
for name in "${names[@]}"; do
    is_this_machine "$name" || remote_names+=("$name")
done
if ((${#remote_names[@]})); then
    command -v ssh >/dev/null || fail "ssh is missing: horovodrun starts the ranks on other machines with it"
fi
for name in "${remote_names[@]}"; do
    found=0
    remote "$name" test -x "$(printf %q "$python")" </dev/null || found=$?
    ((found != 255)) || fail "ssh cannot reach $name without a password; try 'ssh -o BatchMode=yes $name true'"
    ((found == 0)) || fail "$name has no $python: the project must be at the same path on all machines"
done
check_run "$@"

if ((${#remote_names[@]})); then
    # This machine's number of cores says nothing about the others.
    set_rank_environment "${OMP_NUM_THREADS:-}"
else
    set_rank_environment "${OMP_NUM_THREADS:-$(threads_each "$rank_count")}"
fi

# The ranks agree on a stop, so signalling one is enough. horovodrun itself does not forward signals.
# shellcheck disable=SC2329  # `launch` calls it
stop_one_rank() {
    local process count=0
    for process in $(local_ranks); do
        catches_stop "$process" && kill -USR2 "$process" 2>/dev/null && return 0
        count=$((count + 1))
    done
    ((${#remote_names[@]})) || return 1
    if [[ -z $run_directory ]]; then
        ((count == 0)) || return 1
        stop_at_once
        return
    fi
    has_begun || return 1
    on_remote_machine "${remote_names[0]}" stop_local_ranks
}

# on_remote_machine HOST FUNCTION: runs a function of common.sh there, for the processes of this launch.
on_remote_machine() {
    remote "$1" bash -c "$(printf %q ". $(printf %q "$root")/launch/common.sh; launch_id=$launch_id; $2")" </dev/null
}

# horovodrun replaces the variable by the interface that it finds, or is given.
interface=()
if ((${#remote_names[@]})) && [[ -n ${HOROVOD_GLOO_IFACE:-} ]]; then
    interface=(--network-interfaces "$HOROVOD_GLOO_IFACE")
fi
launch_horovodrun stop_one_rank "$horovodrun" --gloo "${interface[@]}" -np "$rank_count" -H "$hosts" "${dist_train[@]}" "$@"
# A rank that hangs outlives the ssh that started it.
for name in "${remote_names[@]}"; do
    on_remote_machine "$name" end_leftovers || say "$name does not answer; ranks may still be running there"
done
finish

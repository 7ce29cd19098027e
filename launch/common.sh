# shellcheck shell=bash
# Shared by the launch scripts; to be sourced.
#
# mpirun and horovodrun lose their ranks' exit codes and do not forward signals reliably. So a
# launch script checks the configuration first, forwards stop requests to the ranks itself, and
# takes its exit status from the run's status.json.

root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage_status=2
stopped_status=75
escalate_after=2 # seconds; a second signal within this time counts as the same request

# At the first stop request the ranks save and end; a second one ends them without saving.
stop_signals=0
first_stop=0
end_now=0

note_stop_request() {
    local now
    # Not SECONDS, which counts the whole seconds of a clock that may be set: 1.1 s may be two of them.
    read -r now _ </proc/uptime
    now=$((10#${now/./})) # in hundredths
    stop_signals=$((stop_signals + 1))
    if ((stop_signals == 1)); then
        first_stop=$now
        if [[ -n ${launcher:-} ]]; then
            keep_waking "$launcher" >/dev/null 2>&1 &
            waker=$!
        fi
    elif ((now - first_stop >= 100 * escalate_after)); then
        end_now=1
    fi
}

# keep_waking LAUNCHER: interrupts `wait` again and again, since a signal that arrives right before it does not.
waker=
keep_waking() {
    while sleep 0.5 && kill -0 "$1"; do
        kill -URG $$
    done
}
trap : URG

# Schedulers may repeat these signals, so they never escalate.
note_gentle_stop_request() {
    ((stop_signals > 0)) || note_stop_request
}
trap note_stop_request TERM INT
trap note_gentle_stop_request USR1 USR2 HUP

# What cannot be printed, on a full disk, to a closed terminal or after the end of tee, must not end the script.
say() {
    (printf '%s: %s\n' "$(basename "$0")" "$*" >&2) || true
}

usage_error() {
    say "error: $*"
    exit "$usage_status"
}

fail() {
    say "error: $*"
    exit 1
}

# check_rank_count N
check_rank_count() {
    [[ $1 =~ ^[1-9][0-9]*$ ]] || usage_error "-np takes a number of ranks, 1 or more, not '$1'"
}

# Sets `python`, `mpirun` and `dist_train` (the command), from .venv if there is one, otherwise from the PATH (as in a
# container).
find_programs() {
    python=$root/.venv/bin/python
    # In an installed package: the Python that it is installed for.
    [[ $root != */lib*/python3*/dist_train/share ]] || python=${root%/lib*/python3*}/bin/python3
    python=${DIST_TRAIN_PYTHON:-$python}
    local advice="run 'make setup' in $root"
    [[ -e $root/Makefile ]] || advice='set DIST_TRAIN_PYTHON to the Python that it is installed for'
    if [[ ! -x $python ]]; then
        [[ -z ${DIST_TRAIN_PYTHON:-} ]] || fail "DIST_TRAIN_PYTHON is $python, which is not an executable"
        python=$(command -v python3) || fail "there is no .venv and no python3: $advice"
    fi
    # Nothing from the current folder, which may hold a clone, or a queue.py; of a clone, its own package.
    export PYTHONSAFEPATH=1
    [[ ! -e $root/dist_train/__init__.py ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("dist_train"))' || {
        ((!stop_signals)) || stopped_before_launch # the signal may have ended Python
        fail "dist_train is not installed for $python: $advice"
    }
    dist_train=("$python" -m dist_train)
    mpirun=
    local record=$root/.venv/setup.env
    if [[ $python == "$root/.venv/bin/python" && -f $record ]]; then
        mpirun=$(sed -n 's/^mpirun=//p' "$record")
    fi
    [[ -n $mpirun ]] || mpirun=$(dirname "$python")/mpirun
    [[ -x $mpirun ]] || mpirun=$(command -v mpirun) || mpirun=
}

# Sets `horovodrun`.
need_horovodrun() {
    horovodrun=$(dirname "$python")/horovodrun
    [[ -x $horovodrun ]] || horovodrun=$(command -v horovodrun) || fail "horovodrun is missing; run 'make setup' in $root"
}

need_mpirun() {
    [[ -n $mpirun ]] || fail "mpirun is missing; install Open MPI (apt-get install openmpi-bin, or your cluster's module), or run 'make setup' in $root"
    local kind
    kind=$("$mpirun" --version 2>/dev/null </dev/null) || kind=
    [[ $kind != *HYDRA* && $kind != *Intel* ]] ||
        fail "$mpirun is that of MPICH or Intel MPI, which cannot start these ranks: put Open MPI's first on the PATH, or use torch.distributed (launch/local.sh; srun with comm.engine=torch)"
}

# threads_each N: this machine's cores divided by N ranks.
threads_each() {
    local cores
    cores=$("$python" -c 'from dist_train.start_up import usable_cores; print(usable_cores())') || cores=$(nproc)
    echo $((cores > $1 ? cores / $1 : 1))
}

# set_rank_environment THREADS: sets `launch_id`, and the ranks' environment as NAME=VALUE words in
# the array `rank_environment`; without THREADS each rank chooses its number of threads itself.
set_rank_environment() {
    local threads=$1
    launch_id=$(od -An -N8 -tx8 /dev/urandom | tr -d ' \n')
    rank_environment=("DIST_TRAIN_LAUNCH=$launch_id")
    # Launchers put a pipe between a rank and the terminal; the progress bar opens the terminal itself.
    if [[ -t 1 ]]; then
        local terminal
        # In a container or another namespace it may have no name.
        if { terminal=$(tty <&3); } 3>&1; then
            rank_environment+=("DIST_TRAIN_TERMINAL=$(uname -n):$terminal")
        fi
    fi
    if [[ -n $threads ]]; then
        rank_environment+=("OMP_NUM_THREADS=$threads")
    fi
    if [[ ! -e /dev/nvidia0 && -z ${OMPI_MCA_mpi_yield_when_idle:-} ]]; then
        # Otherwise Open MPI busy-waits and takes the core that training needs.
        rank_environment+=("OMPI_MCA_mpi_yield_when_idle=1")
    fi
    if [[ $(id -u) == 0 ]]; then
        rank_environment+=("OMPI_ALLOW_RUN_AS_ROOT=1" "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
    fi
}

# Prints the names of the variables that ranks on other machines need; mpirun passes only named ones.
passed_variables() {
    local name
    {
        printf '%s\n' "${rank_environment[@]%%=*}"
        for name in $(compgen -e); do
            case $name in
                PATH | LD_LIBRARY_PATH | PYTHONPATH | PYTHONSAFEPATH | OMP_NUM_THREADS | MKL_NUM_THREADS) printf '%s\n' "$name" ;;
                HOROVOD_* | NCCL_* | UCX_* | GLOO_* | TORCH_* | PYTORCH_*) printf '%s\n' "$name" ;;
                DIST_TRAIN_SETUP | DIST_TRAIN_REQUEUE | DIST_TRAIN_CACHE | DIST_TRAIN_TRITON | TRITON_CACHE_DIR | XDG_CACHE_HOME) printf '%s\n' "$name" ;;
                # In a Slurm job the GPU numbers differ by node.
                CUDA_VISIBLE_DEVICES) [[ -n ${SLURM_JOB_ID:-} ]] || printf '%s\n' "$name" ;;
            esac
        done
    } | grep -v '^OMPI_' | sort -u
}

# check_run COMMAND [ARGUMENT ...]: sets `saves`, whether COMMAND saves on request, and for `train`
# `run_directory`, or exits with one message if the run cannot start; otherwise `run_directory` is empty.
check_run() {
    run_directory='' saves=0
    case ${1:-} in
        train | lr-range | replay) saves=1 ;;
    esac
    [[ ${1:-} == train ]] || return 0
    (($# > 1)) || usage_error "train takes a configuration: $(basename "$0") train configs/demo.yaml"
    [[ " $* " != *' -h '* && " $* " != *' --help '* ]] || exec "${dist_train[@]}" "$@"
    # It takes the same arguments as `train`.
    run_directory=$("${dist_train[@]}" config run-directory "${@:2}") || {
        local status=$?
        ((!stop_signals)) || stopped_before_launch # the signal may have ended the check
        exit "$status"
    }
}

# Called at a stop request before anything has been launched.
stopped_before_launch() {
    exit "$stopped_status"
}

# Prints the PIDs of all processes of this launch, including launcher and helpers.
launched_processes() {
    grep -lz "^DIST_TRAIN_LAUNCH=$launch_id\$" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true
}

# Prints the PIDs of the ranks on this machine, without their children, which inherit the rank variable.
local_ranks() {
    local process parent
    local -A ranked=()
    for process in $(launched_processes); do
        if grep -qzE '^(HOROVOD_RANK|OMPI_COMM_WORLD_RANK)=' "/proc/$process/environ" 2>/dev/null; then
            ranked[$process]=1
        fi
    done
    for process in "${!ranked[@]}"; do
        parent=$(sed -n 's/^PPid:\t//p' "/proc/$process/status" 2>/dev/null) || continue
        [[ -n ${ranked[${parent:-0}]:-} ]] || printf '%s\n' "$process"
    done
}

# catches_stop PROCESS: whether it handles SIGUSR2. Before a rank installs its handlers, the signal would kill it.
catches_stop() {
    local caught
    caught=$(sed -n 's/^SigCgt:\t//p' "/proc/$1/status" 2>/dev/null) || return 1
    [[ -n $caught ]] && (((0x$caught >> (12 - 1)) & 1)) # 12: SIGUSR2
}

# Set by launch scripts before `launch`.
rank_count=1
launcher=

# Functions that forward a stop request to the ranks; each succeeds once every rank has it.
# If all ranks are on this machine, each is signalled directly.
declare -A signalled=()
stop_local_ranks() {
    local process count=0
    for process in $(local_ranks); do
        if [[ -z ${signalled[$process]:-} ]] && catches_stop "$process" && kill -USR2 "$process" 2>/dev/null; then
            signalled[$process]=1
        fi
        count=$((count + 1))
    done
    ((count > 0 && ${#signalled[@]} >= rank_count))
}

# If there are ranks on other machines, mpirun forwards SIGUSR2 to all, once they are ready for it: those of a run have
# met, as its status says. Whether those of other commands are ready, the ranks on this machine must show.
stop_through_mpirun() {
    local process count=0
    if [[ -n $run_directory ]]; then
        has_begun || return 1
    else
        for process in $(local_ranks); do
            catches_stop "$process" || return 1
            count=$((count + 1))
        done
        if ((count == 0)); then
            stop_at_once
            return
        fi
    fi
    kill -USR2 "$launcher"
}

# Whether the ranks of this launch have begun the run, so that they handle SIGUSR2.
has_begun() {
    grep -q "\"$launch_id\"" "$run_directory/status.json" 2>/dev/null
}

# For commands that do not save on request.
stop_at_once() {
    kill -TERM "$launcher"
}

error_log= # optional file: messages of dist-train, launch/rank.sh, srun and mpirun about the end of the launch
tidy_output() {
    trap '' TERM INT USR1 USR2 HUP
    filter -f "$root/launch/output.sed"
}
tidy_errors() {
    if [[ -z $error_log ]]; then
        tidy_output
        return
    fi
    trap '' TERM INT USR1 USR2 HUP
    filter -e "/was killed by signal|^(srun|slurmstepd|mpirun|prterun): |^dist-train: |^Exit code: /w $error_log" \
        -e "/^-{60,}\$/,/^-{60,}\$/w $error_log" | tidy_output
}

# filter EXPRESSION...: sed, started again for the next line where it cannot write, as on a full disk. A pipe without a
# reader would end the ranks: srun then kills them.
filter() {
    until sed -u -E "$@"; do
        read -r || break
    done
}

watch= # optional function to run in the background beside the launcher

# launch STOP COMMAND [ARGUMENT ...]: runs the launcher until it ends, forwards stop requests by the
# function STOP if the ranks save then, and ends all leftover processes of this launch. Sets
# `launcher_status`.
launch() {
    local stop=$1 request='the ranks save and end' announced=0 forwarded=0 ended_now=0 guard=()
    shift
    ((saves)) || stop=stop_at_once request='ending the ranks'
    ((!stop_signals)) || stopped_before_launch
    # The launcher dies with this script; a Ctrl-C at the terminal reaches only this script.
    # Before util-linux 2.33 (as on RHEL 8), setpriv does not know the option.
    if setpriv --pdeathsig KILL true 2>/dev/null; then
        guard=(setpriv --pdeathsig KILL)
    fi
    guard+=(setsid)
    local output errors filters=()
    exec {output}> >(tidy_output)
    filters+=($!)
    exec {errors}> >(tidy_errors >&2)
    filters+=($!)
    env -u HOROVOD_RANK -u OMPI_COMM_WORLD_RANK "${rank_environment[@]}" "${guard[@]}" "$@" </dev/null 1>&"$output" 2>&"$errors" &
    launcher=$!
    exec {output}>&- {errors}>&-
    local watcher=
    if [[ -n $watch ]]; then
        "$watch" &
        watcher=$!
    fi

    while true; do
        launcher_status=0
        if ((stop_signals && !forwarded)); then
            if ((!announced)); then
                say "asked to stop: $request"
                announced=1
            fi
            if "$stop"; then
                forwarded=1
            else
                sleep 0.2 & # unlike sleep, wait returns at once at a signal
                wait $! || true
                kill -0 "$launcher" 2>/dev/null && ((!end_now)) && continue
            fi
        fi
        if ((end_now && !ended_now)); then
            say "asked again: ending the ranks without waiting for them"
            kill -TERM "$launcher" 2>/dev/null || true
            ended_now=1
        fi
        wait "$launcher" || launcher_status=$?
        kill -0 "$launcher" 2>/dev/null || break
    done
    [[ -z $waker ]] || kill "$waker" 2>/dev/null || true
    if ((launcher_status > 128)); then # maybe not the launcher's: a signal interrupts `wait`
        launcher_status=0
        wait "$launcher" || launcher_status=$?
    fi
    [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
    end_leftovers
    # Before bash 5.1 wait knows only the last of them.
    while kill -0 "${filters[@]}" 2>/dev/null; do
        sleep 0.02
    done
}

# launch_horovodrun STOP COMMAND [ARGUMENT ...]: as launch, for a launcher that ends with 1 whatever its ranks end with,
# and names the exit code of the first that failed in its last message.
launch_horovodrun() {
    local code
    error_log=$(mktemp 2>/dev/null) || error_log=
    launch "$@"
    [[ -n $error_log ]] || return 0
    code=$(sed -n 's/^Exit code: //p' "$error_log")
    rm -f "$error_log"
    [[ ! $code =~ ^[0-9]+$ ]] || launcher_status=$code
}

# launch_mpirun STOP COMMAND [ARGUMENT ...]: as launch, for a launcher that ends the other ranks before they can record
# which one a signal has killed; sets `lost` to what it says of that one.
launch_mpirun() {
    error_log=$(mktemp 2>/dev/null) || error_log=
    launch "$@"
    [[ -n $error_log ]] || return 0
    lost=$(tr -s '\n' ' ' <"$error_log" | sed -nE 's/.* (rank [0-9]+) with PID [0-9]+ on node ([^ ]+) exited on (signal [0-9]+).*/\1 (\2) was killed by \3/p')
    rm -f "$error_log"
}

end_leftovers() {
    local tries processes
    for ((tries = 0; tries < 50; tries++)); do
        processes=$(launched_processes)
        [[ -n $processes ]] || return 0
        # shellcheck disable=SC2086
        if ((tries == 20)); then
            kill -TERM $processes 2>/dev/null || true
        elif ((tries == 45)); then
            kill -KILL $processes 2>/dev/null || true
        fi
        sleep 0.1
    done
}

# The end of a launch script: exits with the status that the run's status.json gives.
lost=
finish() {
    trap '' TERM INT USR1 USR2 HUP # the run has ended
    if [[ -n $run_directory ]]; then
        exec "${dist_train[@]}" outcome "$run_directory" --launch "$launch_id" --record-lost "$lost" --code "$launcher_status"
    fi
    ((launcher_status == 0)) || launcher_status=1
    exit "$launcher_status"
}

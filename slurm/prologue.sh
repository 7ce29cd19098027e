# shellcheck shell=bash
# Shared by the batch scripts; to be sourced.
#
# Environment variables, with their defaults in brackets. sbatch passes them to the job:
#
# every job
#   DIST_TRAIN_ROOT   the project's folder (the folder of submission, else the script's)
#   DIST_TRAIN_PYTHON Python to run, on all nodes (the project's .venv/bin/python, else python3)
#   DIST_TRAIN_SETUP  file to source first, on all nodes: modules, variables (none). To submit without your environment:
#                     sbatch --export=DIST_TRAIN_SETUP=FILE
#   CONTAINER         image to run in: a *.sif file with Apptainer, anything else with Pyxis (none)
#   CONTAINER_OPTIONS additional options for `apptainer exec`, or for srun with Pyxis
#   DRY_RUN           1: only print the command that would be started
#
# jobs with ranks
#   OVERRIDES         settings to change in the configuration, separated by spaces or newlines, quoted as in a shell:
#                     "run.seed=1 'data.root=/my data'"
#   LAUNCHER          srun or mpirun (srun)
#   MPI               value of srun --mpi; `srun --mpi=list` lists them (pmix; none with comm.engine=torch, which is
#                     also used if there is no pmix and comm.engine is auto)
#   RANKS_PER_NODE    ranks per node (one per GPU; without GPUs one per task of the job, else one)
#   OMP_NUM_THREADS   threads per rank (its cores: --cpus-per-task, but at most an equal share of the node's)
#   SPARE_NODES       nodes of the job that stay idle until another is lost (0); at most all but one
#   LOSS_SECONDS      srun: seconds that the other ranks have to end once one has ended (40)
#   NETWORK_INTERFACE network interface for the ranks, such as ib0 (chosen by MPI, NCCL and Gloo)
#   CPU_BIND          srun --cpu-bind (Slurm's choice: each rank on its own cores)
#   LAUNCHER_OPTIONS  additional options for srun or mpirun
#
# training jobs
#   PREFLIGHT         0: do not check first whether the nodes can work together (dist-train doctor --cluster)
#   GUARD_SECONDS     seconds between the checks of a multi-node job that it still has its first node (30)
#   MAX_RESTARTS      restarts on the job's remaining nodes, in a row without a new checkpoint, before it is requeued
#                     (as many as MAX_REQUEUES). With MIN_RANKS also how often in a row the ranks of a node may end within
#                     ten minutes of joining, before the node is given up
#   MIN_RANKS         the run continues without lost nodes, and without a restart, as long as this many ranks are left;
#                     nodes that come back join again (none). Only with srun and torch.distributed
#   MAX_REQUEUES      requeues in a row without a new checkpoint, after which the run is given up (3)
#   The job ends with the run's exit status: 0 finished, 2 bad usage or configuration, 3 diverged, 4 ranks
#   disagree, 75 stopped after saving, 1 anything else. After 75 and 1 it is requeued with scontrol.

: "${root:?the batch script sets it to the project folder}"
root=$(CDPATH='' cd -- "$root" && pwd)

asked=${1:-}
case $asked in
    -h | --help) asked=--help ;;
    *)
        if [[ -z ${SLURM_JOB_ID:-} ]]; then
            echo "$0: error: this is a batch script: sbatch $0" >&2
            exit 2
        fi
        if [[ -n $asked ]]; then
            echo "$0: error: it takes no arguments, but environment variables: $0 --help" >&2
            exit 2
        fi
        ;;
esac

. "$root/launch/common.sh"

# The site's modules and variables. Module scripts often return errors and read unset variables: hence set +eu. The file
# may have a variable root of its own.
if [[ -n ${DIST_TRAIN_SETUP:-} && $asked != --help ]]; then
    [[ -r $DIST_TRAIN_SETUP ]] || usage_error "DIST_TRAIN_SETUP $DIST_TRAIN_SETUP cannot be read on $(uname -n)"
    DIST_TRAIN_SETUP=$(realpath "$DIST_TRAIN_SETUP")
    export DIST_TRAIN_SETUP
    our_root=$root
    set +eu
    # shellcheck disable=SC1090
    . "$DIST_TRAIN_SETUP"
    set -eu
    root=$our_root
fi

# answer_help SECTION...: if the script was called with --help, prints its header and these sections of this file.
answer_help() {
    [[ $asked == --help ]] || return 0
    local section
    sed -n '2,/^set /{ /^#SBATCH/s/^#/#   #/; s/^# \{0,1\}//p }' "$0"
    for section in 'every job' "$@"; do
        sed -n "/^# $section\$/,/^#\{0,1\}\$/{ /^#   /s/^# //p }" "$root/slurm/prologue.sh"
    done
    exit 0
}

# Every signal from Slurm is a stop request; Slurm itself kills the job after KillWait.
trap note_gentle_stop_request TERM INT USR1 USR2 HUP

# After sbatch --export=NONE, the steps would not get the environment of this script either: no PATH for the guard, no
# libraries for mpirun's daemons.
export SLURM_EXPORT_ENV=ALL

# The user's filters, such as SQUEUE_PARTITION, would hide this job from us: a cancelled one would be requeued. With
# SCANCEL_INTERACTIVE=true, scancel would ask here for ever.
unset "${!SQUEUE_@}" "${!SINFO_@}" "${!SCANCEL_@}"

# sbatch passes on the variables of the job in which it is called, and Slurm sets only some of them anew.
# An array's id is also that of one of its tasks, and brings the lines of all of them.
facts=$(scontrol show job "${SLURM_JOB_ID:-none}" --oneliner 2>/dev/null | sed -n "/^JobId=${SLURM_JOB_ID:-} /p") || facts=
[[ -z $facts || $facts == *' ArrayTaskId='* ]] || unset "${!SLURM_ARRAY_@}"
[[ $facts != *' Restarts=0 '* ]] || unset SLURM_RESTART_COUNT

# SLURM_JOB_ID of an array task may be the array's id, so name the task explicitly.
job=${SLURM_JOB_ID:-}
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Variables with the job's own requests, which srun, mpirun's own included, would add to those of a step.
job_requests=(SLURM_GPUS SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK
    SLURM_TRES_BIND SLURM_GPU_BIND)
without_requests=(env "${job_requests[@]/#/--unset=}")

say() {
    (printf 'job %s: %s\n' "$job" "$*" >&2) || true
}

# Only srun's tasks have a step: sizes of the allocation would be those of the job that the step belongs to. salloc's own
# shell may be a step of this number, with the right sizes; a batch job runs a copy of its script, slurm_script.
[[ -z ${SLURM_STEP_ID:-} || $asked == --help || ($SLURM_STEP_ID == 4294967290 && ${0##*/} != slurm_script) ]] ||
    usage_error "another job's variables are set, such as SLURM_STEP_ID: submit from a login node, or within a job by dist-train submit"

# srun would start ranks in its first component alone, and squeue would answer about each of them.
[[ -z ${SLURM_HET_SIZE:-} || $asked == --help ]] ||
    usage_error "the other components of a heterogeneous job would stay idle: start its ranks by srun --het-group in a batch script of your own; if this job is none, SLURM_HET_SIZE is of that in which you submitted it: use dist-train submit"

# read_words ARRAY NAME TEXT: splits TEXT, the value of the variable NAME, into words, quoted as in a shell.
read_words() {
    local split
    split=$(xargs -r printf '%s\n' <<<"$3" 2>/dev/null) || usage_error "$2 has a quote that does not close: $3"
    mapfile -t "$1" < <(printf '%s' "$split")
}

# Sets `nodes`, `gpus` per node: the requested ones, though a job with whole nodes has all; and `gpus_requested` (0 or 1).
read_allocation() {
    nodes=${SLURM_JOB_NUM_NODES:-1}
    gpus=${SLURM_GPUS_ON_NODE:-0} gpus_requested=0
    ((gpus > 0)) || return 0
    local each=${SLURM_GPUS_PER_NODE:-} total=${SLURM_GPUS:-}
    # gres/gpu:2; gpu:2 or gres:gpu:2 from older versions of Slurm; gres/gpu for --gres=gpu.
    [[ -n $each ]] || each=$(scontrol show job "$job" 2>/dev/null | sed -n '0,/TresPerNode=/s/^ *TresPerNode=\([^ ]*\).*/\1/p' | tr , '\n' | grep -E '(^|[:/])gpu([:=]|$)') || each=
    if [[ ${SLURM_TRES_PER_TASK:-} == *gpu* || -n ${SLURM_GPUS_PER_TASK:-} ]]; then
        total=${SLURM_NTASKS:-1}
    fi
    if [[ -n $each ]]; then
        each=$(count_gpus "$each")
    elif [[ -n $total ]]; then
        total=$(count_gpus "$total")
        ((total % nodes == 0)) || usage_error "$total GPUs cannot be divided equally over $nodes nodes: use --gpus-per-node"
        each=$((total / nodes))
    fi
    ((each > 0)) || return 0
    gpus_requested=1 gpus=$((each < gpus ? each : gpus))
}

# count_gpus REQUEST: prints how many GPUs that is: 2 for 2, a100:2, gres/gpu:a100:2, and a100,v100. One without a number.
count_gpus() {
    tr , '\n' <<<"$1" | awk '{ sub(/.*[:=]/, ""); total += /^[0-9]+$/ ? $0 : 1 } END { print total }'
}

# Sets `rank_count`, `ranks_here` (the most of any node), `node_cores` (the fewest of any node) and `cores_each`.
count_ranks() {
    local tasks=${SLURM_NTASKS:-$nodes}
    ranks_here=${RANKS_PER_NODE:-}
    [[ -z $ranks_here || $ranks_here =~ ^[1-9][0-9]*$ ]] ||
        usage_error "RANKS_PER_NODE takes a number, 1 or more, not '$ranks_here'"
    if [[ -n $ranks_here ]]; then
        rank_count=$((nodes * ranks_here))
    elif ((gpus > 0)); then
        check_gpus "$tasks"
        ranks_here=$gpus
        rank_count=$((nodes * gpus))
    else
        # The largest number of tasks on a node: 3 in 3(x2),1.
        ranks_here=$(tr , '\n' <<<"${SLURM_TASKS_PER_NODE:-$(((tasks + nodes - 1) / nodes))}" | sort -rn | sed 's/(.*//; q')
        [[ -n ${SLURM_NTASKS:-} ]] || ranks_here=1
        rank_count=$tasks
    fi
    node_cores=${SLURM_CPUS_ON_NODE:-1}
    # SLURM_CPUS_ON_NODE is only the batch host's. 64 and 32 in 64(x2),32. Of unequal numbers of ranks, the smallest
    # node need not have the most.
    if [[ -n ${SLURM_JOB_CPUS_PER_NODE:-} ]] && ((rank_count == nodes * ranks_here)); then
        node_cores=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sort -n | sed 's/(.*//; q')
    fi
    local share=$((node_cores / ranks_here))
    cores_each=${SLURM_CPUS_PER_TASK:-$share}
    # Several ranks of one task share its cores.
    ((rank_count <= tasks || cores_each <= share)) || cores_each=$share
    ((cores_each > 0)) || cores_each=1
}

# check_gpus TASKS: refuses allocations without one rank per GPU, with fewer GPUs on a node than were requested, or, if
# no number was, with different numbers. One task per node is allowed, because the scripts request it by default.
check_gpus() {
    local each counts=() gpus_per_task=${SLURM_GPUS_PER_TASK:-1}
    # With --cpus-per-task only, SLURM_TRES_PER_TASK is cpu=4.
    [[ ! ${SLURM_TRES_PER_TASK:-} =~ (gres/gpu[^,]*) ]] || gpus_per_task=${BASH_REMATCH[1]}
    if [[ $(count_gpus "$gpus_per_task") != 1 || ${SLURM_NTASKS_PER_GPU:-1} != 1 ]] ||
        (($1 != nodes && $1 != nodes * gpus)); then
        usage_error "each rank drives one GPU, but $1 tasks were requested with $((nodes * gpus)) GPUs: use only --gpus-per-node, or set RANKS_PER_NODE"
    fi
    ((nodes > 1)) || return 0
    each=$(scontrol show job --details "$job" 2>/dev/null | sed -nE 's/^ *Nodes=([^ ]+).*GRES=[^ ]*gpu[^ ]*:([0-9]+)\(.*/\1: \2/p') || each=
    mapfile -t counts < <(awk -F ': ' 'NF { print $2 }' <<<"$each" | sort -un)
    ((${#counts[@]} <= 1 || (gpus_requested && counts[0] >= gpus))) ||
        usage_error "the nodes have different numbers of GPUs (${each//$'\n'/, }): use --gpus-per-node"
}

# NCCL, Open MPI and Gloo each choose a network: NCCL an InfiniBand that it finds, Open MPI the choice of UCX if built
# with it. On nodes with a slow administration network beside the fast one they may choose wrongly; then all three must
# be configured.
choose_network() {
    [[ -n ${NETWORK_INTERFACE:-} ]] || return 0
    # NCCL takes names for prefixes: for it, eth1 is eth10, too, and ib0 is ib0.8001.
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$NETWORK_INTERFACE}
    export OMPI_MCA_btl_tcp_if_include=${OMPI_MCA_btl_tcp_if_include:-$NETWORK_INTERFACE}
    export HOROVOD_GLOO_IFACE=${HOROVOD_GLOO_IFACE:-$NETWORK_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK_INTERFACE}
    export NETWORK_INTERFACE
}

# Sets `dist_train`, the command that starts our program here and in the ranks; for Pyxis also `container_options`.
find_our_program() {
    container_options=()
    local words
    read_words words CONTAINER_OPTIONS "${CONTAINER_OPTIONS:-}"
    local image=${CONTAINER:-}
    case $image in
        '') find_programs && return ;;
        *.sif)
            command -v apptainer >/dev/null || fail "CONTAINER is $image, but apptainer is missing on $(uname -n)"
            [[ -r $image ]] || usage_error "CONTAINER $image cannot be read on $(uname -n)"
            local devices=()
            ((gpus == 0)) || devices=(--nv)
            # Slurm's PMIx communicates through a folder, named in the ranks' environment, below /tmp or Slurm's spool.
            dist_train=(apptainer exec "${devices[@]}" --bind "$PWD" --bind "$root" "${words[@]}" "$image" python3 -m dist_train)
            ;;
        *)
            # enroot gives a container GPUs only where this is set; Slurm restricts them to the job's.
            ((gpus == 0)) || export NVIDIA_VISIBLE_DEVICES=${NVIDIA_VISIBLE_DEVICES:-all}
            container_options=("--container-image=$image" "--container-mounts=$PWD:$PWD,$root:$root" "--container-workdir=$PWD" "${words[@]}")
            local requests=(--nodes=1 --ntasks=1)
            ((gpus == 0)) || requests+=("--gpus-per-node=$gpus")
            # Scripts read what it prints: without labels.
            dist_train=("${without_requests[@]}" -u SLURM_LABELIO srun --mpi=none --overlap "${requests[@]}" --input=none
                "${container_options[@]}" python3 -m dist_train)
            ;;
    esac
    mpirun=$(command -v mpirun) || mpirun=
}

compose() {
    if [[ -n ${elastic_compose:-} ]]; then
        "$elastic_compose"
    else
        compose_command
    fi
}

# Sets `command`: the launcher `by` and our program, without its arguments.
compose_command() {
    local more name
    read_words more LAUNCHER_OPTIONS "${LAUNCHER_OPTIONS:-}"
    unset "${job_requests[@]}"
    case $by in
        srun)
            command -v srun >/dev/null || fail "srun is missing on $(uname -n)"
            # Not --kill-on-bad-exit: rank 0 may still be writing the outcome when another rank has ended.
            command=(srun "--mpi=$mpi" "--nodes=$nodes" "--ntasks=$rank_count" "--ntasks-per-node=$ranks_here"
                "--cpus-per-task=$cores_each" --export=ALL --input=none --no-kill --kill-on-bad-exit=0 "--wait=${LOSS_SECONDS:-40}")
            # A step gets the GPUs that it requests. All ranks of a node see all of these, without --gpu-bind=none, which
            # Slurm knows since 21.08 only, and each uses the one of its local rank: NCCL uses NVLink only between GPUs
            # that a process can see.
            ((gpus == 0)) || command+=("--gpus-per-node=$gpus")
            ((node_cores >= ranks_here * cores_each)) || command+=(--overcommit)
            command+=("${placed[@]}")
            [[ -z ${CPU_BIND:-} ]] || command+=("--cpu-bind=$CPU_BIND")
            command+=("${container_options[@]}")
            name_meeting_address
            ;;
        mpirun)
            ((!${#container_options[@]})) || usage_error "Pyxis needs srun: leave LAUNCHER out, or set CONTAINER to a .sif file"
            need_mpirun
            # No binding: bound to one core, a rank's threads would share it.
            command=("$mpirun" -np "$rank_count" --map-by "ppr:$ranks_here:node:OVERSUBSCRIBE" --bind-to none --stdin none)
            # mpirun starts a daemon on each node with srun, which gives it the GPUs that this requests. It would also give
            # it the cores of one task alone, for all of the node's ranks, unless srun and mpirun know --external-launcher.
            ((gpus == 0)) || export SLURM_GPUS_PER_NODE=$gpus
            unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK
            while read -r name; do
                command+=(-x "$name")
            done < <(passed_variables)
            ;;
        *) usage_error "LAUNCHER is srun or mpirun, not '$by'" ;;
    esac
    command+=("${more[@]}" "$root/launch/rank.sh")
    if ((${#container_options[@]})); then
        command+=(python3 -m dist_train)
    else
        command+=("${dist_train[@]}")
    fi
}

# Where nodes do not know each other by name, the ranks of torch.distributed meet at the first node's address in Slurm.
name_meeting_address() {
    [[ -n ${node_addresses:-} && -z ${MASTER_ADDR:-} ]] || return 0
    local names address
    names=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null) || return 0
    # Each node knows itself, and this one may be the first.
    ! getent hosts "${names##*$'\n'}" >/dev/null || return 0
    address=$(sed -n "s/^${names%%$'\n'*} //p" <<<"$node_addresses")
    [[ -z $address ]] || command=(env "MASTER_ADDR=$address" "${command[@]}")
}

# srun and mpirun forward SIGUSR2 to all ranks, which handle it once the run has a status.
stop_through_launcher() {
    has_begun || return 1
    kill -USR2 "$launcher"
}

# train_in_job DEFAULT_CONFIGURATION: runs `train`, configured by the variables.
train_in_job() {
    answer_help 'jobs with ranks' 'training jobs'
    local overrides directory=()
    read_words overrides OVERRIDES "${OVERRIDES:-}"
    [[ -z ${RUN_DIR:-} ]] || directory=(--run-dir "$RUN_DIR")
    run_in_job train "${CONFIG:-$1}" "${overrides[@]}" "${directory[@]}"
}

# sweep_in_job DEFAULT_STUDY: trains the run that has this array task's number in the study, unless it has finished.
sweep_in_job() {
    answer_help 'jobs with ranks' 'training jobs'
    local study=${STUDY:-$1} overrides words directory=() status=0
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] ||
        usage_error "each run is a task of an array: sbatch --array=\$(dist-train sweep $(printf %q "$study") --array) slurm/sweep.sh"
    read_words overrides OVERRIDES "${OVERRIDES:-}"
    [[ -z ${DIRECTORY:-} ]] || directory=(--directory "$DIRECTORY")
    # shellcheck disable=SC2329  # `find_programs` calls it
    stopped_before_launch() {
        requeue_job
    }
    read_allocation
    find_our_program
    words=$("${dist_train[@]}" sweep "$study" "${overrides[@]}" --only "$SLURM_ARRAY_TASK_ID" --arguments "${directory[@]}") || status=$?
    ((!status || !stop_signals)) || stopped_before_launch # the signal may have ended Python
    [[ $status == 0 && -n $words ]] || exit "$status"
    mapfile -t words <<<"$words"
    run_in_job "${words[@]}"
}

# meet_by_address: as in training, ranks that meet by torch.distributed may need rank 0's address.
meet_by_address() {
    # shellcheck disable=SC2329  # `launch_or_show` calls it
    before_launch() {
        read_addresses
        compose # the command may name an address
    }
}

# landscape_in_job DEFAULT_TARGETS: runs `landscape`, configured by the variables.
landscape_in_job() {
    answer_help 'jobs with ranks'
    local kind=${KIND:-direction} targets count what options overrides
    read_words targets TARGETS "${TARGETS:-$1}"
    read_words options OPTIONS "${OPTIONS:-}"
    read_words overrides OVERRIDES "${OVERRIDES:-}"
    case $kind in
        interpolate) count=2 what='runs or checkpoints' ;;
        direction | plane) count=1 what='run or checkpoint' ;;
        *) usage_error "KIND is interpolate, direction or plane, not '$kind'" ;;
    esac
    ((${#targets[@]} == count)) || usage_error "TARGETS takes $count $what for KIND=$kind, not '${targets[*]}'"
    prepare_ranks
    meet_by_address
    launch_or_show landscape "$kind" "${targets[@]}" "${overrides[@]}" "${options[@]}"
    # srun and mpirun pass on the exit code of bad options, because all ranks end with it.
    case $launcher_status in
        0 | "$usage_status") exit "$launcher_status" ;;
    esac
    ((!stop_signals)) || say "stopped: submit it again to evaluate the remaining points"
    exit 1
}

# analyses_in_job STUDY [OVERRIDE ...]: runs the study's analyses of its finished runs.
analyses_in_job() {
    local lines line measurement failed=0
    prepare_ranks
    meet_by_address
    lines=$("${dist_train[@]}" sweep "$@" --analyses) || exit
    [[ -n $lines ]] || exit 0
    [[ ${DRY_RUN:-} != 1 ]] || { printf '%s\n' "$lines" && exit; }
    mapfile -t lines <<<"$lines"
    for line in "${lines[@]}"; do
        read_words measurement analyses "$line"
        say "$line"
        if [[ ${measurement[1]} == landscape ]]; then
            launch_or_show "${measurement[@]:1}"
            ((launcher_status == 0)) || failed=1
        else
            "${dist_train[@]}" "${measurement[@]:1}" || failed=1
        fi
    done
    exit "$failed"
}

# report_in_job DEFAULT_DIRECTORY: runs `report`, configured by the variables.
report_in_job() {
    answer_help
    local words=(report "${DIRECTORY:-$1}")
    [[ -z ${OUTPUT:-} ]] || words+=(-o "$OUTPUT")
    read_allocation
    find_our_program
    exit_if_dry_run "${dist_train[@]}" "${words[@]}"
    exec "${dist_train[@]}" "${words[@]}"
}

# prepare_ranks [CONFIG OVERRIDE...]: sets everything that `launch_or_show` needs.
prepare_ranks() {
    local names
    by=${LAUNCHER:-srun}
    read_allocation
    [[ ${SPARE_NODES:-0} =~ ^(0|[1-9][0-9]*)$ ]] || usage_error "SPARE_NODES takes a number, 0 or more, not '$SPARE_NODES'"
    # After a loss Slurm may start the job on fewer nodes.
    SPARE_NODES=$((${SPARE_NODES:-0} < nodes ? ${SPARE_NODES:-0} : nodes - 1))
    count_ranks
    asked_ranks=$rank_count
    placed=() fit_nodes=()
    job_nodes=${SLURM_JOB_NODELIST:-}
    wanted_nodes=$((nodes - SPARE_NODES))
    if ((wanted_nodes < nodes)); then
        mapfile -t names < <(scontrol show hostnames "$job_nodes")
        use_nodes "${names[@]}"
    fi
    choose_network
    find_our_program
    threads=${OMP_NUM_THREADS:-$cores_each}
    set_rank_environment "$threads"
    more_overrides=()
    if [[ -n ${elastic_check:-} ]]; then
        "$elastic_check" "$@"
    elif [[ $by == srun ]]; then
        choose_mpi "$@"
    fi
    compose
}

# Makes the run continue without lost nodes.
be_elastic() {
    elastic_check=check_elastic
    elastic_compose=compose_elastic_command
    watch=supervise_nodes
}

# check_elastic CONFIG [OVERRIDE...]: refuses runs that cannot continue without a lost node.
check_elastic() {
    if [[ ! $MIN_RANKS =~ ^[1-9][0-9]*$ ]] || ((MIN_RANKS > rank_count)); then
        usage_error "MIN_RANKS takes a number, 1 to the run's $rank_count ranks, not '$MIN_RANKS'"
    fi
    [[ $by == srun ]] || usage_error "MIN_RANKS needs LAUNCHER=srun, not $by"
    ((!${#container_options[@]})) || usage_error "MIN_RANKS does not work with Pyxis: set CONTAINER to a .sif file"
    ((rank_count == wanted_nodes * ranks_here)) ||
        usage_error "MIN_RANKS needs equally many ranks on each node, but $rank_count were requested on $wanted_nodes nodes: set RANKS_PER_NODE"
    # check_run reports errors in the configuration later.
    local settings
    settings=$("${dist_train[@]}" config show "$@" 2>/dev/null) || settings=
    ! grep -q '^  engine: horovod$' <<<"$settings" ||
        usage_error "MIN_RANKS needs comm.engine=torch: Horovod cannot continue without a lost rank"
}

# choose_mpi [CONFIG OVERRIDE...]: sets `mpi`, the value of srun --mpi; torch.distributed does not need MPI. If srun has
# no PMIx, which Horovod and mpi4py need, the ranks use torch.distributed or are started by mpirun. Without a
# configuration, the ranks share points (join_points of our program).
choose_mpi() {
    local kinds engine
    mpi=${MPI:-pmix}
    # check_run reports errors in the configuration later; srun reports a wrong MPI.
    [[ -z ${MPI:-} ]] && engine=$(engine_of_ranks "$@" 2>/dev/null) || return 0
    if [[ $engine == torch ]]; then
        mpi=none
        return
    fi
    kinds=$(srun --mpi=list 2>&1) || kinds=
    # A line each; before Slurm 22.05 after "srun: ".
    kinds=$(sed -nE 's/^(srun: |[[:space:]]*)([a-z0-9_]+)$/\2/p; s/^.*pmix plugin versions available: //p' <<<"$kinds" | tr -cs 'a-z0-9_' ' ')
    kinds=${kinds% }
    [[ -n $kinds && " $kinds " != *' pmix '* ]] || return 0
    if (($#)) && "${dist_train[@]}" config show "$@" 2>/dev/null | grep -q '^  engine: auto$'; then
        say "srun has no pmix here, only $kinds: the ranks use torch.distributed (comm.engine=torch)"
        mpi=none
        more_overrides=(comm.engine=torch)
    elif [[ -n $mpirun ]]; then
        say "srun has no pmix here, only $kinds: mpirun starts the ranks (LAUNCHER=mpirun)"
        by=mpirun
    elif (($#)); then
        usage_error "srun has no pmix here, only $kinds, and there is no mpirun: set comm.engine=torch"
    else
        usage_error "srun has no pmix here, only $kinds, and there is no mpirun, which mpi4py needs"
    fi
}

# engine_of_ranks [CONFIG OVERRIDE...]: prints torch if the ranks that srun starts need no MPI.
engine_of_ranks() {
    if (($#)); then
        "${dist_train[@]}" config engine "$@"
    else
        # the same Python, without -m dist_train
        "${dist_train[@]:0:${#dist_train[@]}-2}" -c 'from dist_train.cluster.launch import is_installed; print("mpi4py" if is_installed("mpi4py") else "torch")'
    fi
}

# exit_if_dry_run COMMAND...: with DRY_RUN=1, prints the command and exits.
exit_if_dry_run() {
    [[ ${DRY_RUN:-} == 1 ]] || return 0
    printf '%q ' "$@" && echo
    exit 0
}

# launch_or_show COMMAND [ARGUMENT ...]: launches our COMMAND on the ranks, or only shows how (DRY_RUN).
launch_or_show() {
    exit_if_dry_run "${command[@]}" "$@"
    check_run "$@"
    ((!stop_signals)) || stopped_before_launch # the check of the nodes may take half a minute
    # TMPDIR may name a folder of the login node.
    [[ -n $error_log ]] || error_log=$(mktemp 2>/dev/null) || error_log=$(TMPDIR=/tmp mktemp)
    [[ -z $run_directory ]] || watch=${watch:-end_lingering_ranks}
    trap 'rm -f "$error_log"' EXIT
    say "$nodes nodes (${SLURM_JOB_NODELIST:-$(uname -n)}) x $ranks_here ranks, $gpus GPUs a node, by $by; $1 ${run_directory:-${*:2}}"
    [[ -z ${SLURM_RESTART_COUNT:-} ]] || say "restart $SLURM_RESTART_COUNT"
    ! declare -F before_launch >/dev/null || before_launch
    launch stop_through_launcher "${command[@]}" "$@"
}

# guard_batch_host NODE...: with --no-kill the job survives the loss of its first node, but this script, which runs
# there, does not. A step on another of these nodes then requeues the job, as Slurm does without --no-kill.
guard_batch_host() {
    local other host=${SLURMD_NODENAME:-}
    [[ -n $host && " $* " == *" $host "* ]] || return 0
    other=$(printf '%s\n' "$@" | grep -vxm 1 "$host") || return 0
    # If this node is lost, srun is lost too, but its step continues.
    # grep hides srun's messages about the end of the step. --mem=0: before Slurm 22.05 the memory of a step is not for
    # others even with --overlap, except for one that requests 0, which may use the job's.
    "${without_requests[@]}" -u SLURM_GPUS_PER_NODE srun --mpi=none --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "--nodelist=$other" \
        --cpus-per-task=1 --mem=0 --gres=none --input=none --output=none --no-kill \
        bash -c "$(declare -f requeue_once_lost); requeue_once_lost $(printf '%q ' "$job" "$host" "$(readlink "/proc/$$/fd/2")")" \
        2> >(grep --line-buffered -vE 'Job step aborted|Terminated|Killed|forcing job termination|got SIG' >&2) &
    guard_step=$! guard_node=$other
}

# requeue_once_lost JOB HOST LOG: requeues the job once it has lost HOST.
requeue_once_lost() {
    trap '' USR1 USR2 HUP
    local began='' begins left names
    while sleep "${GUARD_SECONDS:-30}"; do
        read -r begins left < <(SLURM_TIME_FORMAT=standard squeue --noheader --jobs "$1" --states RUNNING --format '%S %N' 2>/dev/null) ||
            continue
        [[ -n $left ]] || continue
        names=$(scontrol show hostnames "$left") || continue
        # After a time off the network this step may be left over from before a requeue, perhaps to other nodes.
        [[ ${began:=$begins} == "$begins" ]] || return 0
        ! grep -qx "$2" <<<"$names" || continue
        echo "job $1: the job has lost $2, where its batch script ran: requeued" >>"$3"
        scontrol requeue "$1"
    done
}

# Before a run on several nodes, checks whether they can work together, leaves out spare nodes that cannot, and chooses
# a network interface if not every one works.
check_nodes() {
    ((wanted_nodes + SPARE_NODES > 1)) && [[ -n $run_directory && -z ${CONTAINER:-} && ${PREFLIGHT:-1} != 0 ]] || return 0
    local answer good=() interface
    # Of whole nodes the run may use fewer GPUs than this one has, and another may have no more than these.
    answer=$(SLURM_JOB_NODELIST=$job_nodes SLURM_GPUS_ON_NODE=$gpus "${dist_train[@]}" doctor --cluster "$(dirname "$run_directory")" --brief 2> >(tee "$error_log" >&2)) || true
    [[ -n $answer ]] || return 0 # the check could not run; the launch will show the problem
    read -r -a good < <(sed -n 's/^nodes //p' <<<"$answer") || true
    interface=$(sed -n 's/^interface //p' <<<"$answer")
    if ((${#good[@]} < wanted_nodes)); then
        launcher_status=1
        MAX_RESTARTS=0
        end_job
    fi
    if [[ -n $interface && -z ${NETWORK_INTERFACE:-} ]]; then
        NETWORK_INTERFACE=$interface
        say "the ranks communicate over $interface; set NETWORK_INTERFACE to choose another"
    fi
    choose_network
    fit_nodes=("${good[@]}")
    ((${#good[@]} == wanted_nodes + SPARE_NODES)) || use_nodes "${good[@]}"
    compose
}

# Sets `command` for an elastic run: a launcher without ranks that manages membership. supervise_nodes starts launchers
# on the nodes, whose ranks join it.
compose_elastic_command() {
    command=("${dist_train[@]}" launch -np 0 --listen "$(own_address)" --start-with "$rank_count"
        --min-ranks "$MIN_RANKS" --max-ranks "$((wanted_nodes * ranks_here))"
        --restarts "${MAX_RESTARTS:-${MAX_REQUEUES:-3}}")
}

# Prints the address of this node for the job's other nodes: IPv4, or IPv6 if it has no other.
own_address() {
    local address='' name=${SLURMD_NODENAME:-$(uname -n)}
    # Some nodes resolve their own name to 127.*.
    # shellcheck disable=SC2016  # awk's own fields
    local choose='$1 ~ /^(127\.|::1$|fe80:)/ { next } /:/ && !six { six = $1 } !/:/ && !four { four = $1 } END { print four ? four : six }'
    if [[ -n ${NETWORK_INTERFACE:-} ]]; then
        address=$(ip -oneline address show dev "$NETWORK_INTERFACE" | sed -nE 's|.* inet6? ([^ /]+).*|\1|p' | awk "$choose") || true
    else
        name=$(scontrol show node "$name" --oneliner 2>/dev/null | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p') || name=
        [[ -n $name ]] || name=$(uname -n)
        # Minimal systems have no hostname, and some hostname has no -I.
        address=$({ getent ahosts "$name"; hostname -I 2>/dev/null | tr ' ' '\n'; } | awk "$choose") || true
    fi
    echo "${address:-$name}"
}

# Runs beside an elastic run's launcher: keeps a launcher on each of the wanted number of nodes, whose ranks join the
# run. If one ends, or its node is lost, it is started again when the node answers, or on a spare node. A node is given
# up once its launcher has ended within ten minutes of joining more than MAX_RESTARTS times in a row.
supervise_nodes() {
    local node connected living wait next_look=0 ended_at=$SECONDS entrance=$run_directory/join-$launch_id.json
    local restarts=${MAX_RESTARTS:-${MAX_REQUEUES:-3}}
    local -A steps=() joined_at=() missing=() due=() pause=() short_stays=()
    until [[ -s $entrance ]]; do
        sleep 0.2
    done
    while true; do
        connected=$(sed -n 's/.*"nodes": \[\(.*\)\].*/\1/p' "$entrance" 2>/dev/null) || connected=
        for node in "${!steps[@]}"; do
            if [[ $connected == *"\"$node\""* ]]; then
                missing[$node]=0 joined_at[$node]=${joined_at[$node]:-$SECONDS}
                ((SECONDS - joined_at[$node] < 600)) || pause[$node]=2 short_stays[$node]=0
                continue
            fi
            # srun may wait for a lost node as long as Slurm does.
            if ! kill -0 "${steps[$node]}" 2>/dev/null || { [[ -n ${joined_at[$node]:-} ]] && ((++missing[$node] > 5)); }; then
                kill -KILL "${steps[$node]}" 2>/dev/null || true
                due[$node]=$((SECONDS + ${pause[$node]:-2}))
                pause[$node]=$((${pause[$node]:-2} < 60 ? 2 * ${pause[$node]:-2} : 60))
                if [[ -n ${joined_at[$node]:-} ]] && ((SECONDS - joined_at[$node] < 600 && ++short_stays[$node] > restarts)); then
                    say "$node is given up: its ranks have ended within ten minutes of joining, more than MAX_RESTARTS ($restarts) times in a row"
                    due[$node]=$((1 << 60))
                fi
                unset "steps[$node]" "joined_at[$node]"
                ended_at=$SECONDS next_look=$((next_look < SECONDS + 5 ? next_look : SECONDS + 5))
                [[ ${guard_node:-} != "$node" ]] || guard_step=0
            fi
        done
        if ((${#steps[@]} < wanted_nodes && SECONDS >= next_look)) && ! has_ended; then
            # The longer a node has been away, the less often Slurm's controller is asked.
            wait=$(((SECONDS - ended_at) / 10))
            next_look=$((SECONDS + (wait < 5 ? 5 : wait > 60 ? 60 : wait)))
            mapfile -t living < <(living_nodes)
            for node in "${living[@]}"; do
                ((${#steps[@]} < wanted_nodes)) || break
                [[ -z ${steps[$node]:-} && " ${fit_nodes[*]:-$node} " == *" $node "* ]] || continue
                ((SECONDS >= ${due[$node]:-0})) || continue
                start_on_node "$node" "$entrance"
                steps[$node]=$! missing[$node]=0 short_stays[$node]=${short_stays[$node]:-0}
                disown "$!" # otherwise bash reports its end
            done
            # A guard step left over on a living node does no harm.
            if [[ ${guard_step:-1} == 0 ]]; then
                guard_batch_host "${living[@]}"
            fi
        fi
        sleep 1
    done
}

# Whether this launch has recorded how the run ended; rank 0 may still wait for a last scrape, or for a tracker.
has_ended() {
    has_begun && grep -q '"exit_code": [0-9]' "$run_directory/status.json"
}

# start_on_node NODE FILE: starts a launcher there in the background, whose ranks join the run of FILE.
start_on_node() {
    local cores=$((ranks_here * cores_each)) options=()
    # As without MIN_RANKS, all ranks of a node see all of its GPUs.
    ((gpus == 0)) || options+=("--gpus-per-node=$gpus")
    ((node_cores >= cores)) || options+=(--overcommit)
    [[ -z ${CPU_BIND:-} ]] || options+=("--cpu-bind=$CPU_BIND")
    "${without_requests[@]}" "${rank_environment[@]}" srun --mpi=none --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "--nodelist=$1" \
        "--cpus-per-task=$cores" "${options[@]}" --export=ALL --input=none --no-kill --kill-on-bad-exit=0 \
        "${dist_train[@]}" launch --join "$2" -np "$ranks_here" &
}

# Prints the job's remaining nodes that answer, one per line. Whether `silent_nodes` do, Slurm says.
living_nodes() {
    local names
    names=$(squeue --noheader --jobs "$job" --format %N 2>/dev/null) || names=$job_nodes
    [[ -n $names ]] || return 0
    {
        answering_nodes
        [[ -z $silent_nodes ]] ||
            sinfo --noheader --Node --responding "--nodes=$names" --format %N 2>/dev/null | grep -xF "$silent_nodes"
    } | grep -xFf <(scontrol show hostnames "$names") | sort -Vu
}

# Sets what living_nodes needs, also while Slurm's controller does not answer: `slurmd_port`, `node_addresses` (lines of
# a node and its address), and `silent_nodes`, which do not answer although the job has just begun.
read_addresses() {
    slurmd_port=$(scontrol show config 2>/dev/null | sed -n 's/^SlurmdPort *= *\([0-9]*\).*/\1/p') || slurmd_port=
    node_addresses=$(scontrol show node "$job_nodes" --oneliner 2>/dev/null |
        sed -n 's/^NodeName=\([^ ]*\) .* NodeAddr=\([^ ]*\) .*/\1 \2/p') || node_addresses=
    silent_nodes=$(cut -d ' ' -f 1 <<<"$node_addresses" | grep -vxFf <(answering_nodes)) || silent_nodes=
    [[ -z $silent_nodes ]] ||
        say "${silent_nodes//$'\n'/, } cannot be reached on slurmd's port ${slurmd_port:-6818}: a loss is noticed only once Slurm notices it"
}

# Prints those of the job's nodes that answer, one per line.
answering_nodes() {
    local name address
    while read -r name address; do
        { timeout 5 bash -c ": <>/dev/tcp/$address/${slurmd_port:-6818}" 2>/dev/null && echo "$name"; } &
    done <<<"$node_addresses" | sort -V
}

# srun waits for a lost node, and ranks for a rank that was on it. Ends both once Slurm reports a node failure, or once
# a fault has ended the run and its ranks have had time to end: rank 0, which holds the run's lock, as long as srun gives
# it, since it may wait for a last scrape. So it may after another end, as of a run that diverged, when no rank is
# missing. Spares shells: the guard's, and those of users.
end_lingering_ranks() {
    local waited=0 status=$run_directory/status.json
    until grep -q '^srun: error: Node failure on' "$error_log"; do
        sleep 1
        if grep -qs "\"$launch_id\"" "$status" && grep -qs '"exit_code": 1,' "$status"; then
            ((++waited < 10)) || { ((waited < ${LOSS_SECONDS:-40})) && is_locked "$run_directory/run.lock"; } || break
        fi
    done
    await_controller # without which no rank on another node can be ended
    squeue --noheader --steps --jobs "$job" --format '%i %j' | sed -nE '/ bash$/d; s/^([^ ]*\.[0-9]+) .*/\1/p' |
        xargs -r scancel --signal=KILL || true
    sleep 1
    kill -KILL "$launcher"
}

# is_locked FILE: whether a process holds this lock, on any node; not where the file system has no locks.
is_locked() {
    local status=0
    flock --shared --nonblock --conflict-exit-code 9 0 2>/dev/null <"$1" || status=$?
    ((status == 9))
}

# run_in_job train CONFIG [ARGUMENT ...]: runs a training job to its end.
run_in_job() {
    answer_help 'jobs with ranks' 'training jobs'
    # shellcheck disable=SC2329  # `check_run` and `launch` call it
    stopped_before_launch() {
        [[ -n ${run_directory:-} ]] || requeue_job
        end_job
    }
    # shellcheck disable=SC2329  # `launch_or_show` calls it
    before_launch() {
        local names
        read_addresses
        compose # the command may name an address
        check_nodes
        mapfile -t names < <(scontrol show hostnames "$job_nodes" 2>/dev/null)
        guard_batch_host "${names[@]}"
    }
    local name
    for name in MAX_RESTARTS MAX_REQUEUES; do
        [[ ${!name:-0} =~ ^[0-9]+$ ]] || usage_error "$name takes a number, 0 or more, not '${!name}'"
    done
    # With 0 srun would wait without end, and Slurm's controller be asked all the time.
    for name in LOSS_SECONDS GUARD_SECONDS; do
        [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || usage_error "$name takes a number, 1 or more, not '${!name}'"
    done
    # Whether the job comes back after its time limit: the run tells those who would else be warned of its end.
    export DIST_TRAIN_REQUEUE=0
    [[ ${MAX_REQUEUES:-} == 0 || $facts != *' Requeue=1 '* ]] || DIST_TRAIN_REQUEUE=1
    [[ -z ${MIN_RANKS:-} ]] || be_elastic
    prepare_ranks "${@:2}"
    launch_or_show "$@" "${more_overrides[@]}"
    while true; do
        end_job
        prepare_restart
        launch stop_through_launcher "${command[@]}" "$@" "${more_overrides[@]}"
    done
}

# undisturbed COMMAND...: runs a command by which the job ends. Slurm sends a stop request to every process of the batch
# script, and it would end this one, too.
undisturbed() {
    (trap '' TERM INT USR1 USR2 HUP && exec "$@")
}

# Ends the job, requeued if that can help; returns if the run is to be restarted within the job.
end_job() {
    local status=0 restarts=${MAX_RESTARTS:-${MAX_REQUEUES:-3}}
    rm -f "$run_directory/join-$launch_id.json" # in case the launcher was killed
    undisturbed "${dist_train[@]}" outcome "$run_directory" --launch "$launch_id" || status=$?
    case $status in
        1 | "$stopped_status") ;;
        *) exit "$status" ;;
    esac
    exit_if_slurm_ends_job "$status"
    # After a stop request do not restart within the job: the nodes are wanted.
    ((!stop_signals && status == 1)) || restarts=0
    decide_what_follows "$restarts"
    [[ $verdict == restart ]] || requeue_job
}

# decide_what_follows RESTARTS: sets `verdict` to restart, as often as this, or to requeue; exits if the run is given up.
decide_what_follows() {
    local messages
    # Linux limits an argument to 128 KiB.
    messages=$(tail -n 100 "$error_log" 2>/dev/null | cut -b 1-1000) || messages=
    # The exit status of a run that is given up is not 75, by which a site may requeue.
    verdict=$(undisturbed "${dist_train[@]}" requeue "$run_directory" --launch "$launch_id" --code "${launcher_status:-0}" \
        --limit "${MAX_REQUEUES:-3}" --restarts "$1" "--messages=$messages") || exit
}

# Waits up to ten minutes while Slurm's controller does not answer.
await_controller() {
    local deadline=$((SECONDS + 600)) said=''
    while [[ $(undisturbed squeue --noheader --jobs "$job" 2>&1) =~ 'contact slurm controller'|'timed out'|'Zero Bytes' ]] &&
        ((SECONDS < deadline)); do
        [[ -n $said ]] || say "waiting for Slurm's controller, which does not answer"
        said=1
        sleep 5
    done
}

# Requeues the job although the run was to be restarted within it.
requeue_instead() {
    decide_what_follows 0
    requeue_job
}

# exit_if_slurm_ends_job STATUS: a job that Slurm is ending, such as a cancelled one, would come back if it was requeued.
exit_if_slurm_ends_job() {
    local state
    await_controller
    state=$(undisturbed squeue --noheader --jobs "$job" --format %T 2>/dev/null) || state=
    [[ -n $state && $state != RUNNING ]] || return 0
    say "not requeued by this script: Slurm is ending the job ($state), and requeues it if it preempted it"
    exit "$1"
}

requeue_job() {
    [[ ${MAX_REQUEUES:-} != 0 ]] || exit "$stopped_status"
    exit_if_slurm_ends_job "$stopped_status"
    if undisturbed scontrol requeue "$job"; then
        say "requeued"
    else
        say "scontrol cannot requeue the job, which ends with $stopped_status: submit it again, unless the site requeues by RequeueExit"
    fi
    exit "$stopped_status"
}

# Sets everything that `launch` needs to restart the run, on the job's remaining nodes that answer.
prepare_restart() {
    local living=()
    mapfile -t living < <(living_nodes)
    # Not on nodes that the check has refused.
    ((!${#fit_nodes[@]})) ||
        mapfile -t living < <(printf '%s\n' "${living[@]}" | grep -xFf <(printf '%s\n' "${fit_nodes[@]}"))
    ((${#living[@]})) || requeue_instead
    # The srun of a step on a lost node may still run.
    [[ -z ${guard_step:-} ]] || { kill -0 "$guard_step" 2>/dev/null && [[ " ${living[*]} " == *" $guard_node "* ]]; } ||
        guard_batch_host "${living[@]}"
    use_nodes "${living[@]}"
    ((rank_count >= ${MIN_RANKS:-1})) || requeue_instead
    set_rank_environment "$threads"
    compose
    : >"$error_log"
    unset SLURM_RESTART_COUNT # the run would count this restart as another requeue
    say "restarted on $nodes nodes (${living[*]})"
}

# use_nodes NAME...: places the ranks on these nodes of the job, at most `wanted_nodes` of them.
use_nodes() {
    (($# <= wanted_nodes)) || set -- "${@:1:wanted_nodes}"
    nodes=$#
    rank_count=$((asked_ranks < nodes * ranks_here ? asked_ranks : nodes * ranks_here))
    SLURM_JOB_NODELIST=$(IFS=, && echo "$*")
    # mpirun reads the nodes from these variables. SLURM_OVERLAP: the previous step may not have ended for Slurm, which
    # waits for lost nodes.
    export SLURM_JOB_NODELIST SLURM_NODELIST=$SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES=$nodes SLURM_NNODES=$nodes
    export SLURM_TASKS_PER_NODE="$ranks_here(x$nodes)" SLURM_JOB_CPUS_PER_NODE="$node_cores(x$nodes)" SLURM_OVERLAP=1
    placed=("--nodelist=$SLURM_JOB_NODELIST" --overlap)
}

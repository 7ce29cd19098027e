# shellcheck shell=bash
# Shared by the batch scripts; sourced, never run.
#
# Environment variables, with their defaults. sbatch hands them on to the job:
#
# of every job
#   DIST_TRAIN_ROOT   the project's folder (that of submission, else that of the script)
#   DIST_TRAIN_PYTHON the Python to run, on all nodes (.venv/bin/python of the project, else python3)
#   CONTAINER         image to run in: a file *.sif, by Apptainer; anything else, by Pyxis (none)
#   CONTAINER_OPTIONS more words for `apptainer exec`, or for srun with Pyxis
#   DRY_RUN           1: print the command that would be started, and end
#
# of jobs with ranks
#   OVERRIDES         settings that differ from the configuration, as words: "run.seed=1 data.root=/data"
#   LAUNCHER          srun or mpirun (srun)
#   MPI               what srun --mpi takes; `srun --mpi=list` says what there is (pmix; none with comm.engine=torch)
#   RANKS_PER_NODE  (one for each GPU; without GPUs one for each task of the job, else one)
#   OMP_NUM_THREADS   threads of a rank (its cores: --cpus-per-task, else the node's shared out)
#   LOSS_SECONDS      srun: how long the other ranks may take to end once one has ended (40)
#   NETWORK_INTERFACE interface that ranks talk over, such as ib0 (what MPI, NCCL and Gloo choose)
#   CPU_BIND          srun --cpu-bind (Slurm's choice: each rank on its own cores)
#   LAUNCHER_OPTIONS  more words for srun or mpirun
#
# of training
#   MAX_REQUEUES      requeues in a row without a new checkpoint, after which the run is given up (3)
#   The job ends with the run's own exit status: 0 finished, 2 bad usage or configuration, 3 diverged, 4 ranks
#   disagree, 75 stopped after saving, 1 anything else. After 75 and 1 it is requeued, by scontrol.

: "${root:?the batch script says where the project is}"
root=$(cd "$root" && pwd)

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

# answer_help SECTION...: where the script was asked for help, prints its header and these sections of ours.
answer_help() {
    [[ $asked == --help ]] || return 0
    local section
    sed -n '2,/^set /{ /^#SBATCH/s/^#/#   #/; s/^# \{0,1\}//p }' "$0"
    for section in 'of every job' "$@"; do
        sed -n "/^# $section\$/,/^#\{0,1\}\$/{ /^#   /s/^# //p }" "$root/slurm/prologue.sh"
    done
    exit 0
}

# Whatever Slurm sends asks for a stop; to insist is its own affair (KillWait).
trap note_gentle_stop_request TERM INT USR1 USR2 HUP

# The number of one task of an array may be that of the whole array, too.
job=${SLURM_JOB_ID:-}
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() {
    printf 'job %s: %s\n' "$job" "$*" >&2
}

read_words() { # read_words ARRAY TEXT
    read -r -a "$1" <<<"${2:-}" || true
}

read_allocation() {
    nodes=${SLURM_JOB_NUM_NODES:-1}
    gpus=${SLURM_GPUS_ON_NODE:-0}
}

share_nodes_out() {
    local tasks=${SLURM_NTASKS:-$nodes}
    ranks_here=${RANKS_PER_NODE:-}
    if [[ -z $ranks_here ]]; then
        ranks_here=$((gpus > 0 ? gpus : (tasks + nodes - 1) / nodes))
    fi
    [[ $ranks_here =~ ^[1-9][0-9]*$ ]] || usage_error "RANKS_PER_NODE takes a number, 1 or more, not '$ranks_here'"
    rank_count=$((nodes * ranks_here))
    cores_each=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / ranks_here))}
    ((cores_each > 0)) || cores_each=1
}

# NCCL, Open MPI and Gloo each choose a network by themselves: NCCL an InfiniBand that it finds, Open MPI through UCX
# where that is built in. They choose wrongly on nodes with a slow network for administration beside the fast one;
# then all three must be told.
choose_network() {
    [[ -n ${NETWORK_INTERFACE:-} ]] || return 0
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}
    export OMPI_MCA_btl_tcp_if_include=${OMPI_MCA_btl_tcp_if_include:-$NETWORK_INTERFACE}
    export HOROVOD_GLOO_IFACE=${HOROVOD_GLOO_IFACE:-$NETWORK_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK_INTERFACE}
}

# Sets `dist_train`, how our program is started here and in the ranks, and for Pyxis `container_options` of srun.
find_our_program() {
    container_options=()
    local words
    read_words words "${CONTAINER_OPTIONS:-}"
    local image=${CONTAINER:-}
    case $image in
        '') find_programs && return ;;
        *.sif)
            command -v apptainer >/dev/null || fail "CONTAINER is $image, but apptainer is missing on $(uname -n)"
            [[ -r $image ]] || usage_error "CONTAINER $image cannot be read on $(uname -n)"
            local devices=()
            ((gpus == 0)) || devices=(--nv)
            # Slurm's PMIx meets its ranks in a folder that it names in their environment, below /tmp or the spool.
            dist_train=(apptainer exec "${devices[@]}" --bind "$PWD" --bind "$root" "${words[@]}" "$image" python3 -m dist_train)
            ;;
        *)
            container_options=("--container-image=$image" "--container-mounts=$PWD:$PWD,$root:$root" "--container-workdir=$PWD" "${words[@]}")
            dist_train=(srun --nodes=1 --ntasks=1 --overlap --input=none "${container_options[@]}" python3 -m dist_train)
            ;;
    esac
    mpirun=$(command -v mpirun) || mpirun=
}

# Sets `command`: what starts the ranks by `by`, but for our program's arguments.
compose_command() {
    local more name
    read_words more "${LAUNCHER_OPTIONS:-}"
    case $by in
        srun)
            command -v srun >/dev/null || fail "srun is missing on $(uname -n)"
            # Not --kill-on-bad-exit: rank 0 may still be writing how the run ended when another has left.
            command=(srun "--mpi=${MPI:-$default_mpi}" "--nodes=$nodes" "--ntasks=$rank_count" "--ntasks-per-node=$ranks_here"
                "--cpus-per-task=$cores_each" --export=ALL --input=none --kill-on-bad-exit=0 "--wait=${LOSS_SECONDS:-40}")
            # A step has the GPUs that it asks for. All ranks of a node see all of them, and each takes the one of its
            # number: NCCL uses NVLink only between GPUs that a process can see.
            ((gpus == 0)) || command+=("--gpus-per-node=$gpus" --gpu-bind=none)
            ((${SLURM_CPUS_ON_NODE:-1} >= ranks_here * cores_each)) || command+=(--overcommit)
            [[ -z ${CPU_BIND:-} ]] || command+=("--cpu-bind=$CPU_BIND")
            command+=("${container_options[@]}")
            ;;
        mpirun)
            ((!${#container_options[@]})) || usage_error "Pyxis works by srun: leave LAUNCHER out, or give CONTAINER a .sif file"
            need_mpirun
            # Each rank may use all cores of the node: bound to one, its threads would queue up there.
            command=("$mpirun" -np "$rank_count" --map-by "ppr:$ranks_here:node:OVERSUBSCRIBE" --bind-to none --stdin none)
            # mpirun starts its daemons by srun, which gives them the GPUs that this asks for.
            ((gpus == 0)) || export SLURM_GPUS_PER_NODE=$gpus
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

# srun and mpirun hand SIGUSR2 to all ranks; they are ready for it once the run has a status.
stop_through_launcher() {
    grep -q "\"$launch_id\"" "$run_directory/status.json" 2>/dev/null || return 1
    kill -USR2 "$launcher"
}

# Whoever only measures keeps each point that it has finished, and may end at once.
stop_at_once() {
    kill -TERM "$launcher"
}

# train_in_job DEFAULT_CONFIGURATION: runs `train` as the variables say.
train_in_job() {
    answer_help 'of jobs with ranks' 'of training'
    local overrides directory=()
    read_words overrides "${OVERRIDES:-}"
    [[ -z ${RUN_DIR:-} ]] || directory=(--run-dir "$RUN_DIR")
    run_in_job train "${CONFIG:-$1}" "${overrides[@]}" "${directory[@]}"
}

# sweep_in_job DEFAULT_STUDY: trains the run that has this array task's number in the study, unless it has finished.
sweep_in_job() {
    answer_help 'of jobs with ranks' 'of training'
    local study=${STUDY:-$1} overrides words directory=() status=0
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] ||
        usage_error "each run is a task of an array: sbatch --array=\$(dist-train sweep $study --array) slurm/sweep.sh"
    read_words overrides "${OVERRIDES:-}"
    [[ -z ${DIRECTORY:-} ]] || directory=(--directory "$DIRECTORY")
    read_allocation
    find_our_program
    words=$("${dist_train[@]}" sweep "$study" "${overrides[@]}" --only "$SLURM_ARRAY_TASK_ID" --arguments "${directory[@]}") || status=$?
    [[ $status == 0 && -n $words ]] || exit "$status"
    mapfile -t words <<<"$words"
    run_in_job "${words[@]}"
}

# landscape_in_job DEFAULT_TARGETS: runs `landscape` as the variables say.
landscape_in_job() {
    answer_help 'of jobs with ranks'
    local kind=${KIND:-direction} targets target count what options overrides
    read_words targets "${TARGETS:-$1}"
    read_words options "${OPTIONS:-}"
    read_words overrides "${OVERRIDES:-}"
    case $kind in
        interpolate) count=2 what='run directories or checkpoints' ;;
        direction | plane) count=1 what='run directory or checkpoint' ;;
        *) usage_error "KIND is interpolate, direction or plane, not '$kind'" ;;
    esac
    ((${#targets[@]} == count)) || usage_error "TARGETS takes $count $what for KIND=$kind, not '${targets[*]}'"
    for target in "${targets[@]}"; do
        [[ -e $target ]] || usage_error "TARGETS: there is no $target in $PWD"
    done
    prepare_ranks
    launch_or_show stop_at_once landscape "$kind" "${targets[@]}" "${overrides[@]}" "${options[@]}"
    # srun and mpirun hand on the code of bad options, which all ranks end with.
    case $launcher_status in
        0 | "$usage_status") exit "$launcher_status" ;;
    esac
    ((!stop_signals)) || say "stopped: submitted again, it evaluates what is left"
    exit 1
}

# report_in_job DEFAULT_DIRECTORY: runs `report` as the variables say.
report_in_job() {
    answer_help
    local words=(report "${DIRECTORY:-$1}")
    [[ -z ${OUTPUT:-} ]] || words+=(-o "$OUTPUT")
    read_allocation
    find_our_program
    show_alone "${dist_train[@]}" "${words[@]}"
    exec "${dist_train[@]}" "${words[@]}"
}

# Sets all that `launch_or_show` needs; for a training run, by its CONFIG and overrides.
prepare_ranks() {
    by=${LAUNCHER:-srun}
    read_allocation
    share_nodes_out
    choose_network
    find_our_program
    set_rank_environment "${OMP_NUM_THREADS:-$cores_each}"
    # torch.distributed needs nothing of MPI. What is wrong with the configuration is said later, by check_run.
    default_mpi=pmix
    if (($#)) && [[ -z ${MPI:-} && $by == srun && $("${dist_train[@]}" config engine "$@" 2>/dev/null) == torch ]]; then
        default_mpi=none
    fi
    compose_command
}

# show_alone COMMAND...: where that is all that is wanted, prints it, and ends.
show_alone() {
    [[ ${DRY_RUN:-} == 1 ]] || return 0
    printf '%q ' "$@" && echo
    exit 0
}

# launch_or_show STOP COMMAND [ARGUMENT ...]
launch_or_show() {
    local stop=$1
    shift
    show_alone "${command[@]}" "$@"
    check_run "$@"
    say "$nodes nodes (${SLURM_JOB_NODELIST:-$(uname -n)}) x $ranks_here ranks, $gpus GPUs a node, by $by; $1 ${run_directory:-${*:2}}"
    [[ -z ${SLURM_RESTART_COUNT:-} ]] || say "restart $SLURM_RESTART_COUNT"
    # What its parent says of a rank that was killed.
    deaths=$(mktemp)
    trap 'rm -f "$deaths"' EXIT
    launch "$stop" "${command[@]}" "$@"
}

# run_in_job train CONFIG [ARGUMENT ...]: a training job from here to its end.
run_in_job() {
    answer_help 'of jobs with ranks' 'of training'
    prepare_ranks "${@:2}"
    launch_or_show stop_through_launcher "$@"
    end_job
}

end_job() {
    local status=0
    "${dist_train[@]}" outcome "$run_directory" --launch "$launch_id" || status=$?
    case $status in
        1 | "$stopped_status") requeue_job "$status" ;;
    esac
    exit "$status"
}

# requeue_job STATUS: ends the job, to start again where that can help.
requeue_job() {
    local state death
    state=$(squeue --noheader --jobs "$job" --format %T 2>/dev/null) || state=
    if [[ -n $state && $state != RUNNING ]]; then
        say "not requeued by itself: Slurm is ending the job ($state), and requeues it where it preempted it"
        exit "$1"
    fi
    # The rank that died first, where its parent could say so; else what srun says, of all nodes.
    death=$(grep -m 1 'was killed by signal' "$deaths" || paste -s -d ';' "$deaths")
    # Not 75 where the run is given up: a site may requeue by that status.
    "${dist_train[@]}" requeue "$run_directory" --launch "$launch_id" --limit "${MAX_REQUEUES:-3}" --death "$death" || exit 1
    if scontrol requeue "$job"; then
        say "requeued"
    else
        say "scontrol cannot requeue the job: it ends with $stopped_status, by which the site may (RequeueExit), or submit it again"
    fi
    exit "$stopped_status"
}

# shellcheck shell=bash
# Shared by the scripts in this folder; to be sourced.

# shellcheck disable=SC2034
root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034
cache=${DIST_TRAIN_CACHE:-${XDG_CACHE_HOME:+$XDG_CACHE_HOME/dist_train}}
if [[ -z $cache ]]; then # as dist_train/data/cache.py chooses it
    home=${HOME-$(getent passwd "$(id -u)" | cut -d: -f6 || true)}
    [[ -z $home && -z ${HOME+set} ]] && cache=${TMPDIR:-/tmp}/dist_train-$(id -u) || cache=$home/.cache/dist_train
fi

# say TEXT: prints progress on stderr, so that stdout holds only the script's result.
say() {
    printf '%s\n' "$*" >&2
}

# fail TEXT: prints one message, which says how to fix the error, and exits.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# answer_help ARGUMENT...: with -h or --help prints the header of the script, and exits.
answer_help() {
    [[ ${1:-} == -h || ${1:-} == --help ]] || return 0
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 0
}

# own_folders FOLDER...: fails if one exists in which another user could replace files.
own_folders() {
    local folder owner mode probe
    for folder in "$@"; do
        read -r owner mode < <(stat -Lc '%u %a' "$folder" 2>/dev/null) || continue
        [[ $owner == 0 || -O $folder ]] && ! ((0$mode & 0002 && !(0$mode & 01000))) && continue
        # if a new file is not ours, the file system has no owners
        if probe=$(mktemp "$folder/.owner-XXXXXX" 2>/dev/null); then
            [[ -O $probe && $(stat -c %a "$probe") == 600 ]] && owner=known || owner=
            rm -f "$probe"
            [[ $owner == known ]] || continue
        fi
        fail "$folder belongs to another user, or everybody may write there, and code in it would be run; make it your own" \
            "(chown -R, chmod o-w), or set DIST_TRAIN_CACHE to a folder of your own"
    done
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# new_log NAME: prints the path of an empty log file; /dev/null if the disk is full.
new_log() {
    mktemp "${TMPDIR:-/tmp}/dist_train-$1-XXXXXX.log" 2>/dev/null || echo /dev/null
}

log=/dev/null
remove_log() {
    [[ $log == /dev/null ]] || rm -f "$log"
}

# logged COMMAND...: writes its output to $log, and the last lines to $ending, which a full disk does not affect.
ending=
logged() {
    ending=$("$@" 2>&1 </dev/null | { tee -a "$log" 2>/dev/null || true; } | tail -n 2000)
}

# known_cause: prints what to do if the log shows that a disk is full or the network fails.
known_cause() {
    case $ending in
        *"No space left on device"* | *"Disk quota exceeded"* | *"not enough free disk space"*)
            printf '%s\n' "A disk is full. Free some space, or set folders on another disk: DIST_TRAIN_CACHE for Horovod," \
                "TMPDIR for temporary files, PIP_CACHE_DIR for downloads; for .venv, clone elsewhere. Free now:"
            { df -h --output=avail,target "$root" "${TMPDIR:-/tmp}" "${HOME:-/}" 2>/dev/null || true; } | sed 1d | sort -u
            ;;
        *"Failed to establish a new connection"* | *"Temporary failure in name resolution"* | *"Network is unreachable"* | \
            *"Connection refused"* | *"Could not fetch URL"* | *"Read timed out"* | *"ConnectTimeoutError"* | *"ProxyError"* | \
            *"NewConnectionError"* | *"CERTIFICATE_VERIFY_FAILED"* | *"from versions: none"*)
            printf '%s\n' "The package index cannot be reached. Check the network; if it needs a proxy, a mirror or a certificate," \
                "set HTTPS_PROXY, PIP_INDEX_URL or PIP_CERT. On a cluster, run this on a login node."
            ;;
    esac
}

# telling_lines: prints the first errors in $ending, and its last lines.
telling_lines() {
    local last errors
    last=$(tail -n 6 <<<"$ending")
    errors=$(grep -E '(error|Error|ERROR)[: ]|Could NOT|undefined reference|No space left' <<<"$ending" |
        grep -vE 'CalledProcessError|subprocess-exited|egg_info|^ *(raise|File) ' | grep -vxFf <(printf '%s\n' "$last") |
        head -n 5 || true)
    printf '%s\n' ${errors:+"$errors" ...} "$last" | cut -c1-160 | sed 's/^/  | /'
}

# give_up WHAT [ADVICE...]: prints on one screen what failed, what to do, the end of the log and its path, and exits.
give_up() {
    local what=$1 known
    shift
    known=$(known_cause)
    {
        printf 'error: %s\n' "$what"
        [[ -z $known ]] || printf '  %s\n' "${known//$'\n'/$'\n'  }"
        (($# == 0)) || printf '  %s\n' "$@"
        printf 'the end of the log:\n'
        telling_lines
        [[ ! -s $log ]] || printf 'the whole log: %s\n' "$log"
    } >&2
    exit 1
}

# chosen_device: prints DEVICE, cpu or cuda; nothing if torch's build decides.
chosen_device() {
    case ${DEVICE:-} in
        "" | cpu | cuda) printf '%s\n' "${DEVICE:-}" ;;
        *) fail "DEVICE is '$DEVICE'; it must be cpu or cuda" ;;
    esac
}

# chosen_nvcc: prints DIST_TRAIN_NVCC, system or wheel; nothing for the default: system if that builds for torch's CUDA.
chosen_nvcc() {
    case ${DIST_TRAIN_NVCC:-} in
        "" | system | wheel) printf '%s\n' "${DIST_TRAIN_NVCC:-}" ;;
        *) fail "DIST_TRAIN_NVCC is '$DIST_TRAIN_NVCC'; it must be system or wheel" ;;
    esac
}

need_compiler() {
    have g++ || fail "g++ is missing, so Horovod cannot be built; install it: apt-get install g++ (or load your cluster's gcc module)"
    have make || fail "make is missing, so Horovod cannot be built; install it: apt-get install make"
}

# build_jobs [TOP]: prints how many compilers may run at once: one on each core, each with 2 GB of the memory that is
# free, and of what cgroups allow us, as on a login node with a limit for each user. TOP: the folder of proc and sys.
build_jobs() {
    local top=${1:-} controllers path folder file
    {
        awk '/^MemAvailable:/ { print $2 "000" }' "$top/proc/meminfo"
        while IFS=: read -r _ controllers path; do
            case ,$controllers, in
                ,,) folder=$top/sys/fs/cgroup file=memory.max ;;
                *,memory,*) folder=$top/sys/fs/cgroup/memory file=memory.limit_in_bytes ;;
                *) continue ;;
            esac
            path=${path%/}/
            while [[ -n $path ]]; do # what limits a group limits those in it
                path=${path%/*}
                cat "$folder$path/$file" 2>/dev/null || true
            done
        done < <(cat "$top/proc/self/cgroup" 2>/dev/null) # not there if the kernel has no cgroups
    } | awk -v cores="$(nproc)" '
        /^[0-9]+$/ && (!least || $1 < least) { least = $1 }
        END { jobs = int(least / 2e9); print jobs < 1 ? 1 : jobs < cores ? jobs : cores }'
}

# need_headers PYTHON: fails if Python's headers are missing, which Debian has in a separate package.
need_headers() {
    local headers
    headers=$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [[ -f $headers/Python.h ]] ||
        fail "the headers of $1 are missing, so Horovod cannot be built; install them: apt-get install $(basename "$headers")-dev"
}

# Whether the mpicxx on the PATH can build programs: Debian's openmpi-bin has mpicxx without the header.
mpi_builds() {
    have mpicxx && printf '#include <mpi.h>\nint main() { return MPI_Finalize(); }\n' |
        mpicxx -x c++ -o /dev/null - >/dev/null 2>&1
}

# Whether the PATH has a cmake that runs and is new enough for torch.
cmake_builds() {
    local found
    found=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p') && [[ -n $found ]] &&
        [[ $(printf '%s\n' 3.18 "$found" | sort -V | head -n 1) == 3.18 ]]
}

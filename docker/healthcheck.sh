#!/bin/sh
# Fails if a run that this container trains has not written its status.json for too long. Without a run the container
# is healthy.
#
#   HEALTH_RUNS     the folder of runs (/opt/dist_train/runs), including those of studies, one folder deeper
#   HEALTH_SECONDS  how long a run may be silent (600)
set -eu
runs=${HEALTH_RUNS:-/opt/dist_train/runs}
limit=${HEALTH_SECONDS:-600}

now=$(date +%s)
read -r up _ </proc/uptime
started=$(sed 's/.*) //' /proc/1/stat | cut -d ' ' -f 20)
age=$((${up%.*} - started / $(getconf CLK_TCK)))

for file in "$runs"/*/status.json "$runs"/*/*/status.json; do
    # Other containers may train in the same folder, or have died there; with the host's network all have its host name.
    grep -qs "\"host\": \"$(uname -n)\"" "$file" || continue
    grep -qsF "\"pid_namespace\": \"$(readlink /proc/self/ns/pid)\"" "$file" || continue
    grep -q '"state": "\(starting\|running\|stopping\)"' "$file" || continue
    silent=$((now - $(stat -c %Y "$file")))
    if [ "$silent" -gt "$limit" ] && [ "$silent" -lt "$age" ]; then
        echo "$file: not written for $silent s"
        exit 1
    fi
done

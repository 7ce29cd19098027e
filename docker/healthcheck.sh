#!/bin/sh
# Whether what this container trains is alive: no run of its own has left status.json unchanged for too long.
# A container that trains nothing is well.
#
#   HEALTH_RUNS     the folder of runs (/opt/dist_train/runs); those of studies, one folder deeper, are seen as well
#   HEALTH_SECONDS  how long a run may be silent (600)
set -eu
runs=${HEALTH_RUNS:-/opt/dist_train/runs}
limit=${HEALTH_SECONDS:-600}

now=$(date +%s)
read -r up _ </proc/uptime
started=$(sed 's/.*) //' /proc/1/stat | cut -d ' ' -f 20)
age=$((${up%.*} - started / $(getconf CLK_TCK)))

for file in "$runs"/*/status.json "$runs"/*/*/status.json; do
    # Other containers may train in the same folder, and may have died in it; with the host's network all have its name.
    grep -qs "\"host\": \"$(uname -n)\"" "$file" || continue
    grep -qsF "\"pid_namespace\": \"$(readlink /proc/self/ns/pid)\"" "$file" || continue
    grep -q '"state": "\(starting\|running\|stopping\)"' "$file" || continue
    silent=$((now - $(stat -c %Y "$file")))
    if [ "$silent" -gt "$limit" ] && [ "$silent" -lt "$age" ]; then
        echo "$file: nothing new for $silent s"
        exit 1
    fi
done

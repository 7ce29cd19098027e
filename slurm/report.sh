#!/usr/bin/env bash
# One HTML page about a run, a study, or a folder of runs, after their jobs have ended.
#
#   sbatch --dependency=afterok:JOB slurm/report.sh
#   DIRECTORY=runs/paper sbatch --dependency=afterany:ARRAY slurm/report.sh
#
# afterok waits for success, through requeues; if the job cannot succeed any more, this job is cancelled. afterany
# reports the existing results in any case.
#
# Slurm options; those on sbatch's command line take precedence.
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:30:00
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
#   DIRECTORY         a run, a study, or a folder of runs (runs)
#   OUTPUT            the page (DIRECTORY/report.html)
set -euo pipefail

# Slurm runs a copy of this script in another place.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n '0,/^ *Command=/s/^ *Command=\(.*\)/\1/p') || submitted=
root=${DIST_TRAIN_ROOT:-}
[[ -n $root ]] || for root in "${SLURM_SUBMIT_DIR:-}" "${submitted%/*}/.." "${0%/*}/.."; do
    [[ ! -r $root/slurm/prologue.sh ]] || break
done
. "$root/slurm/prologue.sh" || { echo "$0: set DIST_TRAIN_ROOT to the project's folder" >&2 && exit 2; }

report_in_job runs

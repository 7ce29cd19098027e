#!/usr/bin/env bash
# A landscape: loss and accuracy at many points of weight space, divided over the ranks of all nodes.
#
#   TARGETS=runs/lb_8192 OPTIONS="--directions 10" sbatch slurm/landscape.sh
#   KIND=interpolate TARGETS="runs/sb_128 runs/lb_8192" sbatch --nodes=4 slurm/landscape.sh
#   sbatch --dependency=afterok:JOB slurm/landscape.sh
#
# Finished points are kept however the job ends; submit it again to evaluate the remaining ones.
#
# Slurm options; those on sbatch's command line take precedence. The result does not depend on the number of nodes.
#SBATCH --job-name=landscape
#SBATCH --nodes=1-2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
#   KIND              interpolate, direction or plane (direction)
#   TARGETS           runs, RUN@STEP, RUN@best or checkpoints: two for interpolate, otherwise one (runs/lb_8192)
#   OPTIONS           additional options for `dist-train landscape KIND`: "--directions 10 --points 101"
set -euo pipefail

# Slurm runs a copy of this script in another place.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n '0,/^ *Command=/s/^ *Command=\(.*\)/\1/p') || submitted=
root=${DIST_TRAIN_ROOT:-}
[[ -n $root ]] || for root in "${SLURM_SUBMIT_DIR:-}" "${submitted%/*}/.." "${0%/*}/.."; do
    [[ ! -r $root/slurm/prologue.sh ]] || break
done
. "$root/slurm/prologue.sh" || { echo "$0: set DIST_TRAIN_ROOT to the project's folder" >&2 && exit 2; }

landscape_in_job runs/lb_8192

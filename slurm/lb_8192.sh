#!/usr/bin/env bash
# The paper's large batch: global batch 8192 on all GPUs of the nodes, or on their CPUs if there are none.
#
#   sbatch slurm/lb_8192.sh
#   sbatch --nodes=4 --partition=gpu --time=2:00:00 slurm/lb_8192.sh
#   CONFIG=configs/demo.yaml OVERRIDES="run.name=short run.max_steps=50" sbatch slurm/lb_8192.sh
#
# Slurm options; those on sbatch's command line take precedence. The result does not depend on the number of nodes.
#SBATCH --job-name=lb_8192
#SBATCH --nodes=1-2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
#   CONFIG            configuration (configs/lb_8192.yaml)
#   RUN_DIR           the run's folder (run.directory/run.name, relative to the folder of submission)
set -euo pipefail

# Slurm runs a copy of this script in another place.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n '0,/^ *Command=/s/^ *Command=\(.*\)/\1/p') || submitted=
root=${DIST_TRAIN_ROOT:-}
[[ -n $root ]] || for root in "${SLURM_SUBMIT_DIR:-}" "${submitted%/*}/.." "${0%/*}/.."; do
    [[ ! -r $root/slurm/prologue.sh ]] || break
done
. "$root/slurm/prologue.sh" || { echo "$0: set DIST_TRAIN_ROOT to the project's folder" >&2 && exit 2; }

train_in_job "$root/configs/lb_8192.yaml"

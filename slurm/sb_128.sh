#!/usr/bin/env bash
# The paper's small batch: global batch 128, on one GPU. Without GPUs: sbatch --gpus-per-node=0 --cpus-per-task=8
#
#   sbatch slurm/sb_128.sh
#   sbatch --partition=gpu --time=2:00:00 slurm/sb_128.sh
#   OVERRIDES="run.seed=1 run.name=sb_128-seed-1" sbatch slurm/sb_128.sh
#
# Slurm options; those on sbatch's command line take precedence.
#SBATCH --job-name=sb_128
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
#   CONFIG            configuration (configs/sb_128.yaml)
#   RUN_DIR           the run's folder (run.directory/run.name, relative to the folder of submission)
set -euo pipefail

# Slurm runs a copy of this script in another place.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n '0,/^ *Command=/s/^ *Command=\(.*\)/\1/p') || submitted=
root=${DIST_TRAIN_ROOT:-}
[[ -n $root ]] || for root in "${SLURM_SUBMIT_DIR:-}" "${submitted%/*}/.." "${0%/*}/.."; do
    [[ ! -r $root/slurm/prologue.sh ]] || break
done
. "$root/slurm/prologue.sh" || { echo "$0: set DIST_TRAIN_ROOT to the project's folder" >&2 && exit 2; }

train_in_job "$root/configs/sb_128.yaml"

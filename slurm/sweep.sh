#!/usr/bin/env bash
# A study: each array task trains one run, by default on one GPU. Tasks whose run has finished end at once.
#
#   sbatch --array="$(dist-train sweep studies/paper.yaml --array)" slurm/sweep.sh
#   STUDY=studies/fashion.yaml sbatch --array=1-30%8 --gpus-per-node=0 slurm/sweep.sh
#
# Run the first command again to submit the remaining runs. Several nodes or GPUs per run, and cores for all ranks of a
# node together: --nodes=1-2 --gpus-per-node=4 --cpus-per-task=16.
#
# Slurm options of each run; those on sbatch's command line take precedence.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#
#   STUDY             study (studies/paper.yaml)
#   DIRECTORY         folder of studies (the base configuration's run.directory, relative to the folder of submission)
set -euo pipefail

# Slurm runs a copy of this script in another place.
submitted=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n '0,/^ *Command=/s/^ *Command=\(.*\)/\1/p') || submitted=
root=${DIST_TRAIN_ROOT:-}
[[ -n $root ]] || for root in "${SLURM_SUBMIT_DIR:-}" "${submitted%/*}/.." "${0%/*}/.."; do
    [[ ! -r $root/slurm/prologue.sh ]] || break
done
. "$root/slurm/prologue.sh" || { echo "$0: set DIST_TRAIN_ROOT to the project's folder" >&2 && exit 2; }

sweep_in_job "$root/studies/paper.yaml"

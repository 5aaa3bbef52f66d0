#!/usr/bin/env bash
# Trains on the GPUs of one or several nodes of a Slurm cluster. See usage below.
#SBATCH --job-name=llamapro
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llamapro-%j.log
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: sbatch [option of sbatch ...] launch/slurm_gpu.sh [--dry-run] CONFIG [key.path=value ...]
       launch/slurm_gpu.sh --help

Starts `llamapro train CONFIG ...` once for each GPU; the processes find each other. To be submitted
in the checkout, which, like the model, the data and the output, lies on a file system that all
nodes mount. Make the environment there once:
  launch/local.sh --accelerator cuda12 --install-only

The options of sbatch are those in the head of this script (one node of 8 GPUs, 5 minutes before the
time limit SIGTERM) unless the command line changes them. GPUs are asked for with --gres and tasks
with --ntasks-per-node: with --gpus-per-task a process would not see the GPUs of the others.
Five minutes before its time limit, and when it is preempted, training saves and the job goes back
into the queue, where it resumes. So it does when the watchdog ended it.

  --dry-run   print the command, run nothing
  --help      this text

environment:
  VENV   the environment; default: .venv-cuda13 or .venv-cuda12 in the checkout

example: two nodes of 8 GPUs for a day
  sbatch --nodes=2 --time=24:00:00 launch/slurm_gpu.sh configs/llama2_7b_pro.yaml
USAGE
}

die() {
  echo "error: $1" >&2
  exit 2
}

dry_run=0
while (($# > 0)); do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --dry-run) dry_run=1; shift ;;
    -*) die "unknown option $1; launch/slurm_gpu.sh --help lists them" ;;
    *) break ;;
  esac
done
if (($# == 0)); then
  usage >&2
  die "CONFIG is missing"
elif [[ ! -f "$1" ]]; then
  die "$1: no such configuration file"
fi

# Slurm runs a copy of this script, so that its own place says nothing.
root="${SLURM_SUBMIT_DIR:-$PWD}"
if [[ ! -f "$root/pyproject.toml" ]]; then die "$root is no checkout; submit the job in one"; fi
if [[ -z "${VENV:-}" ]]; then
  VENV="$root/.venv-cuda13"
  if [[ ! -d "$VENV" ]]; then VENV="$root/.venv-cuda12"; fi
fi
command=(srun "$VENV/bin/llamapro" train "$@")
if ((dry_run)); then
  printf '%q ' JAX_PLATFORMS=cuda,cpu "${command[@]}"
  echo
  exit 0
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  die "this is no Slurm job; submit it: sbatch launch/slurm_gpu.sh $*"
elif [[ ! -x "$VENV/bin/llamapro" ]]; then
  die "$VENV/bin/llamapro: no such program; make the environment: \
launch/local.sh --accelerator cuda12 --install-only"
fi

# Named, so that jax stops when it cannot start a GPU, and does not train on the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
status=0
"${command[@]}" || status=$?
# 42: asked to stop, and saved. 43: nothing moved; it goes on from the newest checkpoint.
if ((status == 42 || status == 43)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

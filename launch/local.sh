#!/usr/bin/env bash
# Trains on this machine: environment, install, the entry of every launcher. See usage below.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/local.sh [--accelerator KIND] [--dry-run] [--takeover] CONFIG [key.path=value ...]
       launch/local.sh [--accelerator KIND] [--dry-run] --install-only

Sets up an environment for this machine (once) and trains in it: the entry of every launcher,
`python -m llamapro_jax.launch.entry CONFIG ...`.

  --accelerator KIND   cpu, cuda12, cuda13 or tpu; without it, what the NVIDIA driver can run,
                       or cpu when there is none
  --install-only       set up and stop
  --takeover           end the run that trains in the output directory now, and go on from there
  --dry-run            print the commands, run none
  --help               this text

environment:
  PYTHON   the Python (3.11 or newer) that makes the environment; default: the first that fits
  VENV     the environment; default: .venv beside pyproject.toml for cpu, .venv-KIND for another

example:
  launch/local.sh configs/llama2_7b_pro.yaml optimizer.learning_rate=1e-4
USAGE
}

die() {
  echo "error: $1" >&2
  exit 2
}

run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# The CUDA generation that the installed driver runs: 13 asks for driver 580, 12 for 525.
detect_accelerator() {
  local driver major
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)" \
    || driver=""
  major="${driver%%.*}"
  if [[ ! "$major" =~ ^[0-9]+$ ]]; then
    echo cpu
  elif ((major >= 580)); then
    echo cuda13
  elif ((major >= 525)); then
    echo cuda12
  else
    echo "warning: NVIDIA driver $driver is older than 525, which CUDA 12 needs; using cpu" >&2
    echo cpu
  fi
}

# Debian's python3 comes without ensurepip, and then cannot make an environment.
fits() {
  "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    elif [[ "$candidate" == "${PYTHON:-}" ]]; then
      break
    fi
  done
  die "${PYTHON:-python3} is missing, older than Python 3.11, or cannot make environments \
(on Debian and Ubuntu: apt-get install python3-venv); set PYTHON=/path/to/python3.11"
}

# The stamp is written last and compared with pyproject.toml, so that an interrupted or outdated
# install is done again.
install() {
  # gcs: an output may be gs://...
  local extra="[gcs]" stamp="$venv/.stamp-$accelerator"
  if [[ "$accelerator" != cpu ]]; then extra="[$accelerator,gcs]"; fi
  if [[ -e "$stamp" && ! "$root/pyproject.toml" -nt "$stamp" ]]; then return; fi
  echo "Installing llamapro_jax$extra into $venv (some minutes the first time)" >&2
  local python
  python="$(find_python)"
  run "$python" -m venv "$venv"
  run "$venv/bin/python" -m pip --disable-pip-version-check install -qq --editable "$root$extra"
  run touch "$stamp"
}

accelerator=""
dry_run=0
install_only=0
takeover=()
while (($# > 0)); do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --accelerator)
      if (($# < 2)); then die "--accelerator needs one of cpu, cuda12, cuda13, tpu"; fi
      accelerator="$2"
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    --install-only) install_only=1; shift ;;
    --takeover) takeover=(--takeover); shift ;;
    -*) die "unknown option $1; launch/local.sh --help lists them" ;;
    *) break ;;
  esac
done

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${accelerator:=$(detect_accelerator)}" in
  cpu) platforms=cpu ;;
  cuda12 | cuda13) platforms=cuda,cpu ;;
  tpu) platforms=tpu,cpu ;;
  *) die "--accelerator $accelerator: is none of cpu, cuda12, cuda13, tpu" ;;
esac
if ((install_only)); then
  if (($# > 0)); then die "--install-only trains nothing, so it takes no $1"; fi
elif (($# == 0)); then
  usage >&2
  die "CONFIG is missing"
elif [[ ! -f "$1" ]]; then
  die "$1: no such configuration file"
fi

if [[ "$accelerator" == cpu ]]; then
  venv="${VENV:-$root/.venv}"
else
  venv="${VENV:-$root/.venv-$accelerator}"
fi
install
if ((install_only)); then exit 0; fi
# Named, so that jax stops when it cannot start the accelerator, and does not train on the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-$platforms}"
entry=("$venv/bin/python" -m llamapro_jax.launch.entry ${takeover[@]+"${takeover[@]}"})
if ((dry_run)); then
  run env "JAX_PLATFORMS=$JAX_PLATFORMS" "${entry[@]}" "$@"
else
  exec "${entry[@]}" "$@"
fi

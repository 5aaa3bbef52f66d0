#!/usr/bin/env bash
# Trains on a Cloud TPU VM or on all hosts of a slice, from a workstation with gcloud. See usage below.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/tpu_vm.sh [train] --name NAME --zone ZONE [--project PROJECT] [--dry-run]
                        --config CONFIG [key.path=value ...]
       launch/tpu_vm.sh install --name NAME --zone ZONE [--project PROJECT] [--dry-run]
       launch/tpu_vm.sh logs --name NAME --zone ZONE [--project PROJECT] [--dry-run] [--follow]
                             [--worker N]
       launch/tpu_vm.sh stop --name NAME --zone ZONE [--project PROJECT] [--dry-run]

train    copies this checkout to all workers (hosts) of a TPU VM that exists, installs it there with
         the tpu extra and starts `llamapro train CONFIG ...` on each, detached: the connection may
         go. The workers find each other. The same command again resumes the run.
install  does the first two and stops, to prepare models and data there before a run
logs     shows the last lines of the output of training; with --follow, the coming ones too.
         Of several workers the first one writes it
stop     ends training on all workers (SIGTERM)

  --name NAME         the TPU VM; for a queued resource, the --node-id it was created with
  --zone ZONE         its zone
  --project PROJECT   its project; default: that of gcloud's configuration
  --config CONFIG     a run configuration inside this checkout
  --worker N          logs: of this worker; default: 0. The others say little but errors of theirs
  --dry-run           print every command, run none
  --help              this text

Paths in CONFIG are paths on the TPU VM, from ~/llamapro_jax. With several workers, model, data and
output lie on a file system that all of them mount: see launch/README.md.

example:
  launch/tpu_vm.sh --name my-v5e-8 --zone us-west4-a --config configs/llama2_7b_pro.yaml
  launch/tpu_vm.sh logs --name my-v5e-8 --zone us-west4-a --follow
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

# tpu_vm VERB [argument ...]: one gcloud command on this TPU VM.
tpu_vm() {
  local verb="$1"
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" "${place[@]}"
}

on_all_workers() {
  tpu_vm ssh "$name" --worker=all --command="$1"
}

require_workers() {
  local addresses
  # The addresses of the workers, separated by semicolons.
  if ((dry_run)); then
    tpu_vm describe "$name" '--format=value(networkEndpoints[].ipAddress)'
    return
  fi
  addresses="$(tpu_vm describe "$name" '--format=value(networkEndpoints[].ipAddress)')"
  if [[ -z "$addresses" ]]; then
    die "$name has no worker yet; wait until its state is READY"
  elif [[ "$addresses" == *";"* ]]; then
    echo "$name has several workers ($addresses): model, data and output must lie on a file system \
that all of them mount."
  fi
}

# Copies what an install and a run need, and nothing else (a checkout may hold models), and
# installs it.
install_checkout() {
  local archive
  on_all_workers "$is_running
$refuse_second"
  if ((dry_run)); then
    archive=llamapro_jax.tar.gz
  else
    temporary="$(mktemp -d)"
    trap 'rm -rf "$temporary"' EXIT
    archive="$temporary/llamapro_jax.tar.gz"
  fi
  run env COPYFILE_DISABLE=1 tar -C "$root" --exclude=__pycache__ -czf "$archive" \
    pyproject.toml README.md LICENSE llamapro_jax launch configs ${config:+"$config"}
  tpu_vm scp "$archive" "$name:llamapro_jax.tar.gz" --worker=all
  on_all_workers "$install"
}

# Remote commands. The quotes keep what the TPU VM has to expand.
# shellcheck disable=SC2016
{
  is_running='is_running() { pid="$(cat ~/llamapro_jax/train.pid 2>/dev/null)" &&
  grep -Eaq "llamapro|local\.sh" "/proc/$pid/cmdline" 2>/dev/null; }'
  refuse_second='if is_running; then
  echo "error: a training run is under way here (process $pid): launch/tpu_vm.sh stop ..." >&2; exit 1; fi'
  # Old modules are removed: a file that the new checkout no longer has would still be imported.
  # TPU VM images for v4 to v6e come with Python 3.10.
  install='set -e
mkdir -p ~/llamapro_jax && cd ~/llamapro_jax
rm -rf llamapro_jax launch && tar -xzf ../llamapro_jax.tar.gz
fits() { "$1" -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }
fits python3 || fits python3.13 || fits python3.12 || fits python3.11 ||
  { sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv; }
launch/local.sh --accelerator tpu --install-only'
  stop='if is_running; then kill -TERM "$pid" && echo "stopping process $pid";
else echo "no training run is under way"; fi'
}

verb=train
case "${1:-}" in
  train | install | logs | stop) verb="$1"; shift ;;
esac
name="" zone="" project="" config="" worker=""
dry_run=0
follow=""
while (($# > 0)); do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --name | --zone | --project | --config | --worker)
      if (($# < 2)); then die "$1 needs a value"; fi
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    --follow) follow=" -F"; shift ;;
    -*) die "unknown option $1; launch/tpu_vm.sh --help lists them" ;;
    *) break ;;
  esac
done
for override in "$@"; do
  # An option after the overrides would otherwise reach the TPU VM and be missed here.
  if [[ ! "$override" =~ ^[A-Za-z_][^=]*= ]]; then
    die "$override: is neither train, install, logs or stop, nor a key.path=value; options come first"
  fi
done
if [[ -z "$name" ]]; then die "--name is missing: which TPU VM?"; fi
if [[ -z "$zone" ]]; then die "--zone is missing: where is $name?"; fi
if [[ -n "$follow" && "$verb" != logs ]]; then die "--follow belongs to logs, not to $verb"; fi
if [[ -n "$worker" && "$verb" != logs ]]; then die "--worker belongs to logs, not to $verb"; fi
if [[ -n "$config" && "$verb" != train ]]; then die "--config belongs to train, not to $verb"; fi
if [[ "$verb" != train ]] && (($# > 0)); then die "$verb takes no $1"; fi
place=("--zone=$zone")
if [[ -n "$project" ]]; then place+=("--project=$project"); fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "$verb" in
  train)
    if [[ -z "$config" ]]; then die "--config is missing: what is to be trained?"; fi
    if [[ ! -f "$config" ]]; then die "--config $config: no such file"; fi
    path="$(cd "$(dirname "$config")" && pwd)/$(basename "$config")"
    config="${path#"$root"/}"
    if [[ "$config" == "$path" ]]; then
      die "--config $path: is outside $root, which is what gets copied; copy it to configs/"
    fi
    command="launch/local.sh --accelerator tpu$(printf ' %q' "$config" "$@")"
    require_workers
    install_checkout
    # Its own session and no terminal: it outlives the connection.
    on_all_workers "cd ~/llamapro_jax || exit
nohup setsid $command >>train.log 2>&1 </dev/null &
echo \$! >train.pid"
    if ((!dry_run)); then
      echo "Training runs on $name. Its output:"
      echo "  launch/tpu_vm.sh logs --name $name --zone $zone${project:+ --project $project} --follow"
    fi
    ;;
  install)
    require_workers
    install_checkout
    ;;
  logs)
    tpu_vm ssh "$name" "--worker=${worker:-0}" --command="tail -n 50$follow ~/llamapro_jax/train.log"
    ;;
  stop) on_all_workers "$is_running
$stop" ;;
esac

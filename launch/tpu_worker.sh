#!/usr/bin/env bash
# On one host of a TPU slice: installs the package, starts training, says how it stands.
# launch/tpu.sh calls it, through ssh or the start-up script of the host. See usage below.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/tpu_worker.sh [--dry-run] VERB [argument ...]

On one host of a TPU slice, as root; what it keeps lies two directories above this script.

install                       takes what was unpacked beside the checkout, and installs it
start CONFIG [key=value ...]  starts training, apart from this connection
boot CONFIG [key=value ...]   install and start, unless training has ended for good
status                        one line: @llamapro HOST STATE STATUS STEP
                              STATE: none, installing, installed, running, ended, stopped, lost
stop                          ends training (SIGTERM, which saves); it is not started again
run CONFIG [key=value ...]    what `start` starts

  --dry-run   print the commands that change something, run none
  --help      this text

example:
  sudo /opt/llamapro/checkout/launch/tpu_worker.sh status
USAGE
}

die() {
  echo "error: $(hostname): $1" >&2
  exit 2
}

do_it() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

is_running() {
  case "$(systemctl is-active llamapro 2>/dev/null)" in
    # While it is asked to stop, it still saves.
    active | activating | deactivating | reloading) return 0 ;;
    *) return 1 ;;
  esac
}

# Whether the process that installs lives.
is_installing() {
  local process
  process="$(cat "$home/installing" 2>/dev/null)" && kill -0 "$process" 2>/dev/null
}

note_installing() {
  if ((!dry_run)); then echo "$$" >"$home/installing"; fi
}

# Debian's python3 comes without ensurepip, and then cannot make an environment.
fits() {
  "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The images of TPU VMs for v4 to v6e come with Python 3.10.
require_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if fits "$candidate"; then return; fi
  done
  # Right after boot the system's own updates hold the lock.
  do_it apt-get -qq -o DPkg::Lock::Timeout=600 update
  do_it apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3.11 python3.11-venv
}

install() {
  local name
  if is_running; then die "a training run is under way here; stop it first: launch/tpu.sh stop"; fi
  if ! is_installing; then note_installing; fi
  if [[ -d "$home/incoming" ]]; then
    do_it mkdir -p "$home/checkout"
    for name in "$home"/incoming/*; do
      # Whole directories: a module that the new checkout no longer has would still be imported.
      do_it rm -rf "$home/checkout/$(basename "$name")"
      do_it mv "$name" "$home/checkout/"
    done
    do_it rmdir "$home/incoming"
  fi
  require_python
  do_it "$home/checkout/launch/local.sh" --accelerator tpu --install-only
  # `boot`, which goes on, has its own number there.
  if [[ "$(cat "$home/installing" 2>/dev/null)" == "$$" ]]; then rm "$home/installing"; fi
}

# As a unit of systemd it is stopped before the network is, and has its time to save.
start() {
  if is_running; then
    echo "$(hostname): a training run is under way already"
    return
  fi
  do_it rm -f "$home/ended" "$home/stopped"
  do_it touch "$home/started"
  do_it systemd-run --quiet --collect --unit=llamapro --property=After=network-online.target \
    --property=KillMode=mixed --property=TimeoutStopSec=600 --property=LimitMEMLOCK=infinity \
    --property=LimitNOFILE=1048576 --setenv=HOME="$HOME" --setenv=PATH="$PATH" \
    bash "$home/checkout/launch/tpu_worker.sh" run "$@"
}

# Whether training has ended in a way that another start would not mend: a table of
# docs/reliability.md, where 130 is a death by a signal (SIGINT) that somebody wanted.
has_ended() {
  case "$(cat "$home/ended" 2>/dev/null)" in
    "" | 42 | 43) return 1 ;;
    130) return 0 ;;
    129 | 13[1-9] | 1[4-8][0-9] | 19[0-2]) return 1 ;;
    *) return 0 ;;
  esac
}

boot() {
  local attempt
  if [[ -e "$home/stopped" ]] || has_ended; then
    echo "training has ended here for good; it is not started again"
    return
  fi
  note_installing
  for attempt in 1 2 3; do
    # In a shell of its own, in which `set -e` holds.
    if do_it bash "$home/$from/launch/tpu_worker.sh" install; then
      do_it bash "$home/checkout/launch/tpu_worker.sh" start "$@"
      do_it rm -f "$home/installing"
      return
    fi
    echo "installing failed ($attempt of 3)"
    if [[ -d "$home/checkout/launch" ]]; then from=checkout; fi
    sleep 30
  done
  # Not an end: the supervisor sees a host on which nothing began, and sets it up through ssh.
  rm -f "$home/installing"
  exit 1
}

run() {
  local child status signalled=1
  cd "$home/checkout"
  trap 'signalled=1; kill -TERM "$child" 2>/dev/null || true' TERM
  launch/local.sh --accelerator tpu "$@" >>"$home/log" 2>&1 </dev/null &
  child=$!
  # A signal ends `wait`, and then it is asked once more.
  while ((signalled)); do
    signalled=0
    status=0
    wait "$child" || status=$?
  done
  echo "$status" >"$home/ended.new"
  mv "$home/ended.new" "$home/ended"
  exit "$status"
}

status() {
  local state=none status="-" step=""
  if is_running; then
    state=running
  elif is_installing; then
    state=installing
  elif is_running; then
    # It was started between the two questions.
    state=running
  elif [[ -e "$home/stopped" ]]; then
    state=stopped
  elif [[ -e "$home/ended" ]]; then
    state=ended
  elif [[ -e "$home/started" ]]; then
    state=lost
  elif [[ -e "$home/checkout/pyproject.toml" ]]; then
    state=installed
  fi
  if [[ "$state" == ended || "$state" == stopped ]]; then
    status="$(cat "$home/ended" 2>/dev/null || echo -)"
  fi
  if [[ -e "$home/log" ]]; then
    step="$(sed -nE 's/.*: going on from step ([0-9]+).*/\1/p; s/^step ([0-9]+): saved.*/\1/p' \
      "$home/log" | sort -n | tail -n 1)"
  fi
  echo "@llamapro $(hostname) $state $status ${step:--}"
}

stop() {
  do_it touch "$home/stopped"
  if is_running; then
    do_it systemctl stop --no-block llamapro
    echo "$(hostname): training saves and stops"
  else
    echo "$(hostname): no training run is under way"
  fi
}

dry_run=0
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
home="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# Unpacked, but not installed yet.
from="$(basename "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)")"
verb="${1:-}"
if (($# > 0)); then shift; fi
case "$verb" in
  --help | -h) usage ;;
  install | status | stop)
    if (($# > 0)); then die "$verb takes no $1"; fi
    "$verb"
    ;;
  start | boot | run)
    if (($# == 0)); then die "$verb: CONFIG is missing"; fi
    "$verb" "$@"
    ;;
  "") usage >&2; exit 2 ;;
  *) die "unknown verb $verb; launch/tpu_worker.sh --help lists them" ;;
esac

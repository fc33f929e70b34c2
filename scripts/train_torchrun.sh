#!/usr/bin/env bash
# Trains on one machine, a process a GPU; goes on where OUT holds a checkpoint.
#
#   scripts/train_torchrun.sh RECIPE OUT [KEY=VALUE]...
#
# NPROC     processes: as many as GPUs unless set; to be set where there is none
# FOVEATE   the command, `foveate` unless set
#
# SIGTERM, SIGUSR1 and Ctrl-C let the step in progress end, save a checkpoint and exit: 0 after the signals, 130 after
# Ctrl-C. A second one ends everything at once.
set -euo pipefail
if [ $# -lt 2 ] || [[ $1 == -* || $2 == -* || $2 == *=* ]]; then
  echo "usage: scripts/train_torchrun.sh RECIPE OUT [KEY=VALUE]..." >&2
  exit 2
fi
recipe=$1 out=$2
shift 2
nproc=${NPROC:-gpu} # `gpu` is torchrun's word for as many as there are
if ! [[ $nproc =~ ^([1-9][0-9]*|gpu)$ ]]; then
  echo "train_torchrun: NPROC is '$nproc'; accepted: a number of processes from 1" >&2
  exit 2
fi

# Job control gives torchrun a process group of its own, so a terminal's Ctrl-C comes to this script alone. torchrun
# would pass a signal on, but kill the processes 30 s later and fail: they are told directly, and it sees them end well.
set -m
torchrun --standalone --nproc-per-node "$nproc" --no-python \
  "${FOVEATE:-foveate}" train "$recipe" "$@" --out "$out" --auto-resume &
launcher=$!
stopped='' interrupted=''
# shellcheck disable=SC2329 # the traps below call it
stop() { # SIGNAL
  interrupted=1
  if [ -n "$stopped" ]; then
    kill -KILL -- "-$launcher" 2>/dev/null || true
  else
    stopped=$1
    pkill -TERM -P "$launcher" || kill -TERM "$launcher" # without processes yet, torchrun itself
  fi
}
trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop USR1' USR1
while :; do
  status=0 interrupted=
  wait "$launcher" || status=$?
  # A trapped signal ends `wait` with a status above 128, and not the run.
  [ -n "$interrupted" ] && [ "$status" -gt 128 ] || break
done
[ "$stopped" != INT ] || status=130
exit "$status"

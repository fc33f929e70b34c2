#!/usr/bin/env bash
# Trains on the machines of a hostfile through DeepSpeed's launcher; goes on where OUT holds a checkpoint.
#
#   scripts/train_deepspeed.sh HOSTFILE RECIPE OUT [KEY=VALUE]...
#
# HOSTFILE has a line for each machine: `NAME slots=GPUS`. This one needs ssh without a password to each, and pdsh; the
# folder it is started in, the environment and OUT have to be the same on all. The launcher starts any engine; ZeRO is the
# recipe's (`engine: zero3`, or engine=zero2 here).
#
# MASTER_ADDR   address of the first machine; asked of it by ssh unless set
# MASTER_PORT   29500 unless set
# LAUNCHER      pdsh unless set; openmpi, mpich, slurm … are started by their own commands
# FOVEATE       the command, `foveate` unless set
#
# This launcher has no stop that saves: it ends loader processes too. Killed, a run goes on from its last checkpoint.
set -euo pipefail
if [ $# -lt 3 ] || [[ $1 == -* || $2 == -* || $3 == -* || $3 == *=* ]]; then
  echo "usage: scripts/train_deepspeed.sh HOSTFILE RECIPE OUT [KEY=VALUE]..." >&2
  exit 2
fi
# Without one DeepSpeed would train on this machine alone.
if [ ! -f "$1" ]; then
  echo "train_deepspeed: $1: no such hostfile; accepted: a file with lines NAME slots=GPUS" >&2
  exit 2
fi
hostfile=$(realpath "$1") recipe=$2 out=$3
shift 3
foveate=$(command -v "${FOVEATE:-foveate}")
options=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --no_python --no_local_rank)
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
[ -z "${LAUNCHER:-}" ] || options+=(--launcher "$LAUNCHER")

# DeepSpeed puts the folder that it is started in on Python's path; in this repository's root that would shadow a library.
# So it is started elsewhere, and `env` goes back.
here=$PWD
cd /
exec deepspeed "${options[@]}" env -C "$here" "PYTHONPATH=${PYTHONPATH:-}" \
  "$foveate" train "$recipe" "$@" --out "$out" --auto-resume

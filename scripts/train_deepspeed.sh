#!/usr/bin/env bash
# Trains on the machines of a hostfile through DeepSpeed's launcher; goes on where OUT holds a checkpoint.
#
#   scripts/train_deepspeed.sh HOSTFILE RECIPE OUT [KEY=VALUE]...
#
# HOSTFILE has a line for each machine: `NAME slots=GPUS`. The machine that this is called on needs pdsh, and ssh to
# each without a password; this folder, the environment with foveate and OUT have to be the same on all. Which ZeRO, or
# plain DDP, is the recipe's `engine` (engine=zero2 changes it).
#
# MASTER_ADDR   address of the first machine; it is asked by ssh unless set
# MASTER_PORT   29500 unless set
# FOVEATE       the command, `foveate` unless set
#
# Variables that begin with NCCL, UCX and PYTHON reach the other machines; lines NAME=VALUE in ~/.deepspeed_env add
# others. This launcher ends a run at a signal, saved or not: started again, it goes on from the last checkpoint.
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
if ! foveate=$(command -v "${FOVEATE:-foveate}"); then
  echo "train_deepspeed: ${FOVEATE:-foveate}: no such command; accepted: FOVEATE=path of it" >&2
  exit 2
fi
options=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --no_python --no_local_rank)
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")

# DeepSpeed puts the folder that it is started in on Python's path; this repository's root would shadow a library there.
# So it is started elsewhere, and `env` goes back.
here=$PWD
cd /
exec deepspeed "${options[@]}" env -C "$here" "PYTHONPATH=${PYTHONPATH:-}" \
  "$foveate" train "$recipe" "$@" --out "$out" --auto-resume

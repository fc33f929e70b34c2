#!/usr/bin/env bash
# Makes the shards that the tiny-* recipes train on, from the embedded data: 30 MB in about a minute.
#
#   scripts/tiny_data.sh [OUT]      OUT is runs/tiny-data unless given, where the recipes look
#
# FOVEATE names the command. What is there already and whole stays.
set -euo pipefail
if [ $# -gt 1 ] || [[ ${1:-} == -* ]]; then
  echo "usage: scripts/tiny_data.sh [OUT]" >&2
  exit 2
fi
out=${1:-runs/tiny-data}
foveate=${FOVEATE:-foveate}
mkdir -p "$out"

make() { # NAME SOURCE
  "$foveate" data make "$2" "$out/$1" --documents-per-shard 150 --workers 1
}

make captions 'glyphs:captions?documents=600&objects=1-8'
make pages 'glyphs:interleaved?documents=300&objects=1-4'
make chat 'glyphs:scene_chat?documents=600&objects=4-12&turns=2-6'
make clips 'glyphs:clip_chat?documents=250&frames=2-8'
make needles 'glyphs:needle_chat?documents=250&frames=6-12'

# Text alone, with questions and answers in fields of their own, as FLAN has them: which cell is in a row and column.
aside=$(mktemp "$out/.text-XXXXXX.jsonl")
trap 'rm -f "$aside"' EXIT
for _ in 1 2 3 4; do
  for row in 1 2 3 4; do
    for column in 1 2 3 4; do
      cell=$(printf 'abcd' | cut -c "$column")$row
      printf '{"inputs": "what is row %s column %s ?", "targets": "row %s column %s is %s"}\n' \
        "$row" "$column" "$row" "$column" "$cell"
    done
  done
done >"$aside"
mv "$aside" "$out/text.jsonl"
make text "$out/text.jsonl"

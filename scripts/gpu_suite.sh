#!/usr/bin/env bash
# Runs on a machine with a CUDA device what can't be shown without one, and writes the results as JSON.
#
#   scripts/gpu_suite.sh OUT [PIECE ...]      all pieces, or the ones named; each takes less than 10 minutes
#
# Pieces:
#   tests  the tests marked gpu
#   train  `foveate bench train` of the 2B shape at 8k tokens: packed against padded, parts of a step, MFU, memory with
#          and without the fused loss. TRAIN_OPTIONS replaces "--checkpointing tower --workers 4".
#   zero   the same steps of the 0.5B shape with plain torch, ZeRO-2 and ZeRO-3, where DeepSpeed is installed
#   prefill `foveate bench prefill` of LLaVA-1.5-7B, NVILA-8B and Qwen2.5-VL-7B shapes: time to the first token, decode
#          and memory, unpruned against methods inside the LLM, with 576 to 30,000 visual tokens
#   prefill-tower  the same from pixels on, of LLaVA-1.5-7B's and NVILA-8B's shapes, with methods after the tower too
#   encode `foveate bench encode` of SigLIP so400m: tower and projector by tiling and projector, against one tile an image
#   decode `foveate bench decode` of Qwen2-7B's shape: 16 sequences of 32k tokens, and one of 128k
#   kernels `foveate bench kernels` of its heads: 1, 2 and 16 sequences of 32k tokens, whole and Quest's 1/16 of the pages
#          (transformers' QuantizedCache, flash-attn and flashinfer are measured where they are installed)
#   parallel `foveate bench parallel --kernel`: what a ring computes its blocks with, of 8k and 64k tokens
# PYTHON names the interpreter; the package need not be installed. COMMIT says what is measured where git does not.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${1:?usage: scripts/gpu_suite.sh OUT [PIECE ...]}
shift
pieces=("$@")
[ ${#pieces[@]} -gt 0 ] || pieces=(tests train zero encode prefill prefill-tower decode kernels parallel)
mkdir -p "$out"
out=$(cd "$out" && pwd)

# The root is the package, so a folder outside it that links to it as `foveate` is what can be imported from.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root" "$links/foveate"
export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)}
export COMMIT=$commit GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000}
cd "$links" # not the root: its kernels/ would be found in the place of the library of that name

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_suite: $python (set PYTHON) has no torch that sees a CUDA device" >&2
  exit 2
fi
# bench SECONDS NAME ARGUMENT...: writes OUT/NAME.json, and OUT/NAME.log with what was said.
bench() {
  local seconds=$1 name=$2
  shift 2
  timeout "$seconds" "$python" -c 'from foveate.cli import main; main()' bench "$@" --json \
    >"$out/$name.json" 2> >(tee "$out/$name.log" >&2) || { echo "gpu_suite: $name failed" >&2; rm -f "$out/$name.json"; return 1; }
  cat "$out/$name.json"
}

status=0
for piece in "${pieces[@]}"; do
  case $piece in
    tests)
      # Only the files that have such tests: the others import what this machine may not have.
      mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' "$root/tests")
      timeout 590 "$python" -m pytest "${files[@]}" --rootdir "$root" -c "$root/pyproject.toml" -m gpu -p no:cacheprovider \
        --junitxml "$links/tests.xml" 2>&1 | tee "$out/tests.log" || status=1
      "$python" "$root/scripts/junit_to_results.py" "$links/tests.xml" "$commit" >"$out/gpu_tests.json"
      ;;
    train)
      read -ra options <<<"${TRAIN_OPTIONS:---checkpointing tower --workers 4}"
      bench 590 bench_train_2b train --model 2b --tokens 8192 --steps 20 "${options[@]}" || status=1
      ;;
    zero)
      if ! "$python" -c 'import deepspeed' 2>/dev/null; then
        echo "gpu_suite: zero: DeepSpeed is not installed, so nothing was run" | tee "$out/bench_zero.log"
        continue
      fi
      for engine in torch zero2 zero3; do
        bench 190 "bench_$engine" train --model 0.5b --tokens 8192 --steps 10 --workers 4 --engine "$engine" || status=1
      done
      ;;
    encode)
      bench 290 bench_encode encode --shape so400m || status=1
      ;;
    prefill)
      methods=(--prune fastv:layer=2,keep=0.5 --prune fastv:layer=2,keep=0.25 --prune fastv:layer=2,keep=0.1 --prune sparsevlm)
      bench 190 bench_prefill_llava prefill --shape llava-1.5-7b --visual 576,2880,10000 "${methods[@]}" \
        --prune pyramiddrop || status=1
      bench 190 bench_prefill_nvila prefill --shape nvila-8b --visual 576,2880,30000 "${methods[@]}" \
        --prune pyramiddrop:layers=7/14/21 --steps 128 || status=1
      bench 190 bench_prefill_qwen prefill --shape qwen2.5-vl-7b --visual 576,2880,30000 "${methods[@]}" \
        --prune pyramiddrop:layers=7/14/21 || status=1
      ;;
    prefill-tower)
      methods=(--prune visionzip --prune fastervlm:keep=0.25 --prune vtc-cls:keep=0.25 --prune fastv:layer=2,keep=0.25)
      bench 290 bench_prefill_tower_llava prefill --tower --shape llava-1.5-7b --visual 576,2880 "${methods[@]}" || status=1
      bench 290 bench_prefill_tower_nvila prefill --tower --shape nvila-8b --visual 605,2904 "${methods[@]}" || status=1
      ;;
    decode)
      bench 390 bench_decode decode --shape nvila-8b --batch 16 --context 32768 --rounds 3 || status=1
      bench 190 bench_decode_long decode --shape nvila-8b --batch 1 --context 131072 --kv dense --kv int4 \
        --kv quest+paged --kv quest+int4 --rounds 3 || status=1
      ;;
    kernels)
      for sequences in 1 2 16; do
        bench 190 "bench_kernels_$sequences" kernels --shape nvila-8b --batch "$sequences" --context 32768 || status=1
      done
      ;;
    parallel)
      for tokens in 8192 65536; do
        bench 190 "bench_ring_$tokens" parallel --kernel --tokens "$tokens" || status=1
      done
      ;;
    *)
      echo "gpu_suite: no piece '$piece'; accepted: tests, train, zero, encode, prefill, prefill-tower, decode, kernels, parallel" >&2
      exit 2
      ;;
  esac
done
exit $status

#!/usr/bin/env bash
# Runs on a machine with a CUDA device what can't be shown without one, and writes the results as JSON.
#
#   scripts/gpu_suite.sh OUT [PIECE ...]      all pieces, or the ones named; each takes less than 10 minutes
#
# Pieces: tests (the tests marked gpu). PYTHON names the interpreter; the package need not be installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${1:?usage: scripts/gpu_suite.sh OUT [PIECE ...]}
shift
pieces=("$@")
[ ${#pieces[@]} -gt 0 ] || pieces=(tests)
mkdir -p "$out"
out=$(cd "$out" && pwd)

# The root is the package, so a folder outside it that links to it as `foveate` is what can be imported from.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root" "$links/foveate"
export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)}
cd "$links" # not the root: its kernels/ would be found in the place of the library of that name

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_suite: $python (set PYTHON) has no torch that sees a CUDA device" >&2
  exit 2
fi
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
    *)
      echo "gpu_suite: no piece '$piece'; accepted: tests" >&2
      exit 2
      ;;
  esac
done
exit $status

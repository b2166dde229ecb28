#!/usr/bin/env bash
# bash run.sh [flags]         the whole pipeline on the laptop world, two CPU cores, minutes; flags go to save.py
# bash run.sh test [flags]    the tests; flags go to pytest
# bash run.sh paper [flags]   the paper's run on 4 GPUs; flags go to save.py
# bash run.sh table1|table2|table3|sweeps   the tables on the laptop world, six seeds, resumable; see tests/tables.py
# bash run.sh figures   accuracy.png and diagnostics.png from runs/tables/results.json; needs matplotlib
# The first use makes .venv and installs requirements.txt; PYTHON=/path/to/python uses an environment of yours instead.
# WORLD=annealed|constant|noisy and SEED=0 choose the laptop world, OUT=runs/laptop where it goes.
set -euo pipefail
cd "$(dirname "$0")"

setup() {
  if [ -n "${PYTHON:-}" ]; then return; fi
  PYTHON=.venv/bin/python
  if ! cmp -s requirements.txt .venv/installed.txt; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "run.sh: Python 3.11 or newer is needed" >&2; exit 2; }
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
}

laptop() {
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models this small are slower on two threads
  local out=${OUT:-runs/laptop} world=${WORLD:-annealed} seed=${SEED:-0}
  local data=$out/$world-$seed run=$out/$world-$seed-save
  [ -f "$data/world.json" ] || "$PYTHON" tests/toy.py --out "$data" --world "$world" --seed "$seed"
  rm -rf "$run"
  "$PYTHON" save.py --policy "$data/policy" --rm "$data/rm" --prompts "$data/prompts.jsonl" --out "$run" \
    --heldout "$data"/heldout_*.jsonl $("$PYTHON" tests/toy.py --flags) --seed "$seed" "$@"
  "$PYTHON" tests/toy.py --report "$data" "$run"
  "$PYTHON" eval.py --rm "$data/rm" "$run/rm" --bench "$data"/heldout_*.jsonl --out "$run/eval"  # paired intervals
}

case "${1:-laptop}" in
  test) setup; shift; "$PYTHON" -m pytest -q "$@" ;;
  paper)
    setup; shift
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
      "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 4 save.py --out runs/paper "$@" ;;
  table1|table2|table3|sweeps) setup; "$PYTHON" tests/tables.py "$@" ;;
  figures) setup; shift; "$PYTHON" tests/figures.py "$@" ;;
  laptop) setup; laptop "${@:2}" ;;
  -*) setup; laptop "$@" ;;
  *) echo "run.sh: $1: expected nothing, test, paper, table1, table2, table3, sweeps, figures or flags of save.py" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# bash run.sh [flags]          the whole pipeline on the laptop world, two CPU cores, minutes; flags go to save.py
# bash run.sh test [flags]     the tests; flags go to pytest
# bash run.sh paper [flags]    the paper's run on 4 GPUs; flags go to save.py
# bash run.sh tables TABLE     on the laptop world, six seeds, resumable: tests/tables.py
# bash run.sh figures [flags]  figures of what tables wrote; needs matplotlib: tests/figures.py
# The first use makes .venv and installs requirements.txt; PYTHON=/path/to/python uses an environment of yours instead.
# OUT is the folder of the results (runs/laptop, runs/paper, runs/tables), SEED the seed, WORLD=annealed|constant|noisy
# the laptop world. An earlier result is never overwritten.
set -euo pipefail
cd "$(dirname "$0")"

setup() {
  if [ -n "${PYTHON:-}" ]; then return; fi
  PYTHON=.venv/bin/python
  if cmp -s requirements.txt .venv/installed.txt; then return; fi
  echo "installing requirements.txt into .venv"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "run.sh: Python 3.11 or newer is needed" >&2
    exit 2
  }
  python3 -m venv .venv
  .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed.txt
}

laptop() {
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models this small are slower on two threads
  export PYTHONWARNINGS=ignore
  [ -t 2 ] || export TQDM_DISABLE=1  # progress bars are for terminals
  local out=${OUT:-runs/laptop} world=${WORLD:-annealed} seed=${SEED:-0} again=2
  local data=$out/$world-$seed run=$out/$world-$seed-save
  while [ -e "$run" ]; do run=$data-save-$((again++)); done
  [ "$again" = 2 ] || echo "$data-save is an earlier result and stays: this one goes to $run"
  [ -f "$data/world.json" ] || "$PYTHON" tests/toy.py --out "$data" --world "$world" --seed "$seed"
  # the console gets each complaint once, the logs have all; Ctrl-C is for save.py to answer
  "$PYTHON" save.py --policy "$data/policy" --rm "$data/rm" --prompts "$data/prompts.jsonl" --out "$run" \
    --heldout "$data"/heldout_*.jsonl --eval_every 10 $("$PYTHON" tests/toy.py --flags) --seed "$seed" "$@" |
    { trap "" INT; awk '!/^  accuracy on|rows of .* are used/ && !(/^  health/ && seen[$0]++) {print; fflush()}'; }
  "$PYTHON" eval.py --rm "$data/rm" "$run/rm" --bench "$data"/heldout_*.jsonl --out "$run/eval" > "$run/eval.txt"
  "$PYTHON" tests/toy.py --report "$data" "$run"
}

case "${1:-}" in
  ""|-*) setup; laptop "$@" ;;
  laptop) setup; laptop "${@:2}" ;;
  test) setup; "$PYTHON" -m pytest -q "${@:2}" ;;
  paper)
    setup
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "$PYTHON" -m torch.distributed.run --standalone \
      --nproc-per-node 4 save.py --out "${OUT:-runs/paper}" --seed "${SEED:-0}" "${@:2}" ;;
  tables) setup; "$PYTHON" tests/tables.py --out "${OUT:-runs/tables}" "${@:2}" ;;
  figures) setup; "$PYTHON" tests/figures.py --out "${OUT:-runs/tables}" "${@:2}" ;;
  *) echo "run.sh: $1: expected nothing, test, paper, tables, figures or flags of save.py" >&2; exit 2 ;;
esac

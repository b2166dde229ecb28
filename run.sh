#!/usr/bin/env bash
# bash run.sh [flags]          the whole pipeline on the laptop world, two CPU cores, minutes; flags go to save.py
# bash run.sh test [flags]     the tests; flags go to pytest
# bash run.sh paper [flags]    the paper's run on 4 GPUs; flags go to save.py
# bash run.sh compare          the same world: frozen RM, HL-BT, Mean Reward, SAVE, centred SAVE, side by side
# bash run.sh tables TABLE     a table of the map, six seeds, resumable: tests/tables.py
# bash run.sh figures [flags]  the figure of what tables ran; needs matplotlib: tests/figures.py
# The first use makes .venv and installs requirements.txt; PYTHON=/path/to/python uses an environment of yours instead.
# OUT is the folder of the results (runs/laptop, runs/paper, ...), SEED the seed, WORLD a world of tests/toy.py (few,
# graded, ...). An earlier result is never overwritten.
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
  export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
  [ -t 2 ] || export TQDM_DISABLE=1  # progress bars are for terminals
  local out=${OUT:-runs/laptop} world=${WORLD:-few} seed=${SEED:-0} again=2
  local data=$out/$world-$seed run=$out/$world-$seed-save
  while [ -e "$run" ]; do run=$data-save-$((again++)); done
  [ "$again" = 2 ] || echo "$data-save is an earlier result and stays: this one goes to $run"
  # three times the held-out pairs of the map: one seed must tell a gain from chance
  [ -f "$data/world.json" ] ||
    "$PYTHON" tests/toy.py --out "$data" --world "$world" --seed "$seed" --heldout 3000
  # the console gets the numbers, files are the logs; Ctrl-C is for save.py to answer
  "$PYTHON" save.py --policy "$data/policy" --rm "$data/rm" --prompts "$data/prompts.jsonl" --out "$run" \
    --heldout "$data"/heldout_*.jsonl --eval_every 10 $("$PYTHON" tests/toy.py --flags --world "$world") --seed "$seed" "$@" |
    { trap "" INT; awk '!/^  accuracy on|rows of .* are used/ {print; fflush()}'; }
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
  compare) setup
    "$PYTHON" tests/tables.py compare --seeds "${SEED:-0}" --heldout 3000 --out "${OUT:-runs/compare}" "${@:2}" ;;
  tables) setup; "$PYTHON" tests/tables.py --out "${OUT:-runs/map}" "${@:2}" ;;
  figures) setup; "$PYTHON" tests/figures.py --out "${OUT:-runs/map}" "${@:2}" ;;
  *) echo "run.sh: $1: expected nothing, test, paper, compare, tables, figures or flags of save.py" >&2; exit 2 ;;
esac

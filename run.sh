#!/usr/bin/env bash
# bash run.sh [flags]          the whole pipeline on the laptop world, two CPU cores, minutes; flags go to save.py
# bash run.sh test [flags]     the tests; flags go to pytest
# bash run.sh paper [flags]    the paper's run on 4 GPUs; flags go to save.py
# bash run.sh compare          the same world: frozen RM, HL-BT, Mean Reward, SAVE, centred SAVE, side by side
# bash run.sh tables TABLE     a table of the map, six seeds, resumable: tests/tables.py
# The first use makes .venv and installs requirements.txt; PYTHON=/path/to/python uses an environment of yours instead.
# OUT: the folder of the results; SEED; WORLD: a world of tests/toy.py. An earlier result is never overwritten.
set -euo pipefail
cd "$(dirname "$0")"

setup() {
  if [ -n "${PYTHON:-}" ]; then return; fi
  PYTHON=.venv/bin/python
  if cmp -s requirements.txt .venv/installed.txt; then return; fi
  echo "installing requirements.txt into .venv"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "run.sh: needs Python >= 3.11" >&2; exit 2; }
  python3 -m venv .venv
  .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed.txt
}

laptop() {
  export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # two are slower
  [ -t 2 ] || export TQDM_DISABLE=1  # progress bars are for terminals
  local world=${WORLD:-few} seed=${SEED:-0} data=${OUT:-runs/laptop}/${WORLD:-few}-${SEED:-0} again="" n=2
  while [ -e "$data-save$again" ] || [ -e "$data-frozen$again" ]; do again=-$((n++)); done
  local run=$data-save$again frozen=$data-frozen$again
  [ -z "$again" ] || echo "$data-save is an earlier result and stays: this one goes to $run"
  exec 3< <("$PYTHON" tests/toy.py --flags --world "$world")  # meanwhile: a start of Python takes seconds
  # three times the held-out pairs of the map: one seed must tell a gain from chance
  [ -f "$data/world.json" ] || "$PYTHON" tests/toy.py --out "$data" --world "$world" --seed "$seed" --heldout 3000
  set -- --policy "$data/policy" --rm "$data/rm" --prompts "$data/prompts.jsonl" --seed "$seed" $(cat <&3) "$@"
  echo "SAVE in $run; on the other core the same with the frozen RM, in $frozen: its log is $frozen.log"
  nice "$PYTHON" save.py "$@" --out "$frozen" --rm_update none > "$frozen.log" 2>&1 &
  local control=$!
  nice "$PYTHON" eval.py --rm "$data/rm" --bench "$data"/heldout_*.jsonl --out "$data/eval" > "$data/eval.txt" 2>&1 &
  trap "kill $control $! 2> /dev/null || true" EXIT
  trap : INT  # Ctrl-C is for save.py to answer; the console gets its numbers, files are the logs
  "$PYTHON" save.py --heldout "$data"/heldout_*.jsonl --eval_every 20 "$@" --out "$run" |
    { trap "" INT; grep --line-buffered -vE '^  accuracy on|rows of .* are used' || [ $? = 1 ]; }
  [ -d "$run/rm" ] || exit 0  # stopped by Ctrl-C
  "$PYTHON" eval.py --rm "$run/rm" --bench "$data"/heldout_*.jsonl --out "$run/eval" > "$run/eval.txt"
  wait "$control" && wait $! || { cat "$frozen.log" "$data/eval.txt" >&2; exit 1; }
  "$PYTHON" tests/report.py "$run" --control "$frozen" --world "$data"
  echo "next, its rivals there: ${WORLD:+WORLD=$world }${SEED:+SEED=$seed }${OUT:+OUT=$OUT }bash run.sh compare"
}

case "${1:-}" in
  ""|-*) setup; laptop "$@" ;;
  test) setup; "$PYTHON" -m pytest -q "${@:2}" ;;
  paper) setup  # torchrun would set one thread a rank, also for --offload
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 3) / 4))} "$PYTHON" -m torch.distributed.run --standalone \
      --nproc-per-node 4 save.py --out "${OUT:-runs/paper}" --seed "${SEED:-0}" "${@:2}" ;;
  compare) setup
    "$PYTHON" tests/tables.py compare --worlds "${WORLD:-few}" --seeds "${SEED:-0}" --heldout 3000 \
      --out "${OUT:-runs/compare}" --there "${OUT:-runs/laptop}" "${@:2}" ;;
  tables) setup; "$PYTHON" tests/tables.py --out "${OUT:-runs/map}" "${@:2}" ;;
  *) echo "run.sh: $1: expected nothing, test, paper, compare, tables or flags of save.py" >&2; exit 2 ;;
esac

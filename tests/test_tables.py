"""tables.py on tiny worlds: every row of every table runs, nothing runs twice, and the numbers are added up right."""
import concurrent.futures
import contextlib
import json
import shutil
import statistics
import sys
from pathlib import Path

import figures
import pytest
import tables
import toy

SMALL = ("--steps 1 --batch 4 --group 4 --value_prompts 4 --value_k 2 --value_epochs 1 --max_new_tokens 4 --device cpu "
         "--max_prompt_tokens 32 --save_every 0").split()

@pytest.fixture
def quick(monkeypatch):
    """save.py in this process, tiny worlds instead of trained ones. Yields the command lines."""
    calls = []

    def call(script, *words):
        words = [str(word) for word in words]
        calls.append([script, *words])
        if script != "tests/toy.py":
            return tables.MAINS[script](words)
        out = Path(words[words.index("--out") + 1])
        if "--extra_rm" in words:
            return shutil.copytree(out / "rm", out / f"rm_{words[-1]}")
        toy.tiny_world(out, int(words[words.index("--seed") + 1]))
        return (out / "world.json").write_text("{}")
    monkeypatch.setattr(tables, "call", call)
    monkeypatch.setattr(tables.concurrent.futures, "ProcessPoolExecutor", OneAfterTheOther)
    return calls

class OneAfterTheOther(contextlib.nullcontext):
    """In this process, where the patches are."""

    def __init__(self, *_):
        super().__init__()

    def __enter__(self):
        return self

    def submit(self, work, *inputs):
        future = concurrent.futures.Future()
        future.set_result(work(*inputs))
        return future

def run(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, words), "--out", str(out), "--jobs", "1", *SMALL])
    tables.main()

@pytest.mark.parametrize("table", [name if name == "table2" else pytest.param(name, marks=pytest.mark.slow)
                                   for name in tables.ROWS])
def test_every_row_runs_once(tmp_path, monkeypatch, quick, table):
    monkeypatch.setattr(toy, "gold_reward", lambda policy, prompts: {"sampled": 0.5, "greedy": 0.25})
    run(monkeypatch, tmp_path, table, "--seeds", 10, 11, "--worlds", "noisy")
    rows = figures.read_results(tmp_path / "results.jsonl")[table]["noisy"]["rows"]
    assert list(rows) == list(tables.ROWS[table]) and all(len(runs) == 2 for runs in rows.values())
    saved = [call for call in quick if call[1:3] == ["--stage", "save"]]
    assert len(saved) == 2 * sum(flags[:1] != ["ensemble"] for flags in tables.ROWS[table].values())
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[:2] == [f"## {table}", ""] and len(lines) == 8 + 2 * len(rows)
    overview, full = lines[4:4 + len(rows)], lines[5 + len(rows):]
    assert all(line.count("|") == 3 for line in lines[2:4 + len(rows)]) and len({line.count("|") for line in full}) == 1
    first = next(iter(rows.values()))
    for line, short, (name, runs) in zip(full[3:], overview, rows.items(), strict=True):
        gains = [statistics.mean(r["after"].values()) - statistics.mean(f["init"].values())
                 for r, f in zip(runs, first)]
        assert short.startswith(f"| {name} | {statistics.mean(gains):.2f} ±") and name in line
        assert f"{statistics.mean(gains):.2f} ±" in line
        assert f"{sum(gain > 0 for gain in gains)} of 2" in line
    before = len(quick)
    run(monkeypatch, tmp_path, table, "--seeds", 10, 11, "--worlds", "noisy")
    assert len(quick) == before  # all there: nothing is run again

def test_rows_say_what_they_are(tmp_path, monkeypatch, quick):
    monkeypatch.setitem(tables.ROWS, "table1", {name: flags for name, flags in tables.ROWS["table1"].items()
                                                if "policy" in name or "SAVE" in name})
    run(monkeypatch, tmp_path, "table1", "--seeds", 10, "--worlds", "annealed")
    words = {call[call.index("--out") + 1].split("/")[-1]: call for call in quick if call[1:3] == ["--stage", "save"]}
    improved = next(call for call in quick if call[-3 - len(SMALL):-1 - len(SMALL)] == ["--rm_update", "none"]
                    or call.count("--rm") == 2)
    assert improved.count("--rm") == 2 and str(tmp_path / "annealed-10/rows/save/rm") in improved
    assert [[Path(path).parts[-2:] for path in call[call.index("--label_rms") + 1:][:2]]
            for call in words.values() if "--label_rms" in call] == [[("value_1", "rm"), ("value_2", "rm")]]
    frozen = [name for name, call in words.items() if ("--lr_policy", "0") in zip(call, call[1:])]
    assert len(frozen) == 2
    data = tmp_path / "annealed-10"
    first = toy.gold_reward(data / "policy", toy.read_prompts(data / "prompts_test.jsonl"))
    for name in frozen:  # the world's own policy
        gold = json.loads((data / "rows" / name / "result.json").read_text())["gold"]
        assert gold == {key: 100 * x for key, x in first.items()}

def test_figures_from_a_results_file(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which requirements.txt leaves out")
    curve = {"accuracy": {"0": 90.0, "20": 91.0}, **{name: [0.5, 0.6] for name in figures.PANELS}}
    curves = {**dict.fromkeys(figures.STYLES, curve), "the ensemble itself": {}}
    runs = [{"table": "table1", "world": world, "row": row, "seed": seed, "flags": [], "curves": curves[row]}
            for world in toy.WORLDS for row in curves for seed in (1, 2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    figures.main(["--out", str(tmp_path)])
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("accuracy.png", "diagnostics.png"))

def test_figures_without_matplotlib_or_results_are_one_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(SystemExit, match="^figures: matplotlib is not installed: pip install matplotlib$"):
            figures.main(["--out", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "matplotlib", object())
    with pytest.raises(SystemExit, match="no such file, expected results.jsonl of run.sh tables table1"):
        figures.main(["--results", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)])

def test_diagnostics_are_means_of_blocks():
    points = [(step, step) for step in range(1, 26)] + [(41, 7), (42, 9)]
    assert tables.blocks(points) == [5.5, 15.5, 23.0, None, 8.0] and tables.blocks([]) == []

def test_learning_rates_of_the_readme():
    """The gains in its table of learning rates, and that of SAVE in its text, are those of results.jsonl."""
    root = Path(__file__).resolve().parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = figures.read_results(root / "tests/results/results.jsonl")["sweeps"]["annealed"]["rows"]
    for name, rate in {"RM learning rate x 1/3": "3.3e-6: ", "SAVE": "1e-5: ", "RM learning rate x 3": "3e-5: ",
                       "value head learning rate x 1/5": "2e-4: ", "value head learning rate x 10": "1e-2: "}.items():
        gains = [statistics.mean(run["after"].values()) - statistics.mean(run["init"].values()) for run in rows[name]]
        shown = f"{statistics.mean(gains):+.2f} ±{statistics.stdev(gains) / len(gains) ** 0.5:.2f}"
        assert rate + shown in readme, (name, shown)
        assert name != "SAVE" or f"the RM's change is {shown} points" in readme

def test_the_committed_results_and_their_page_say_the_same():
    """Every table of tests/results/README.md is the one of results.jsonl, and the gains are worked out here again."""
    folder = Path(__file__).resolve().parent / "results"
    page = (folder / "README.md").read_text(encoding="utf-8")
    for worlds in figures.read_results(folder / "results.jsonl").values():
        for world, result in worlds.items():
            assert "\n".join(tables.table(result["rows"], world)) in page, world
            assert result["seeds"] == tables.SEEDS
            for name, runs in result["rows"].items():
                gains = [statistics.mean(run["after"].values()) - statistics.mean(frozen["init"].values())
                         for run, frozen in zip(runs, result["rows"]["GRPO, frozen RM"], strict=True)]
                error = statistics.stdev(gains) / len(gains) ** 0.5
                want = f"| {statistics.mean(gains):.2f} ±{error:.2f} | {sum(gain > 0 for gain in gains)} of 6 |"
                assert any(line.startswith(f"| {name} |") and want in line for line in page.splitlines()), (name, want)

"""The budgets of save.py are part of the product: short enough to read in an evening, and not by writing it denser."""
import ast
import io
import tokenize
from pathlib import Path

import save

LINES = 1130  # of save.py
FILE = Path(save.__file__)
SOURCE = FILE.read_text(encoding="utf-8")
NODES = list(ast.walk(ast.parse(SOURCE)))
FUNCTIONS = [node for node in NODES if isinstance(node, ast.FunctionDef)]

def test_save_py_stays_short():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert len(SOURCE.splitlines()) <= LINES and len(save.Config.__dataclass_fields__) <= 38
    assert len(FUNCTIONS) <= 85 and {name for name, length in lengths.items() if length > 45} == set()

def test_eval_py_stays_short():
    assert len(FILE.with_name("eval.py").read_text(encoding="utf-8").splitlines()) <= 690

def test_the_readme_stays_short():
    assert len(FILE.with_name("README.md").read_text(encoding="utf-8").splitlines()) <= 200

def test_save_py_stays_readable():
    lines = [line for line in SOURCE.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 120 and sum(map(len, lines)) <= min(64_000, 62.5 * len(lines))
    assert ";" not in [token.string for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)]

def test_no_comprehension_holds_one_that_holds_one():
    def depth(node):
        inner = max(map(depth, ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
    assert [ast.unparse(node) for node in NODES if depth(node) > 2 and isinstance(node, ast.stmt)
            and not isinstance(node, ast.FunctionDef | ast.ClassDef)] == []

def test_every_function_says_what_it_does():
    inner = {child for node in FUNCTIONS for child in ast.walk(node) if child is not node}
    assert {node.name for node in FUNCTIONS if node not in inner and node.name[:2] != "__"
            and not ast.get_docstring(node)} == set()

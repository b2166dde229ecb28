"""The budgets of save.py are part of the product: short enough to read in an evening, and not by writing it denser."""
import ast
import io
import tokenize
from pathlib import Path

import save

SOURCE = Path(save.__file__).read_text(encoding="utf-8")
FUNCTIONS = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]

def test_save_py_stays_short():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert len(SOURCE.splitlines()) <= 1284 and len(save.Config.__dataclass_fields__) <= 40
    assert lengths["learn"] <= 40 and {name for name, length in lengths.items() if length > 60} == set()

def test_save_py_stays_readable():
    lines = [line for line in SOURCE.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 120 and sum(map(len, lines)) / len(lines) <= 64.5
    assert ";" not in [token.string for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)]

def test_every_function_says_what_it_does():
    inner = {child for node in FUNCTIONS for child in ast.walk(node) if child is not node}
    assert {node.name for node in FUNCTIONS if node not in inner and node.name[:2] != "__"
            and not ast.get_docstring(node)} == set()

"""Prints the modules, classes and functions that are too long, tests apart; exit code 1 if there are any."""

import ast
import sys
from pathlib import Path

MODULE, CLASS, FUNCTION = 350, 250, 60


def main() -> int:
    """Measure the Python files of the library and the recipes, in lines, docstrings and comments included."""
    root = Path(__file__).parents[1]
    too_long = []
    for path in sorted([*root.glob("hf_noisekd/**/*.py"), *root.glob("recipes/**/*.py")]):
        text = path.read_text()
        found = [(path.name, len(text.splitlines()), MODULE)]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                limit = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
                found.append((node.name, (node.end_lineno or 0) - node.lineno + 1, limit))
        too_long += [f"{path}: {name} has {lines} lines, of {most}" for name, lines, most in found if lines > most]
    print("\n".join(too_long) or "No module, class or function is too long.")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())

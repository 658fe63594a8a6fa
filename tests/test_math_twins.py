"""The headers of csrc without torch and their Triton twins have the same names in the same order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
C_NAMES = re.compile(
    r"^(?:struct (\w+) \{|constexpr \w+ (k[^;]*);|enum \w+ : \w+ \{([^}]*)\}|FASTQAT_INLINE [\w:]+ (\w+)\()",
    re.MULTILINE,
)


def c_names(text: str) -> list[str]:
    """Structures, constants, enumerators and functions in order."""
    names = []
    for structure, constants, enumerators, function in C_NAMES.findall(text):
        one = structure or function
        names += [one] if one else re.findall(r"\b(k[A-Z]\w*)(?: =[^=]|,|\s*$)", constants or enumerators)
    return names


def python_names(text: str) -> list[str]:
    """Public classes, functions and constants in order; helpers with an underscore are Triton's own."""
    names = []
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    return [name for name in names if not name.startswith("_")]


@pytest.mark.parametrize(
    ("header", "least"), (("math", 15), ("estimators", 8), ("oscillation", 12), ("ranges", 5), ("dorefa", 8))
)
def test_same_names_in_the_same_order(header: str, least: int) -> None:
    ours = c_names((ROOT / "csrc" / f"{header}.h").read_text())
    assert len(ours) > least, f"the pattern no longer finds the names of {header}.h"
    assert python_names((ROOT / "fastqat" / "ops" / "triton" / f"{header}.py").read_text()) == ours


def test_the_patterns_see_a_difference() -> None:
    text = "struct A {\nFASTQAT_INLINE float b(float v) {\nconstexpr int kC = 0, kD = x == 1 ? 5 : 8;  // d\n"
    assert c_names(text + "enum E : int64_t { kF, kG };\n") == ["A", "b", "kC", "kD", "kF", "kG"]
    assert python_names("class A: ...\ndef _x(): ...\ndef b(): ...\nkC, kD = 0, 1\n") == ["A", "b", "kC", "kD"]

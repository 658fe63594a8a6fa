"""csrc/math.h and its Triton twin have the same names in the same order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
C_NAME = re.compile(r"^(?:struct (\w+) \{|constexpr float (\w+) =|FASTQAT_INLINE [\w:]+ (\w+)\()", re.MULTILINE)


def c_names(text: str) -> list[str]:
    return [next(filter(None, match)) for match in C_NAME.findall(text)]


def python_names(text: str) -> list[str]:
    """Public classes, functions and constants in order; helpers with an underscore are Triton's own."""
    names = []
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.append(node.targets[0].id)
    return [name for name in names if not name.startswith("_")]


def test_same_names_in_the_same_order() -> None:
    ours = c_names((ROOT / "csrc" / "math.h").read_text())
    assert len(ours) > 15, "the pattern no longer finds the names of math.h"
    assert python_names((ROOT / "fastqat" / "ops" / "triton" / "math.py").read_text()) == ours


def test_the_patterns_see_a_difference() -> None:
    assert c_names("struct A {\nFASTQAT_INLINE float b(float v) {\n") == ["A", "b"]
    assert python_names("class A: ...\ndef _x(): ...\ndef b(): ...\n") == ["A", "b"]

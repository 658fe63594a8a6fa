"""The code of the README runs as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_code_blocks_run_in_a_fresh_process(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2, "the README has lost its examples"
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 12, "the quick start is no longer quick"
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks) + "\nprint('codes', packed.dtype, codes.min().item() >= -8)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=README.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "FakeQuant(bits=4, codes=-8..7" in done.stdout
    assert "codes torch.uint8 True" in done.stdout

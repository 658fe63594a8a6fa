"""Build of the compiled library ``fastqat._C`` (C++, CPU): libtorch stable ABI, Python limited API.

One library runs on every torch >= 2.10 and Python >= 3.10. Where it cannot be built (no compiler, no torch headers) the
package installs without it; the reason is kept in ``fastqat/_C.not-built.txt`` for ``fastqat status`` to show.
``fastqat._C_cuda`` (CUDA C++) will be a second library beside it, built where nvcc is.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_2_10 = "0x020a000000000000"
PYTHON_3_10 = "0x030a0000"

COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    # Numerics law: no contraction, IEEE everywhere; the two flags after it change no result.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",  # vectors wider than the base instruction set never cross a function that is not inlined
]


def cpu_extension() -> Extension:
    """Describe ``fastqat._C``; torch gives the include and library paths."""
    from torch.utils import cpp_extension

    return Extension(
        "fastqat._C",
        sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp")),
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("Py_LIMITED_API", PYTHON_3_10), ("TORCH_TARGET_VERSION", TORCH_2_10)],
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,
        language="c++",
    )


class BuildOrExplain(build_ext):
    """Build the library, or leave the reason beside the package and go on without it."""

    reason: str | None = None

    def finalize_options(self) -> None:
        try:
            self.distribution.ext_modules = [cpu_extension()]
        except ImportError as error:
            self.reason = f"torch is needed to build it: {error}"
            self.distribution.ext_modules = []
        super().finalize_options()

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib)  # a failing build forgets that it is in place
        try:
            super().run()
        except Exception as error:  # whatever the tool chain says is the reason
            self.reason = f"{type(error).__name__}: {error}"
            print(f"fastqat: installing without the C++ library ({self.reason})")
        note = package / "fastqat" / "_C.not-built.txt"
        note.unlink(missing_ok=True)
        if self.reason:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self.reason + "\n")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastqat._C", sources=[])],
        cmdclass={"build_ext": BuildOrExplain},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )

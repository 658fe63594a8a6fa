"""Build of the compiled libraries: ``fastqat._C`` (C++, CPU) and ``fastqat._C_cuda`` (CUDA C++).

Both use the libtorch stable ABI and the Python limited API: one library runs on every torch >= 2.10 and Python >= 3.10.
Where one cannot be built (no compiler, no nvcc, no torch headers) the package installs without it; the reason is kept
beside it, in ``_C.not-built.txt`` or ``_C_cuda.not-built.txt``, for ``fastqat status`` to show. csrc/cuda/nvcc.py says
how CUDA C++ is compiled, and for which GPUs.
"""

from __future__ import annotations

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

TORCH_2_10 = "0x020a000000000000"
PYTHON_3_10 = "0x030a0000"

COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags ask for -g, which takes a quarter of the time
    "-fvisibility=hidden",
    "-fopenmp-simd",
    # Numerics law: no contraction, IEEE everywhere; the two flags after it change no result.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",  # vectors wider than the base instruction set never cross a function that is not inlined
]


def sources(pattern: str) -> list[str]:
    """Files of the repository, by their paths in it."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def cpu_extension() -> Extension:
    """Describe ``fastqat._C``; torch gives the include and library paths."""
    from torch.utils import cpp_extension

    return Extension(
        "fastqat._C",
        sources=sources("csrc/cpu/*.cpp"),
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("Py_LIMITED_API", PYTHON_3_10), ("TORCH_TARGET_VERSION", TORCH_2_10)],
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,
        language="c++",
    )


def cuda_extension() -> Extension:
    """Describe ``fastqat._C_cuda``: kernels in .cu see no torch, what calls them in .cpp sees no CUDA."""
    tool = nvcc.find()
    chosen = nvcc.architectures(tool)
    extension = cpu_extension()
    extension.name = "fastqat._C_cuda"
    extension.sources = sources("csrc/cuda/*.cu") + sources("csrc/cuda/*.cpp")
    extension.define_macros += [
        ("USE_CUDA", None),  # torch's headers declare streams and device guards
        ("FASTQAT_CUDA_ARCHITECTURES", f'"{" ".join(map(str, chosen))}"'),
        ("FASTQAT_CUDA_PTX", str(nvcc.virtual(chosen[-1]))),
        ("FASTQAT_CUDA_COMPILER", f'"{nvcc.version(tool)}"'),
    ]
    extension.nvcc = nvcc.compile_command(tool, chosen)
    return extension


LIBRARIES = {"_C": cpu_extension, "_C_cuda": cuda_extension}


def ingredients(listed: Path) -> str | None:
    """Digest of the files that an object was made from, as its compiler has listed them; None where one is gone."""
    try:
        files = listed.read_text().replace("\\\n", " ").partition(": ")[2].split()
        return hashlib.sha256(b"".join(hashlib.sha256(Path(file).read_bytes()).digest() for file in files)).hexdigest()
    except OSError:
        return None


class BuildOrExplain(build_ext):
    """Build each library, compiling what is new in parallel, or leave the reason beside the package and go on."""

    def finalize_options(self) -> None:
        self.reasons: dict[str, str] = {}
        self.distribution.ext_modules = []
        for name, describe in LIBRARIES.items():
            try:
                self.distribution.ext_modules.append(describe())
            except Exception as error:  # no torch, no nvcc, an architecture that is none
                self.explain(name, error)
        super().finalize_options()
        self.force = True  # compile() knows what is new, and linking takes no time
        if self.editable_mode:
            self.build_temp = str(ROOT / "build" / "editable")  # in the place of a folder that is thrown away

    def explain(self, name: str, error: Exception) -> None:
        self.reasons[name] = f"{type(error).__name__}: {error}"
        print(f"fastqat: installing without fastqat.{name} ({self.reasons[name]})", flush=True)

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib)  # a failing build forgets that it is in place
        try:
            super().run()
        except Exception as error:  # whatever the tool chain says is the reason
            for name in LIBRARIES:
                self.explain(name, error)
        for name in LIBRARIES:
            note = package / "fastqat" / f"{name}.not-built.txt"
            note.unlink(missing_ok=True)
            if name in self.reasons:
                for folder in (note.parent, Path(self.build_lib) / "fastqat"):
                    for old in folder.glob(f"{name}.*.so"):
                        old.unlink()
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(self.reasons[name] + "\n")

    def build_extensions(self) -> None:
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            started = [[pool.submit(self.compile, each, source) for source in each.sources] for each in self.extensions]
            for each, parts in zip(self.extensions, started, strict=True):
                try:
                    self.link(each, [part.result() for part in parts])
                except Exception as error:
                    self.explain(each.name.split(".")[-1], error)
                    each.optional = True  # or setuptools would want to copy it
                    for part in parts:
                        part.cancel()

    def compile(self, extension: Extension, source: str) -> str:
        """Compile one file, unless there is an object made from the same files with the same flags; return its path."""
        cuda = source.endswith(".cu")
        flags, macros, includes = extension.extra_compile_args, extension.define_macros, extension.include_dirs
        environment = [os.environ.get(name) for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS")]
        how = extension.nvcc if cuda else [flags, macros, includes, environment]
        folder = Path(self.build_temp, hashlib.sha256(repr(how).encode()).hexdigest()[:8])
        made = (folder / source).with_suffix(".o")
        listed, digest = made.with_suffix(".d"), made.with_suffix(".digest")
        if made.exists() and digest.exists() and digest.read_text() == ingredients(listed):
            return str(made)
        made.parent.mkdir(parents=True, exist_ok=True)
        to_list = ["-MMD", "-MF", str(listed)]
        if cuda:
            self.spawn([*how, *to_list, "-c", source, "-o", str(made)])
        else:
            self.compiler.compile([source], str(folder), macros, includes, extra_postargs=[*to_list, *flags])
        digest.write_text(ingredients(listed) or "")
        return str(made)

    def link(self, extension: Extension, objects: list[str]) -> None:
        if hasattr(extension, "nvcc"):
            made, folder = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp, "stub")
            made.parent.mkdir(parents=True, exist_ok=True)
            self.spawn(nvcc.link_command(extension.nvcc[0], objects, extension.library_dirs, folder, str(made)))
        else:
            extension.sources, extension.extra_objects = [], objects
            super().build_extension(extension)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastqat._C", sources=[])],
        cmdclass={"build_ext": BuildOrExplain},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )

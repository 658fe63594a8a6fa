from fastqat.ops.one_tensor import advance_interval, advance_range  # noqa: F401

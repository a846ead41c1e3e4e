"""The cross-compiler of the benchmarks, as tests import it."""

from benchmarks.crosscompile import ARCHS, SHARED_LIMIT, TENSOR_CORES, Compiled, assert_fits, compile_launch

__all__ = ["ARCHS", "SHARED_LIMIT", "TENSOR_CORES", "Compiled", "assert_fits", "compile_launch"]

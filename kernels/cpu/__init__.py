"""Sparse and dense kernels for x86 and other CPUs, compiled at first use by numba."""

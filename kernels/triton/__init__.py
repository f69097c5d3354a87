"""Sparse kernels for NVIDIA GPUs, written in Triton."""

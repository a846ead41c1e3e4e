"""Kernels in Triton. Importing this package imports nothing; its modules import triton.

A file `x.py` holds device code (`@triton.jit`), `x_launch.py` the host code that turns checked tensors into a `Launch`.
"""

"""Kernels made of PyTorch's operators alone: for every device, without host synchronisation."""

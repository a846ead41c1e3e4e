"""Several devices through torch.distributed."""

"""Other libraries' entry points to `vllm_accel`: import the one you need, each imports its own library."""

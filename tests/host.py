"""What automatic choice takes first on this machine's CPU: our kernels where they were compiled, else PyTorch's."""

from vllm_accel.kernels.cpu import load

FIRST_ON_CPU = "cpu" if load().reason is None else "sdpa_cpu"
#: Where PyTorch's kernel cannot: a softcap.
FIRST_WITH_SOFTCAP = "cpu" if load().reason is None else "reference"

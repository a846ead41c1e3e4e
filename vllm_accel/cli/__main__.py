"""``python -m vllm_accel.cli`` is ``vllm-accel``."""

import sys

from vllm_accel.cli import main

sys.exit(main())

"""``python -m vllm_accel.cli.demo``."""

import sys

from vllm_accel.cli.demo import main

sys.exit(main())

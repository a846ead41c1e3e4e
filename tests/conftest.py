"""What every test relies on; imports nothing heavy, so that collecting one file stays quick."""

import contextlib
import os

# The settings of the person who runs the tests must not decide what the tests see.
for _name in [name for name in os.environ if name.startswith("VLLM_")]:
    del os.environ[_name]

# Small tensors on two cores: threads cost more than they bring, ten times more on a busy machine. Read by torch at
# import; tests that need threads start them, and benchmarks do not come here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test never waits for the network, and needs no display.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# A GPU machine may lack hypothesis; the tests without it still run there.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # The same examples on every run, so that a red test is red for everyone. No deadline: the first call of a
    # kernel compiles or loads it, which takes a hundred times as long as the second.
    settings.register_profile("vllm_accel", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("vllm_accel")

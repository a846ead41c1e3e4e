"""Run every backend on every device on tiny calls, each in a process of its own, and say which are right."""

from vllm_accel.probe.parent import Outcome, census, probe

__all__ = ["Outcome", "census", "probe"]

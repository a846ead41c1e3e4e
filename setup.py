"""Build vllm_accel; everything that is data lives in pyproject.toml."""

from setuptools import setup

setup()

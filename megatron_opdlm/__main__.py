"""Runs the command line as ``python -m megatron_opdlm``."""

from megatron_opdlm.cli import run

if __name__ == "__main__":
    run()

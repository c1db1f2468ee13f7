"""Benchmarks and end-to-end checks, each run as `python -m bench.<name>`; results are files."""

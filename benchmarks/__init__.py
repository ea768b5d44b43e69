"""Benchmarks: each prints one table and writes one JSON; see README.md for what each claims."""

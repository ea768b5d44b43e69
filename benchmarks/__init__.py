"""Benchmarks: each prints a table and writes a JSON file; README.md lists their claims and results."""

"""Measure a run, and report every round to observers: the terminal, TensorBoard, Prometheus."""

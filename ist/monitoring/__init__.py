"""Measure a run, and report what happens to callbacks: the display, TensorBoard, Prometheus, the user's."""

"""Predict the cost of a run: bytes, memory and seconds per round, for each method and number of workers.

Where it sits: `ist plan` calls `predict.py`. Bytes and memory come from each method's formulas
(`ist/config/methods.py`), step times are measured on this machine (`measure.py`), and seconds follow from both and the
links (`predict.py`, `ist/config/runtime.py`).
Not here: starting processes, training a network for use, pages (`ist/plan/page.py`).
"""

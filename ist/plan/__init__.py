"""What a run would cost, before it is run: bytes, memory and seconds a round, for each method and number of workers.

Where it sits: `ist plan` asks `predict.py`. Bytes and memory are each method's formulas (`ist/config/methods.py`), step
times are measured on this machine (`measure.py`), and seconds follow from both and the links (`predict.py`,
`ist/config/link_rate.py`).
Not here: starting processes, training anybody keeps, pages (`ist/report/plan_page.py`).
"""

"""The network lab: hosts on this machine, joined by links of a chosen rate, and runs on them.

`link.py` is what a link is and how it is written, `hosts.py` makes hosts of Linux network namespaces, `run.py` starts
the processes of a run on them, one a host, and counts what crosses the links. For `ist compare --link`, `ist train
--link`, the benchmarks and the tests.
Not here: what the processes do.
"""

"""The parts of ``bench_qk.py``: the cells, and who computes them and how."""

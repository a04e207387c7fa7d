"""The parts of ``bench_gradients.py``: its cells and its contestants."""

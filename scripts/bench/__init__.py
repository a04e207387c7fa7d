"""The parts of ``bench_ops.py``: what is measured (cells), who is measured (contestants), how (timing) and what comes out of it."""

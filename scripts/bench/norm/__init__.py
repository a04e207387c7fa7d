"""The parts of ``bench_ops.py``: the cells, who computes them and how, how exact that is, the bars,
the picture.
"""

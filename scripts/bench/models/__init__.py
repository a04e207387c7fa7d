"""The parts of ``bench_transformers.py``: which models (catalogue), run in which ways (variants),
what a step costs and gives.
"""

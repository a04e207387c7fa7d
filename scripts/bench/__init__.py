"""The parts of the benchmarks: ``norm`` of bench_ops.py, ``qk`` of bench_qk.py, ``models`` of
bench_transformers.py.

What the first two share lies here: who takes part (contestants, libraries), how they are timed
(cell_run, timing, light, host, inductor), what comes out of it (results, environment), and the
command around all that (command).
"""

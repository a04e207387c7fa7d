"""The parts of ``bench_training.py``: what is trained, what a step costs, how it is shown."""

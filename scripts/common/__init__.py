"""What all scripts share: tables, the line that says where a run took place, and how PyTorch runs
things.
"""

"""One file a family: the configurations of its published models, and the inputs that its pipelines
give them by default.
"""

"""Changing the class of a module in place, and what that has to respect: hooks, pickles, diffusers'
tables of classes.
"""

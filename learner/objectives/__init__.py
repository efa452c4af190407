"""The objective, composed of pure functions: advantage, surrogate, correction, aggregation.

Everything is a *sum* over tokens; the step divides the gradient once by its normaliser, so how groups arrive and how
they are packed changes no result.
"""

"""The synthetic engine: a cost model in place of a model, for planning and for measuring everything around it."""

"""Weights on their way from the learner to the engines: plans, two-phase publication, membership, transports."""

"""A discrete-event simulation of a run that drives the production decision classes. See docs/simulator.md."""

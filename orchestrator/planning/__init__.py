"""The parts of ``millrace plan``: costs of a workload, memory, what limits first."""

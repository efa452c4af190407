"""Workload suites and recorded workloads: scripts of episodes, and the environment that plays them."""

"""`millrace bench sync-vs-async`: one workload in every mode, on the same resources, against the bound."""

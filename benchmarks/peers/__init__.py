"""Runners of other systems under the load that Millrace is measured with; each in an environment of its own."""

"""`millrace bench weights`: how weights travel, and what it costs."""

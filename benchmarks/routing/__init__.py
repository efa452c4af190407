"""`millrace bench routing`: where sessions go, what they find there, and how evenly engines are loaded."""

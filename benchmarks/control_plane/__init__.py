"""`millrace bench control-plane`: what thousands of concurrent episodes cost the processes that run them."""

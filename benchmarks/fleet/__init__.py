"""`millrace bench fleet`: what updates and lost engines cost the requests in flight."""

"""``millrace bench pd``: what it does to a run when prefill and decode have engines of their own."""

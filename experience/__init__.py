"""Records, wire format, the experience queue, the staleness contract, the journal and the ledger. No Ray, no torch."""

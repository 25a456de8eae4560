"""Documents to batches: sources, records, plan, objective, loader."""

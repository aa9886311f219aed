"""Show runs on one page: their curves, results, settings, answers and cost."""

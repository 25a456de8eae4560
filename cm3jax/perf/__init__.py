"""Performance: FLOP formulas and device peaks."""

"""Whether a step fits a mesh of chips that need not exist, and how fast it would be.

`chips` holds datasheet figures, `estimates` closed formulas; `compiling` runs XLA for the target, and `hlo` reads the
compiled program. `plans` puts these together, and is what `commands` uses.
"""

"""Figures, drawn with matplotlib: `losses` of runs, `attention` maps, `rotary` frequencies, spectra of `weights`.

`style` has what they share. Each module draws one picture into a file.
"""

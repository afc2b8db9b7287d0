"""Several devices and processes.

`mesh` (names and sizes of its axes), `partition` (how arrays are split, read off their annotations), `cluster`
(processes of one program that work together), `processes` (child processes and how they end), `programs` (how
functions are compiled).
"""

from .. import extras as extras  # which refuses a jax that is too old

"""The reference turned outward: checks of somebody else's Llama against the library alone, never against `fast`.

`properties` asks what every Llama must satisfy: causality, caching, batching, rotation, heads. `bugs` is the catalogue
of what goes wrong, with each fault as a change; `variants` is the library with a few words changed, by which faults are
put in and `trace` takes notes: every intermediate of a run, which `naming` renames as other programs have them.
`golden` writes a probe on which every bug shows. `diff` names the bug behind somebody's logits, which `theirs` reads:
`candidates` computes what each would give, `judging` is the rule, `dials` looks for a number that is not the right one.
"""

from .. import extras as extras  # which refuses a jax that is too old

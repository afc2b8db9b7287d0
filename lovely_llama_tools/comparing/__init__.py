"""The reference turned outward: checks of somebody else's Llama against the library alone, never against `fast`.

`properties` asks what every Llama must satisfy: causality, caching, batching, rotation, heads. `bugs` is the catalogue
of what goes wrong, with each fault as a change; `variants` is the library with a few words changed, by which faults are
put in and `trace` takes notes: every intermediate of a run, which `naming` renames as other programs have them.
"""

from .. import extras as extras  # which refuses a jax that is too old

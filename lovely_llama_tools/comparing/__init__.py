"""The reference turned outward: checks of somebody else's Llama against the library alone, never against `fast`.

`properties` asks what every Llama must satisfy: causality, caching, batching, rotation, heads.
"""

from .. import extras as extras  # which refuses a jax that is too old

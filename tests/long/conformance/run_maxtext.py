"""maxtext: JAX's largest Llama, which this Python does not get."""

INSTALL = ("pip install maxtext==0.2.5",)
WHY = "Needs Python 3.12, by its metadata, and as its decoder imports a module with a `type` statement."

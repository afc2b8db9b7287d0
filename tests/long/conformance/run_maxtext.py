"""maxtext: not run under 3.11, which neither its metadata nor the type statements that its decoder imports allow."""

INSTALL = ("pip install maxtext==0.2.5",)

"""The machine on which something was measured."""

import platform
import re
from pathlib import Path


def processor() -> str:
    """The name of its processor."""
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpus.read_text() if cpus.exists() else "")
    return named[1] if named else platform.machine()

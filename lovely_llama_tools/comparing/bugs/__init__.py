"""One catalogue of ways in which a Llama's forward pass has gone wrong, `BUGS`, each with the fault itself.

`bug` says what a row holds and puts one in; the other modules hold rows, by what they are about. A new bug is one row:
it must show on some model of tests/tools/comparing/test_bugs.py and differ there from all others.
"""

from .around import OF_EMBEDDING, OF_PRECISION, OF_RECORDING, OF_TOKENS
from .attention import OF_HEADS, OF_SCORES
from .bug import BOS as BOS
from .bug import Bug as Bug
from .bug import Llama as Llama
from .bug import both as both
from .bug import with_bug as with_bug
from .layers import OF_FEED_FORWARD, OF_LAYERS, OF_NORMS, OF_WIRING
from .rotary import OF_FREQUENCIES, OF_ROTATION

SECTIONS: dict[str, tuple[Bug, ...]] = {
    "Rotary frequencies and angles": OF_FREQUENCIES,
    "Rotation": OF_ROTATION,
    "Scores, mask, softmax": OF_SCORES,
    "Heads": OF_HEADS,
    "Norms": OF_NORMS,
    "Feed-forward": OF_FEED_FORWARD,
    "Wiring": OF_WIRING,
    "Layers": OF_LAYERS,
    "Embedding and readout": OF_EMBEDDING,
    "Tokens": OF_TOKENS,
    "What was recorded": OF_RECORDING,
    "Precision": OF_PRECISION,
}
BUGS: dict[str, Bug] = {bug.name: bug for bugs in SECTIONS.values() for bug in bugs}

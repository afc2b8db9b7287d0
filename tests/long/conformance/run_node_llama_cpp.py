"""node-llama-cpp: llama.cpp reads the GGUF, in float32 throughout and on one thread; it gives probabilities."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from serving import serve

INSTALL = ("npm install --prefix . node-llama-cpp@3.21.1",)
LOG_PROBABILITIES = True
SCRIPT = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
process.execArgv = [];  // which the test of the binary, a process of its own, would take over
const {gguf, ids, chunk} = JSON.parse(process.argv[1]);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.disabled});
const model = await llama.loadModel({modelPath: gguf});
const context = await model.createContext({
    contextSize: 512, batchSize: 512, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();
const rows = [];
for (let start = 0; start < ids.length; start += chunk) {
    const asked = ids.slice(start, start + chunk).map((id) => [id, {generateNext: {probabilities: true}}]);
    rows.push(...await sequence.controlledEvaluate(asked));
}
const told = rows.map(({next}) => [...next.probabilities].sort(([a], [b]) => a - b).map(([, p]) => p));
process.stdout.write(JSON.stringify(told), () => process.exit(0));
"""


def load(folder: Path, dtype: str) -> Any:
    return folder.with_suffix(".gguf")


def logits(model: Any, ids: list[int], chunk: int = 512) -> Any:
    job = json.dumps({"gguf": str(model), "ids": ids, "chunk": chunk})
    command = ["node", "--input-type=module", "--eval", SCRIPT, job]
    said = subprocess.run(command, cwd=sys.prefix, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(said.stderr[-300:])
    rows = np.log(np.array(json.loads(said.stdout)))
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def decode(model: Any, ids: list[int]) -> Any:
    return logits(model, ids, 1)


if __name__ == "__main__":
    serve("3.21.1 (llama.cpp 0.4.0)", load, logits, decode, dtypes=("float32",))

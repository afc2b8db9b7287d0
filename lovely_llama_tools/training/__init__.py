"""Training: from settings to a folder of checkpoints.

`settings` (options, defaults, limits), `step` (the compiled optimiser step and its state), `loop` (data, steps,
evaluations), `run_folder` (files on disk), `checkpoints` (saving and restoring), `metrics` (logs). `commands` calls
`loop.train`; `planning` compiles `step.step`.
"""

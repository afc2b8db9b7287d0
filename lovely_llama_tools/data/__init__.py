"""Training data: files of text or conversations to batches of token ids.

`corpora` reads files, `encoding` tokenizes documents and marks the answers to learn, `token_files` stores and maps
ids, `batches` cuts and shuffles sequences. `prepare.prepare` does all of it, and is what `training` uses; `corpora` is
open to whoever reads texts.
"""

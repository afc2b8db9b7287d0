"""Training data: files of text or conversations to batches of token ids.

`corpora` finds files, `reading` and `records` read texts and rows of JSON, `conversations` marks the answers to learn,
`encoding` tokenizes documents, `token_files` stores and maps ids, `batches` cuts and shuffles sequences.
`prepare.prepare` does all of it, and is what `training` uses; `answers` scores conversations. `corpora`, `reading` and
`records` are open to whoever reads texts.
"""

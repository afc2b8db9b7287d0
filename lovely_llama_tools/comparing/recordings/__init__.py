"""What somebody else's Llama computed, as others record it: `theirs` reads files, `dumps` folders and what torch saves,
`server` asks a server for log-probabilities. Nothing in a file is executed."""

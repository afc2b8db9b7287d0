"""Running a model: `generate` (one prompt, and `Session`), `batch` (many prompts at once), `chat` (templates).

`caches` holds keys and values, `scoring` computes log-likelihoods and perplexity, `harness` lets lm-eval drive a model.
"""

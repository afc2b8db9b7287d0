"""The library turned outward: what somebody else's Llama is checked against (`properties`)."""

"""vLLM: what runs inside its processes."""

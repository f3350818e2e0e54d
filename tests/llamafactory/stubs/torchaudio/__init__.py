"""Empty stand-in: LLaMA-Factory imports torchaudio at once, and text training never uses it."""

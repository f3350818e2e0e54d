"""How a causal language model is asked: its states, its adapters, its shards, its calls."""

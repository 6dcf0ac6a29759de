"""GPT language models trained and sampled fast on ordinary CPUs."""

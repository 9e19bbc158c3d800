"""From text to batches: sources, tokenizer, token stores, mixtures, the plan of steps, the text that a run keeps."""

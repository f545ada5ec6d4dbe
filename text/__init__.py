"""Text in, token ids out, and back: tokenizer, chat templates, incremental detokenizer, stop strings."""

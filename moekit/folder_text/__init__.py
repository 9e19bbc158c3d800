"""The user's text as a model of transformers reads it: examples of files, chat templates, token ids and labels."""

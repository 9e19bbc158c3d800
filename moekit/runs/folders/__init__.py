"""What commands do with folders of transformers in the place of runs."""

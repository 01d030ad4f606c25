"""Model families: where the parts of each are, and how its visual tokens lie."""

"""Inside vision towers: read signals out of their blocks, and merge tokens between them."""

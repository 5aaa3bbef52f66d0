"""The Transformer over two stacks of blocks: `base` and `new`."""

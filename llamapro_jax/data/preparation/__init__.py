"""Documents to packed rows on disk: by several processes, and on after a kill."""

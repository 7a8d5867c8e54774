"""Files and folders on disk: atomic writes, checksums, locks."""

"""What lies on a disk: folders that appear whole, checksums, locks."""

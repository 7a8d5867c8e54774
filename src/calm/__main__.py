"""`python -m calm` is the same as `calm`."""

from calm.cli import main

main()

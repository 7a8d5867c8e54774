"""`python -m calm` does what `calm` does. Its help takes longer, since the package is imported whole."""

from calm.cli import main

main()

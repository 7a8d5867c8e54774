"""`python -m calm` is the same as `calm`. Its help takes longer, since it imports the whole package."""

from calm.cli import main

main()

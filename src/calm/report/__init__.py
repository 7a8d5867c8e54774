"""Scores and samples as tables on the terminal and self-contained HTML files."""

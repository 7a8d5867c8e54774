"""Figures and samples: tables on the terminal, self-contained HTML files."""

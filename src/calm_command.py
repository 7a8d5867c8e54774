"""The console script `calm`. It is outside the package, to say before `import calm` what this process is."""

is_running = False


def main() -> None:
    """Run the command line of calm."""
    global is_running
    is_running = True
    from calm.cli import main as run  # noqa: PLC0415 (the package asks during its import)

    run()
